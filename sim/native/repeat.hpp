// Many like steps at once, between two events that can change a plan.
#pragma once

#include <iterator>

#include "engine.hpp"

namespace replay {

// The last plan was a decode of all that run, with nobody admitted, finished or loaded. As long as blocks last and nobody
// finishes, the next plan is the same: every step is arithmetic.
// Returns whether there was such a step.
inline bool Engine::repeat(double until_s, bool last) {
    KvPool& pool = scheduler.pool;
    const bool lags = config.async_scheduling;
    if (lags && flying_ == nullptr) return false;
    Flight& latest = lags ? *flying_ : flights_[0];
    // Whether one more request fits may change with what the cache holds.
    if (pool.caching && latest.plan.stopped) return false;
    Int most = std::numeric_limits<Int>::max();
    for (const State* s : scheduler.running) most = std::min(most, s->limit - s->emitted - 1);
    if (most < 2) return false;
    Features f = sum_.f;
    f.after_prompts = false;
    StepCosts::Decodes decodes(*costs_, f);
    Int steps = 0;
    for (; steps < most && !full() && (last ? now_s <= until_s : now_s < until_s); ++steps) {
        const Timing timing = decodes.next();
        const double gpu_s = std::max(now_s + 0.0 + timing.host_s, gpu_free_s_) + 0.0 + timing.device_s;
        const double landed_s = now_s + std::max(0.0, (lags ? latest.end_s : gpu_s) - now_s);
        if (landed_s > until_s) break;
        if (steps == 0) sort_by_remainder();
        const std::vector<int>& fresh = bucket(steps);
        if (static_cast<Int>(fresh.size()) > pool.free()) break;
        if (pool.caching) take_blocks(fresh, steps);
        else pool.take(static_cast<Int>(fresh.size()));
        if (lags) {
            StepRow before = latest.row;
            fly(latest, timing, 0.0, 0.0);
            now_s = landed_s;
            record(before);
        } else {
            fly(latest, timing, 0.0, 0.0);
            now_s = landed_s;
            record(latest.row);
        }
    }
    if (steps == 0) return false;
    after_prompts_ = false;
    sum_.f.kv_tokens += steps * f.requests;
    sum_.f.max_kv += steps;
    for (std::size_t i = 0; i < scheduler.running.size(); ++i) catch_up(i, steps);
    for (Int a : used_) {
        uses[a].step_uses += steps;
        uses[a].hits += steps;
    }
    if (latest.plan.to_the_end) scheduler.waiting.pass(steps);
    for (State* s : latest.plan.skipped) s->skips += steps;
    return true;
}

// Running requests by what their computed tokens leave over in their last block: a step begins a block for one remainder
// only, so none need be walked over in between.
inline void Engine::sort_by_remainder() {
    const std::vector<State*>& running = scheduler.running;
    buckets_.resize(static_cast<std::size_t>(config.block_size));
    for (auto& one : buckets_) one.clear();
    for (std::size_t i = 0; i < running.size(); ++i)
        buckets_[static_cast<std::size_t>(running[i]->computed % config.block_size)].push_back(static_cast<int>(i));
    moved_.assign(running.size(), 0);
}
// Those that have a multiple of `block_size` tokens computed after `steps` more steps.
inline const std::vector<int>& Engine::bucket(Int steps) const {
    return buckets_[static_cast<std::size_t>((config.block_size - steps % config.block_size) % config.block_size)];
}

// Those that begin a block and those that fill one, in the order in which they run.
inline void Engine::take_blocks(const std::vector<int>& fresh, Int steps) {
    touched_.clear();
    const std::vector<int>& filling = bucket(steps + 1);
    std::set_union(fresh.begin(), fresh.end(), filling.begin(), filling.end(), std::back_inserter(touched_));
    for (int i : touched_) {
        catch_up(static_cast<std::size_t>(i), steps);
        State& state = *scheduler.running[static_cast<std::size_t>(i)];
        scheduler.pool.grow(state, state.computed + 1);
    }
}
inline void Engine::catch_up(std::size_t i, Int steps) {
    State& state = *scheduler.running[i];
    state.computed += steps - moved_[i];
    state.emitted += steps - moved_[i];
    moved_[i] = steps;
    if (!scheduler.pool.caching) state.held = scheduler.pool.blocks_for(state.computed);
}

}  // namespace replay
