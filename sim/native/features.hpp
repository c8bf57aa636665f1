// What a step's cost depends on: backend/features.py, StepFeatures.
#pragma once

#include <algorithm>
#include <functional>

#include "records.hpp"

namespace replay {

// Constants of backend/features.py and backend/base.py, handed over by Python.
struct FeatureSizes {
    Int tile_rows, prefill_tile, decodes_at_once, few_decodes, filling_decodes, split_decodes, tiles_at_once, grid_rows, wide_rows;
    Int long_rows;
};

struct Features {
    Int rows = 0, requests = 0, decodes = 0, kv_tokens = 0, max_kv = 0, kv_tail = 0, prefill_keys = 0, prefill_tail = 0,
        lora_tiles = 0, active_adapters = 0, rank_sum = 0, max_rank = 0, row_rank = 0, idle_slots = 0, skipped = 0;
    bool decode_only = false, after_prompts = false;
};

// Decodes that are worked on at a time.
inline Int at_once(Int decodes, const FeatureSizes& sizes) {
    if (decodes > sizes.split_decodes) return decodes <= sizes.few_decodes ? sizes.filling_decodes : sizes.decodes_at_once;
    if (decodes == 0) return 0;
    Int padded = 1;
    while (padded < decodes) padded *= 2;
    return std::max<Int>(1, padded / 2);
}

// Keys that the `width` longest could read more, were all as long as the longest; `idle`: empty places count too.
inline Int tail(std::vector<Int>& lengths, Int width, bool idle) {
    if (lengths.empty()) return 0;
    const auto n = static_cast<std::ptrdiff_t>(std::min<Int>(width, static_cast<Int>(lengths.size())));
    if (n < static_cast<std::ptrdiff_t>(lengths.size()))
        std::nth_element(lengths.begin(), lengths.begin() + (n - 1), lengths.end(), std::greater<>());
    Int longest = 0, sum = 0;
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        longest = std::max(longest, lengths[i]);
        sum += lengths[i];
    }
    return (idle ? width : static_cast<Int>(n)) * longest - sum;
}

// Adds up a step's requests one by one, those that do not decode in lockstep.
class PromptSum {
  public:
    std::vector<Int> decodes;  // keys of those that compute one token

    void begin() {
        decodes.clear();
        tiles_.clear();
    }
    void add(Features& f, Int query, Int context, const FeatureSizes& sizes) {
        f.rows += query;
        ++f.requests;
        if (query == 1) {
            decodes.push_back(context + 1);
            f.kv_tokens += context + 1;
            return;
        }
        const Int tile = sizes.prefill_tile, count = (query + tile - 1) / tile, whole = (query - 1) / tile;
        f.prefill_keys += count * context + tile * (count * (count - 1) / 2) + query;
        tiles_.push_back(context + query);
        for (Int t = whole; t > std::max<Int>(0, whole - sizes.tiles_at_once + 1); --t) tiles_.push_back(context + tile * t);
    }
    void end(Features& f, const FeatureSizes& sizes) { f.prefill_tail = tail(tiles_, sizes.tiles_at_once, true); }

  private:
    std::vector<Int> tiles_;
};

// The rows of a batch by adapter, in the sums that the features need; rows come and go.
class AdapterRows {
  public:
    AdapterRows(const std::vector<Int>& ranks, Int tile_rows)
        : ranks_(ranks), tile_rows_(tile_rows), rows_(ranks.size(), 0),
          of_rank_(ranks.empty() ? 1 : static_cast<std::size_t>(*std::max_element(ranks.begin(), ranks.end())) + 1, 0) {}

    Int of(Int adapter) const { return rows_[adapter]; }
    Int active() const { return active_; }

    void add(Int adapter, Int rows) {
        if (adapter == BASE) return;
        const Int rank = ranks_[adapter], before = rows_[adapter], after = rows_[adapter] += rows;
        tiles_ += tiles(after) - tiles(before);
        row_rank_ += rows * rank;
        const Int change = (after > 0) - (before > 0);
        active_ += change;
        rank_sum_ += change * rank;
        of_rank_[rank] += change;
        if (after > 0) max_rank_ = std::max(max_rank_, rank);
        while (max_rank_ > 0 && of_rank_[max_rank_] == 0) --max_rank_;
    }
    void fill(Features& f) const {
        f.lora_tiles = tiles_;
        f.active_adapters = active_;
        f.rank_sum = rank_sum_;
        f.max_rank = max_rank_;
        f.row_rank = row_rank_;
    }

  private:
    Int tiles(Int rows) const { return (rows + tile_rows_ - 1) / tile_rows_; }

    const std::vector<Int>& ranks_;  // by adapter
    Int tile_rows_;
    std::vector<Int> rows_;     // by adapter
    std::vector<Int> of_rank_;  // adapters with rows, by rank
    Int tiles_ = 0, active_ = 0, rank_sum_ = 0, max_rank_ = 0, row_rank_ = 0;
};

}  // namespace replay
