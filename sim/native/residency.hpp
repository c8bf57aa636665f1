// How the adapters of a step come into their slots, and what that takes.
#pragma once

#include "engine.hpp"

namespace replay {

// Brings the adapters of the next plan in. Those of the lockstep are there, for the last plan used them, too.
inline void Engine::bring_in(const Plan& plan, Int adapters) {
    if (adapters > config.max_loras)
        throw AdapterError("a step uses " + std::to_string(adapters) + " adapters, max_loras is " +
                           std::to_string(config.max_loras));
    const Int number = scheduler.lockstep.planned + 1;
    bool missing = false, of_running = false;
    for (std::size_t i = 0; i < plan.items.size(); ++i) {
        const Int a = plan.items[i].state->adapter;
        if (a == BASE || counted_[a] == number) continue;
        counted_[a] = number;
        const bool there = slots.slot[a] >= 0;
        if (scheduler.lockstep.rows.of(a) == 0) uses().count(a, there);
        missing |= !there;
        of_running |= !there && static_cast<Int>(i) < plan.running;
    }
    if (missing && (of_running || config.set_order)) return load_in_turn(plan, number);
    if (missing) load_last(plan, number);
    for (const Item& item : plan.items) uses().touch(item.state->adapter, number, item.state->seat);
}

// Where only admitted requests lack theirs: these come in after all others, so it does not matter in which order the lockstep's
// were used.
inline void Engine::load_last(const Plan& plan, Int number) {
    for (Int a : uses().in_order()) slots.touch(a);
    uses().known(number - 1);
    for (const Item& item : plan.items) {
        const Int adapter = item.state->adapter;
        if (adapter == BASE) continue;
        if (slots.slot[adapter] < 0) slots.renew([&](Int a) { return scheduler.lockstep.rows.of(a) > 0; });
        slots.bring(adapter);
    }
}

// Else one after the other, in the order of their requests or of the set.
inline void Engine::load_in_turn(const Plan& plan, Int number) {
    scheduler.looked_at += scheduler.running.size();
    for (const State* s : scheduler.running)
        if (s->in_lockstep() && s->joined < number - 1) uses().touch(s->adapter, number - 1, s->seat);
    for (Int a : uses().in_order()) slots.touch(a);
    uses().known(number);
    used_.clear();
    auto item = plan.items.begin();
    for (const State* s : scheduler.running) {
        const bool listed = item != plan.items.end() && item->state == s;
        if (listed) ++item;
        if (s->adapter == BASE || !(listed || s->in_lockstep()) || counted_[s->adapter] == -number) continue;
        counted_[s->adapter] = -number;
        used_.push_back(s->adapter);
    }
    if (config.set_order)
        std::stable_sort(used_.begin(), used_.end(),
                         [&](Int a, Int b) { return adapters_->order[a] < adapters_->order[b]; });
    for (Int a : used_) slots.bring(a);
}

// Seconds of the moves that were decided: (stages, loads); `at_once`: before the start, where they take no time.
inline std::pair<double, double> Engine::carry_out(bool at_once) {
    double stage_s = 0.0, copy_s = 0.0;
    for (const Move& move : slots.moves) {
        const double at_s = at_once ? clock.now_s : clock.now_s + stage_s + copy_s;
        double seconds = 0.0;
        if (move.kind == STAGE) {
            ++uses().table[move.adapter].stages;
            seconds = adapters_->stage_s[move.adapter];
        } else if (move.kind == LOAD) {
            ++uses().table[move.adapter].activations;
            seconds = adapters_->load_s[move.adapter];
        } else if (move.kind == EVICT) {
            ++uses().table[move.adapter].evictions;
        }
        (move.kind == LOAD ? copy_s : stage_s) += seconds;
        if (keep_rows_) moves.push_back({at_s, at_s + seconds, move.kind, move.adapter, move.slot});
    }
    slots.moves.clear();
    return {stage_s, copy_s};
}

}  // namespace replay
