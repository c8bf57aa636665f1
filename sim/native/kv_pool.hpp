// Paged KV memory: sim/kv_cache.py, BlockPool. Without prefix caching blocks are all alike and only counted.
#pragma once

#include <algorithm>
#include <unordered_map>

#include "records.hpp"

namespace replay {

// What identifies the tokens of a block of a common beginning.
struct SharedKey {
    Int adapter, prefix, index;
    bool operator==(const SharedKey& o) const { return adapter == o.adapter && prefix == o.prefix && index == o.index; }
};

struct SharedKeyHash {
    std::size_t operator()(const SharedKey& k) const {
        std::uint64_t h = 0x9E3779B97F4A7C15ull;
        for (std::uint64_t part : {std::uint64_t(k.adapter), std::uint64_t(k.prefix), std::uint64_t(k.index)}) {
            h = (h ^ part) * 0xBF58476D1CE4E5B9ull;
            h ^= h >> 29;
        }
        return static_cast<std::size_t>(h);
    }
};

class KvPool {
  public:
    KvPool(Int num_gpu_blocks, Int block_size, bool caching)
        : total(num_gpu_blocks - 1), block_size(block_size), caching(caching), free_(total) {
        if (!caching) return;
        const int end = static_cast<int>(total);
        blocks_.resize(static_cast<std::size_t>(total) + 1);
        keys_.resize(static_cast<std::size_t>(total));
        blocks_[end].prev = blocks_[end].next = end;
        for (int b = 0; b < end; ++b) link(blocks_[end].prev, b, end);
    }

    const Int total, block_size;
    const bool caching;
    std::vector<int> found;  // of the last lookup

    Int free() const { return free_; }
    Int used() const { return total - free_; }
    Int blocks_for(Int tokens) const { return (tokens + block_size - 1) / block_size; }

    // Fills `found` with the cached blocks a waiting request begins with.
    void lookup(State& state) {
        found.clear();
        if (!caching) return;
        for (Int index = 0; index < (state.tokens() - 1) / block_size; ++index) {
            const int block = head(state, index);
            if (block < 0) break;
            found.push_back(block);
        }
    }

    // Free blocks it takes to hold `tokens` tokens; `with_found`: beginning with the `found` ones.
    Int needed(const State& state, Int tokens, bool with_found) const {
        const Int fresh = blocks_for(tokens) - state.held;
        if (!with_found || found.empty()) return std::max<Int>(0, fresh);
        Int idle = 0;
        for (int block : found) idle += blocks_[block].owners == 0;
        return std::max<Int>(0, fresh - static_cast<Int>(found.size())) + idle;
    }

    bool grow(State& state, Int tokens, bool with_found = false) {
        const bool begins = with_found && !found.empty();
        if (begins || tokens > state.held * block_size) {
            if (needed(state, tokens, with_found) > free_) return false;
            hand_out(state, tokens, begins);
        }
        if (caching && tokens >= (state.registered + 1) * block_size) register_full(state, std::min(tokens, state.tokens()));
        return true;
    }

    // Takes `count` free blocks; without prefix caching, whoever gets them.
    void take(Int count) { free_ -= count; }

    // Makes the full blocks among the first `tokens` tokens findable.
    void register_full(State& state, Int tokens) {
        if (!caching || tokens < (state.registered + 1) * block_size) return;
        const Int full = tokens / block_size;
        for (Int index = state.registered; index < full; ++index) publish(state, index);
        state.registered = full;
    }

    void release(State& state) {
        if (!caching) {
            free_ += state.held;
        } else {
            for (auto b = state.blocks.rbegin(); b != state.blocks.rend(); ++b) {
                Block& block = blocks_[*b];
                if (--block.owners == 0) {
                    const int end = static_cast<int>(total);
                    if (block.index >= 0) link(blocks_[end].prev, *b, end);
                    else link(end, *b, blocks_[end].next);
                    ++free_;
                }
            }
            state.blocks.clear();
        }
        state.held = 0;
        state.registered = 0;
        if (state.done) {  // nobody will look for its own blocks again
            std::vector<int>().swap(state.own);
            std::vector<std::pair<Int, Int>>().swap(state.prefix);
            std::vector<int>().swap(state.blocks);
        }
    }

  private:
    struct Block {
        int prev = -1, next = -1;    // in the free list, a ring around the entry `total`
        int older = -1, newer = -1;  // in the ring of copies of one key
        int owners = 0;
        int index = -1;        // which block of a request it is; -1: it cannot be found
        State* own = nullptr;  // the request whose own block it is, or none: it has a key in `keys_`
    };

    void link(int before, int block, int after) {
        blocks_[block].prev = before;
        blocks_[block].next = after;
        blocks_[before].next = block;
        blocks_[after].prev = block;
    }
    void unlink(int block) {
        Block& b = blocks_[block];
        blocks_[b.prev].next = b.next;
        blocks_[b.next].prev = b.prev;
        --free_;
    }

    // The prefix id of a block inside the common beginning, or -1: its tokens are the request's own.
    Int shared_id(const State& state, Int index) const {
        const Int end = (index + 1) * block_size;
        if (state.prefix.empty() || end > state.prefix.back().first) return -1;
        return std::lower_bound(state.prefix.begin(), state.prefix.end(), end,
                                [](const auto& pair, Int e) { return pair.first < e; })->second;
    }

    int head(const State& state, Int index) const {
        const Int id = shared_id(state, index);
        if (id < 0) return index < static_cast<Int>(state.own.size()) ? state.own[index] : -1;
        const auto at = shared_.find({state.adapter, id, index});
        return at == shared_.end() ? -1 : at->second;
    }

    void publish(State& state, Int index) {
        const int b = state.blocks[index];
        const Int id = shared_id(state, index);
        Block& block = blocks_[b];
        block.index = static_cast<int>(index);
        block.own = id < 0 ? &state : nullptr;
        if (id >= 0) keys_[b] = {state.adapter, id, index};
        else if (index >= static_cast<Int>(state.own.size())) state.own.resize(index + 1, -1);
        int& first = id < 0 ? state.own[index] : shared_.try_emplace(keys_[b], -1).first->second;
        if (first < 0) {
            first = block.older = block.newer = b;
            return;
        }
        const int last = blocks_[first].older;
        block.older = last;
        block.newer = first;
        blocks_[last].newer = b;
        blocks_[first].older = b;
    }

    // A block that is given away can no longer be found.
    void forget(int b) {
        Block& block = blocks_[b];
        const int index = block.index;
        block.index = -1;
        if (block.own != nullptr && block.own->done) return;
        const bool alone = block.newer == b;
        blocks_[block.older].newer = block.newer;
        blocks_[block.newer].older = block.older;
        if (block.own != nullptr) {
            int& first = block.own->own[index];
            if (first == b) first = alone ? -1 : block.newer;
            return;
        }
        const auto at = shared_.find(keys_[b]);
        if (at->second != b) return;
        if (alone) shared_.erase(at);
        else at->second = block.newer;
    }

    void hand_out(State& state, Int tokens, bool begins) {
        if (!caching) {
            const Int more = blocks_for(tokens) - state.held;
            free_ -= more;
            state.held += more;
            return;
        }
        if (begins) {
            for (int block : found) {
                if (blocks_[block].owners == 0) unlink(block);
                ++blocks_[block].owners;
                state.blocks.push_back(block);
            }
            state.registered += static_cast<Int>(found.size());
        }
        const int end = static_cast<int>(total);
        for (Int more = blocks_for(tokens) - static_cast<Int>(state.blocks.size()); more > 0; --more) {
            const int b = blocks_[end].next;
            unlink(b);
            blocks_[b].owners = 1;
            if (blocks_[b].index >= 0) forget(b);
            state.blocks.push_back(b);
        }
        state.held = static_cast<Int>(state.blocks.size());
    }

    Int free_;
    std::vector<Block> blocks_;
    std::vector<SharedKey> keys_;
    std::unordered_map<SharedKey, int, SharedKeyHash> shared_;
};

}  // namespace replay
