// Paged KV memory: sim/kv_cache.py, BlockPool.
#pragma once

#include <algorithm>

#include "free_list.hpp"

namespace replay {

// A request holds `held` blocks. Which they are matters only for those that somebody may look for: the full ones of a common
// beginning, and its own ones after a preemption. All others are counted.
class KvPool {
  public:
    KvPool(Int num_gpu_blocks, Int block_size, bool caching)
        : total(num_gpu_blocks - 1), block_size(block_size), caching(caching), free_(total) {}

    const Int total, block_size;
    const bool caching;
    std::vector<int> found;  // of the last lookup

    Int free() const { return free_.size(); }
    Int used() const { return total - free_.size(); }
    Int blocks_for(Int tokens) const { return (tokens + block_size - 1) / block_size; }

    // Fills `found` with the cached blocks a waiting request begins with.
    void lookup(State& state) {
        found.clear();
        if (!caching) return;
        for (Int index = 0; index < (state.tokens() - 1) / block_size; ++index) {
            const int block = free_.find(state, index, shared_id(state, index));
            if (block < 0) break;
            found.push_back(block);
        }
    }

    // Free blocks it takes to hold `tokens` tokens; `with_found`: beginning with the `found` ones.
    Int needed(const State& state, Int tokens, bool with_found) const {
        const Int fresh = blocks_for(tokens) - state.held;
        if (!with_found || found.empty()) return std::max<Int>(0, fresh);
        Int idle = 0;
        for (int block : found) idle += free_.holders(block) == 0;
        return std::max<Int>(0, fresh - static_cast<Int>(found.size())) + idle;
    }

    bool grow(State& state, Int tokens, bool with_found = false) {
        const bool begins = with_found && !found.empty();
        if (begins || tokens > state.held * block_size) {
            if (needed(state, tokens, with_found) > free()) return false;
            if (begins) begin(state);
            const Int fresh = blocks_for(tokens) - state.held;
            free_.take(fresh);
            state.held += fresh;
        }
        if (caching && tokens >= (state.registered + 1) * block_size) register_full(state, std::min(tokens, state.tokens()));
        return true;
    }

    // `count` free blocks are held from now on, by requests that count them themselves.
    void take(Int count) { free_.take(count); }

    // Makes the full blocks among the first `tokens` tokens findable.
    void register_full(State& state, Int tokens) {
        const Int full = tokens / block_size;
        if (!caching || full <= state.registered) return;
        for (Int index = state.registered, end = std::min(full, shared_blocks(state)); index < end; ++index)
            state.findable->blocks.push_back(free_.publish(state, index, shared_id(state, index)));
        state.registered = full;
    }

    // Whether it has yet to fill a block of a common beginning.
    bool shares(const State& state) const { return caching && state.registered < shared_blocks(state); }

    void release(State& state) {
        // From last to first, so that the end of a prefix is given away before its beginning; blocks that cannot be found
        // again go to the front.
        const Int full = caching ? state.registered : 0;
        const Int known = state.findable ? static_cast<Int>(state.findable->blocks.size()) : 0;
        free_.front(state.held - full);
        if (state.done) free_.back(full - known);  // nobody will look for its own blocks again
        else
            for (Int index = full - 1; index >= known; --index) free_.back_own(state, index);
        if (known) {
            std::vector<int>& blocks = state.findable->blocks;
            for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) free_.let_go(*block);
            blocks.clear();
        }
        state.held = 0;
        state.registered = 0;
        if (state.done) state.findable.reset();
    }

  private:
    // Blocks of its common beginning.
    Int shared_blocks(const State& state) const {
        return state.findable && !state.findable->prefix.empty() ? state.findable->prefix.back().first / block_size : 0;
    }

    // The prefix id of a block inside the common beginning, or -1: its tokens are the request's own.
    Int shared_id(const State& state, Int index) const {
        if (index >= shared_blocks(state)) return -1;
        const auto& prefix = state.findable->prefix;
        return std::lower_bound(prefix.begin(), prefix.end(), (index + 1) * block_size,
                                [](const auto& pair, Int end) { return pair.first < end; })->second;
    }

    void begin(State& state) {
        for (int block : found) free_.hold(block);
        state.findable->blocks = found;
        state.held = state.registered = static_cast<Int>(found.size());
    }

    FreeList free_;
};

}  // namespace replay
