// Many like steps at once, between two events that can change a plan.
#pragma once

#include "engine.hpp"

namespace replay {

// As long as all that run decode in lockstep, nobody of them for the last time, blocks last, and nobody else can be admitted, the
// next plan is the last one again: every step is arithmetic. Returns whether there was such a step.
inline bool Engine::repeat(double until_s, bool last) {
    Lockstep& lockstep = scheduler.lockstep;
    KvPool& pool = scheduler.pool;
    const bool lags = config.async_scheduling;
    if (after_prompts_ || !scheduler.all_in_lockstep()) return false;
    if (!nobody_fits_ && scheduler.has_seat() && !scheduler.waiting.all.empty()) return false;
    if (lags && (flying_ == nullptr || !flying_->plan.sampling.empty())) return false;
    const Int most = lockstep.next_end() - lockstep.planned - 1;
    if (most < 1) return false;
    Flight& latest = lags ? *flying_ : flights_[0];
    Plan& plan = latest.plan;
    if (!nobody_fits_) plan.only_lockstep();
    plan.items.clear();  // they have joined the lockstep
    const Features f = features(plan);
    StepCosts::Decodes decodes(*costs_, f);
    // One row lands while the other is in the air.
    StepRow turns[2] = {};
    for (StepRow& row : turns) {
        row.tokens = row.decode_requests = f.requests;
        row.distinct_adapters = f.active_adapters;
        row.skipped = plan.passed;
    }
    StepRow* flying = &latest.row;
    Int steps = 0;
    for (; steps < most && !full() && (last ? now_s <= until_s : now_s < until_s); ++steps) {
        const Timing timing = decodes.next();
        const double gpu_s = std::max(now_s + timing.host_s, gpu_free_s_) + timing.device_s;
        const double landed_s = now_s + std::max(0.0, (lags ? flying->end_s : gpu_s) - now_s);
        if (landed_s > until_s) break;
        const Int fresh = lockstep.beginning();
        if (fresh > pool.free()) break;
        pool.take(fresh);
        if (!lockstep.filling().empty()) {
            filling_ = lockstep.filling();
            for (State* state : filling_) scheduler.publish(*state);
        }
        StepRow* launched = &turns[steps % 2];
        fly(*launched, timing, 0.0, 0.0);
        now_s = landed_s;
        record(lags ? *flying : *launched);
        flying = launched;
        lockstep.plan();
        ++lockstep.landed;
    }
    if (steps == 0) return false;
    nobody_fits_ = true;
    preemptions_ = 0;
    latest.row = *flying;
    plan.number = lockstep.planned;
    if (plan.to_the_end) scheduler.waiting.pass(steps);
    for (State* s : plan.skipped) s->skips += steps;
    return true;
}

}  // namespace replay
