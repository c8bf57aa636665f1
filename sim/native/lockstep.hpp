// Requests that decode together: every plan takes a token of each, so nobody need walk over them.
#pragma once

#include <queue>

#include "adapter_uses.hpp"
#include "features.hpp"
#include "kv_pool.hpp"

namespace replay {

// Plans are numbered. What a member has come to follows from the plans that were made and have landed since it joined; what a
// plan must know of all members is kept in sums, which change when one of them comes or goes.
class Lockstep {
  public:
    Lockstep(const Config& config, const Adapters& adapters, const FeatureSizes& sizes)
        : rows(adapters.rank, sizes.tile_rows), uses(adapters, config.set_order), block_size_(config.block_size),
          async_(config.async_scheduling), caching_(config.enable_prefix_caching), sizes_(sizes),
          at_(static_cast<std::size_t>(block_size_), 0), sharing_(static_cast<std::size_t>(block_size_)) {}

    AdapterRows rows;
    AdapterUses uses;
    Int planned = 0, landed = 0;  // the last plan that was made, and that has landed

    // One more plan is made, of all members.
    void plan() {
        ++planned;
        beginning_ = beginning_ == 0 ? block_size_ - 1 : beginning_ - 1;
    }

    Int size() const { return static_cast<Int>(keys_.size()); }
    Int computed(const State& s) const { return s.computed + (s.in_lockstep() ? planned - s.joined : 0); }
    Int emitted(const State& s) const { return s.emitted + (s.in_lockstep() ? tokens_out(s) : 0); }

    // It had its part in the last plan and decodes from the next one on; `left`: so many plans until its last token.
    void join(State& s, Int left, bool shares) {
        s.joined = planned;
        s.last = planned + left;
        ends_.emplace(s.last, &s);
        const Int key = s.computed - s.joined;
        keys_.insert(std::upper_bound(keys_.begin(), keys_.end(), key), key);
        key_sum_ += key;
        ++at_[remainder(key)];
        if (shares) share(s, key);
        if (rows.of(s.adapter) == 0) uses.begin(s.adapter, planned);
        rows.add(s.adapter, 1);
    }

    // It has no part in the next plan; `grown`: but has got the blocks for it.
    void leave(State& s, bool grown = false) {
        const Int key = s.computed - s.joined, out = tokens_out(s);
        keys_.erase(std::lower_bound(keys_.begin(), keys_.end(), key));
        key_sum_ -= key;
        --at_[remainder(key)];
        unshare(s, key);
        rows.add(s.adapter, -1);
        uses.touch(s.adapter, planned, s.seat);
        if (rows.of(s.adapter) == 0) uses.end(s.adapter, planned);
        s.computed += planned - s.joined;
        s.emitted += out;
        if (async_) s.placeholders += planned - s.joined - out;
        // As growing it plan by plan would have left it; the last token is not known yet where plans overlap.
        const Int tokens = s.computed + grown;
        s.held = (tokens + block_size_ - 1) / block_size_;
        if (caching_) s.registered = std::max(s.registered, (tokens - async_) / block_size_);
        s.joined = State::NOT_JOINED;
    }

    // A member whose last token a plan up to `plan` samples, or none.
    State* ended(Int plan) { return next_end() <= plan ? ends_.top().second : nullptr; }
    // The next plan that samples somebody's last token.
    Int next_end() {
        while (!ends_.empty() && !is_member(ends_.top())) ends_.pop();
        return ends_.empty() ? std::numeric_limits<Int>::max() : ends_.top().first;
    }

    // Of the next plan: members that begin a block, and those that make one of a common beginning findable, by their seats.
    Int beginning() const { return at_[beginning_]; }
    bool begins(const State& s) const { return computed(s) % block_size_ == 0; }
    const std::vector<State*>& filling() const {
        return sharing_[async_ ? beginning_ : beginning_ == 0 ? block_size_ - 1 : beginning_ - 1];
    }
    // The tokens of a member whose values the next plan knows.
    Int known(const State& s) const { return computed(s) + 1 - async_; }
    void filled(State& s, bool shares) {
        if (!shares) unshare(s, s.computed - s.joined);
    }

    // Adds the members' part in the next plan, all but what goes by adapter; `others`: the keys of decodes beside them.
    void fill(Features& f, std::vector<Int>& others) const {
        const Int n = size(), grown = planned + 1;
        f.rows += n;
        f.requests += n;
        f.kv_tokens += key_sum_ + n * grown;
        f.decodes = n + static_cast<Int>(others.size());
        const Int width = at_once(f.decodes, sizes_), longest = std::min(width, n);
        if (others.empty()) {
            if (n == 0) return;
            Int sum = 0;
            for (auto key = keys_.end() - longest; key != keys_.end(); ++key) sum += *key;
            f.max_kv = keys_.back() + grown;
            f.kv_tail = longest * keys_.back() - sum;
            return;
        }
        for (auto key = keys_.end() - longest; key != keys_.end(); ++key) others.push_back(*key + grown);
        f.max_kv = *std::max_element(others.begin(), others.end());
        f.kv_tail = tail(others, width, false);
    }

  private:
    using End = std::pair<Int, State*>;  // the plan that samples somebody's last token
    static bool is_member(const End& end) { return end.second->in_lockstep() && end.second->last == end.first; }
    Int tokens_out(const State& s) const { return std::max<Int>(0, landed - s.joined); }
    std::size_t remainder(Int key) const { return static_cast<std::size_t>((key % block_size_ + block_size_) % block_size_); }

    void share(State& s, Int key) {
        std::vector<State*>& line = sharing_[remainder(key)];
        line.insert(std::upper_bound(line.begin(), line.end(), &s, by_seat), &s);
    }
    void unshare(State& s, Int key) {
        std::vector<State*>& line = sharing_[remainder(key)];
        const auto at = std::lower_bound(line.begin(), line.end(), &s, by_seat);
        if (at != line.end() && *at == &s) line.erase(at);
    }

    const Int block_size_, async_;
    const bool caching_;
    const FeatureSizes sizes_;
    // A member's key is its computed tokens less the number of the last plan: it stays as it is.
    std::vector<Int> keys_;  // sorted
    Int key_sum_ = 0;
    std::vector<Int> at_;                       // members by what their keys leave over in a block
    std::vector<std::vector<State*>> sharing_;  // of them, who has yet to fill a block of a common beginning
    Int beginning_ = 0;                         // what the keys leave over of those that begin a block with the next plan
    std::priority_queue<End, std::vector<End>, std::greater<>> ends_;  // also of members that have left
};

}  // namespace replay
