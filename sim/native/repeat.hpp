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
    if (!scheduler.all_in_lockstep()) return false;
    if (!nobody_fits_ && scheduler.has_seat() && !scheduler.waiting.all.empty()) return false;
    if (lags && (flying_ == nullptr || !flying_->plan.sampling.empty())) return false;
    const Int most = lockstep.next_end() - lockstep.planned - 1;
    if (most < 1 || lockstep.beginning() > pool.free()) return false;
    Flight& latest = lags ? *flying_ : flights_[0];
    Plan& plan = latest.plan;
    if (!nobody_fits_) plan.only_lockstep();
    plan.items.clear();  // they have joined the lockstep
    plan.sampling.clear();
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
    Clock at = clock;  // copies, which nothing else can change
    Totals sums = totals;
    Int steps = 0;
    while (steps < most && !full() && (last ? at.now_s <= until_s : at.now_s < until_s)) {
        StepRow* launched = &turns[steps % 2];
        Clock then = at;
        then.launch(*launched, *costs_, decodes.next());
        StepRow* landing = lags ? flying : launched;
        const double landed_s = at.landed_s(*landing);
        const Int fresh = lockstep.beginning();
        if (fresh > pool.free() || (lags && landed_s > until_s)) break;
        if (fresh > 0) pool.take(fresh);
        if (!lockstep.filling().empty()) {
            filling_ = lockstep.filling();
            for (State* state : filling_) scheduler.publish(*state);
        }
        launched->used_blocks = pool.used();
        launched->free_blocks = pool.free();
        lockstep.plan();
        ++steps;
        flying = launched;
        at.gpu_free_s = then.gpu_free_s;
        at.heat = then.heat;
        if (landed_s > until_s) {
            land_later(latest, landed_s);
            break;
        }
        record(*landing, sums);
        ++lockstep.landed;
        at.now_s = landed_s;
    }
    if (steps == 0) return false;
    nobody_fits_ = true;
    after_prompts_ = false;
    preemptions_ = 0;
    clock = at;
    totals = sums;
    latest.row = *flying;
    plan.number = lockstep.planned;
    if (plan.to_the_end) scheduler.waiting.pass(steps);
    for (State* s : plan.skipped) s->skips += steps;
    return true;
}

}  // namespace replay
