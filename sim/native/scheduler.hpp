// Which tokens of which requests the next step computes: sim/scheduler.py, Scheduler with `fcfs` or `priority`.
#pragma once

#include <algorithm>
#include <iterator>

#include "lockstep.hpp"
#include "plan.hpp"
#include "running.hpp"
#include "waiting_line.hpp"

namespace replay {

class Scheduler {
  public:
    Scheduler(const Config& config, const Adapters& adapters, const FeatureSizes& sizes, const std::vector<Int>& pinned)
        : pool(config.num_gpu_blocks, config.block_size, config.enable_prefix_caching),
          waiting(config.priority, adapters.count(), pinned), lockstep(config, adapters, sizes), config_(config),
          watermark_blocks_(static_cast<Int>(config.watermark * static_cast<double>(pool.total + 1))) {}

    KvPool pool;
    WaitingLine waiting;
    Running running;
    Lockstep lockstep;
    Int looked_at = 0;  // requests that plans and their landings looked at one by one

    bool all_in_lockstep() const { return lockstep.size() > 0 && apart_.empty(); }
    bool has_seat() const { return running.size() < config_.max_num_seqs; }

    // `flying`: the plan that has not landed yet, or none.
    void schedule(Plan& plan, Plan* flying) {
        plan.begin(config_.max_num_batched_tokens);
        flying_ = flying;
        if (flying) part_ended(*flying);
        const bool alone = running.size() + static_cast<Int>(waiting.all.size()) <= 1;
        const Int threshold = alone ? 0 : config_.long_prefill_token_threshold;
        schedule_running(plan, threshold);
        plan.running = static_cast<Int>(plan.items.size());
        if (plan.preempted.empty()) admit(plan, threshold);
        plan.decodes = plan.tokens = plan.sampled = lockstep.size();
        for (Item& item : plan.items) {
            item.samples = item.computed + item.tokens == item.state->tokens() + item.state->placeholders;
            plan.tokens += item.tokens;
            plan.sampled += item.samples;
        }
    }

    // The plan was launched: the requests are as far on as it takes them.
    void commit(Plan& plan) {
        lockstep.plan();
        plan.number = lockstep.planned;
        for (const Item& item : plan.items) {
            State& state = *item.state;
            state.computed += item.tokens;
            if (!item.samples) continue;
            plan.sampling.push_back(&state);
            state.placeholders += config_.async_scheduling;
            const Int left = state.limit - state.emitted - (config_.async_scheduling ? state.placeholders : 1);
            if (left > 0) lockstep.join(state, left, pool.shares(state));
        }
        if (!plan.items.empty())
            apart_.erase(std::remove_if(apart_.begin(), apart_.end(), [](State* s) { return s->in_lockstep(); }), apart_.end());
    }

    // Applies the outcome of a step that ends at `now_s`; fills `finished`.
    void update(Plan& plan, double now_s, std::vector<State*>& finished) {
        finished.clear();
        part_ended(plan);
        lockstep.landed = plan.number;
        looked_at += static_cast<Int>(plan.sampling.size());
        std::sort(plan.sampling.begin(), plan.sampling.end(), by_seat);
        for (State* state : plan.sampling) {
            if (std::isnan(state->first_token_s)) state->first_token_s = now_s;
            ++state->emitted;
            if (state->placeholders && !state->preempted) {
                --state->placeholders;
                if (!state->in_lockstep()) pool.register_full(*state, state->computed - state->placeholders);
            }
            if (state->emitted >= state->limit) finished.push_back(state);
        }
        for (State* state : finished)
            if (state->preempted) waiting.remove(state);
        for (State* state : finished) {
            state->done = true;
            pool.release(*state);
            if (!state->preempted) stop(state);
        }
    }

    // What a member of the lockstep fills by the next plan can be found, if others begin like it.
    void publish(State& state) {
        if (!pool.shares(state)) return;
        pool.register_full(state, lockstep.known(state));
        lockstep.filled(state, pool.shares(state));
    }

  private:
    // `state` leaves the lockstep. `flying`, if it counts on it there, samples its token all the same.
    void part(State* state, Plan* flying, bool grown = false) {
        if (flying && state->joined < flying->number) flying->sampling.push_back(state);
        lockstep.leave(*state, grown);
    }
    // Those leave the lockstep whose last token `plan` samples.
    void part_ended(Plan& plan) {
        while (State* state = lockstep.ended(plan.number)) {
            part(state, &plan);
            apart_.insert(std::upper_bound(apart_.begin(), apart_.end(), state, by_seat), state);
        }
    }
    // `state`, which is not in lockstep, does not run any more.
    void stop(State* state) {
        running.remove(state);
        waiting.count(state->adapter, -1);
        if (const auto at = std::find(apart_.begin(), apart_.end(), state); at != apart_.end()) apart_.erase(at);
    }

    void schedule_running(Plan& plan, Int threshold) {
        if (!budget_lasts(plan.budget, threshold)) {
            apart_.assign(running.begin(), running.end());
            looked_at += running.size();
            for (State* state : apart_)
                if (state->in_lockstep()) part(state, flying_);
        }
        plan.budget -= lockstep.size();
        const bool enough = blocks_last(plan.budget, threshold);
        if (enough) pool.take(lockstep.beginning());
        walk(enough);
        looked_at += static_cast<Int>(walk_.size());
        for (State* state : walk_) {
            if (state->waiting) continue;  // preempted for one before it
            const Int count = state->in_lockstep() ? 1 : chunk(left(*state), threshold, plan.budget);
            if (count == 0) continue;
            bool out = false;
            while (!out && !grow(*state, count, enough)) out = preempt(plan, *state) == state;
            if (out || state->in_lockstep()) continue;
            plan.items.push_back({state, count, state->computed});
            plan.budget -= count;
        }
    }

    // Whether each gets all the tokens it may have; what is left over to the last to run concerns nobody else.
    bool budget_lasts(Int budget, Int threshold) const {
        budget -= lockstep.size();
        for (const State* state : apart_)
            if (state != running.back()) budget -= chunk(left(*state), threshold, std::numeric_limits<Int>::max());
        return budget >= 0;
    }
    bool blocks_last(Int budget, Int threshold) const {
        Int free = pool.free() - lockstep.beginning();
        for (const State* state : apart_) {
            const Int count = chunk(left(*state), threshold, budget);
            free -= pool.needed(*state, state->computed + count, false);
            budget -= count;
        }
        return free >= 0;
    }

    // Those that a plan must look at, in the order in which they run: all, or with blocks `enough` for all those who are not in
    // lockstep, and of the others who makes a block findable.
    void walk(bool enough) {
        walk_.clear();
        if (!enough) {
            walk_.assign(running.begin(), running.end());
            return;
        }
        const std::vector<State*>& filling = lockstep.filling();
        std::merge(apart_.begin(), apart_.end(), filling.begin(), filling.end(), std::back_inserter(walk_), by_seat);
    }
    // `taken`: those in lockstep have got their blocks.
    bool grow(State& state, Int count, bool taken) {
        if (!state.in_lockstep()) return pool.grow(state, state.computed + count);
        if (!taken && lockstep.begins(state)) {
            if (pool.free() == 0) return false;
            pool.take(1);
        }
        publish(state);
        return true;
    }

    Int left(const State& s) const {
        if (s.placeholders && s.emitted + s.placeholders >= s.limit) return 0;
        return std::min(s.tokens() + s.placeholders - s.computed, config_.max_model_len - s.computed - 1);
    }
    static Int chunk(Int left, Int threshold, Int budget) {
        return threshold ? std::min({left, budget, threshold}) : std::min(left, budget);
    }

    State* choose_victim() const {
        State* victim = running.back();
        if (!config_.priority) return victim;
        // Of equals the first.
        const auto comes_first = [](const State& a, const State& b) {
            return a.priority != b.priority ? a.priority > b.priority : a.arrival_s >= b.arrival_s;
        };
        for (State* s = victim->before; s != nullptr; s = s->before)
            if (comes_first(*s, *victim)) victim = s;
        return victim;
    }

    // Throws somebody out, for want of a block for `state`.
    State* preempt(Plan& plan, const State& state) {
        State* victim = choose_victim();
        if (victim->in_lockstep()) {
            part(victim, flying_, victim->seat < state.seat);
            ++plan.budget;
        }
        const auto gone = std::remove_if(plan.items.begin(), plan.items.end(), [&](const Item& item) {
            if (item.state == victim) plan.budget += item.tokens;
            return item.state == victim;
        });
        plan.items.erase(gone, plan.items.end());
        stop(victim);
        pool.release(*victim);
        victim->computed = victim->placeholders = 0;
        victim->preempted = true;
        ++victim->preemptions;
        waiting.requeue(victim);
        plan.preempted.push_back(victim);
        return victim;
    }

    bool has_room(const Plan& plan) const { return plan.budget > 0 && has_seat(); }

    void admit(Plan& plan, Int threshold) {
        auto next = waiting.all.begin();
        while (next != waiting.all.end() && has_room(plan)) {
            if (waiting.distinct() == config_.max_loras) {
                admit_of_running(plan, threshold, next);
                break;
            }
            if (!take(plan, threshold, *next++)) break;
        }
        for (Int i = plan.running; i < static_cast<Int>(plan.items.size()); ++i) waiting.remove(plan.items[i].state);
    }

    // All slots are taken: of those that wait from `next` on, requests of the base model and of adapters that run.
    void admit_of_running(Plan& plan, Int threshold, Line::iterator next) {
        heads_.clear();
        const auto look = [&](Int adapter) {
            const Line& line = waiting.line(adapter);
            if (const auto at = line.lower_bound(*next); at != line.end()) heads_.emplace_back(at, line.end());
        };
        look(BASE);
        for (Int adapter : waiting.running()) look(adapter);
        const WaitingOrder before{config_.priority};
        State* end = nullptr;  // where the look along the line ended
        while (end == nullptr && !heads_.empty()) {
            const auto first = std::min_element(heads_.begin(), heads_.end(),
                                                [&](const auto& a, const auto& b) { return before(*a.first, *b.first); });
            State* state = *first->first;
            if (++first->first == first->second) heads_.erase(first);
            if (!take(plan, threshold, state) || !has_room(plan)) end = state;
        }
        if (end == nullptr) {
            plan.to_the_end = true;
            plan.passed = waiting.pass(1);
            return;
        }
        for (; *next != end; ++next)
            if (!waiting.runs((*next)->adapter)) plan.skipped.push_back(*next);
        for (State* state : plan.skipped) ++state->skips;
        plan.passed = static_cast<Int>(plan.skipped.size());
    }

    // Admits a request, or says that nobody is admitted any more.
    bool take(Plan& plan, Int threshold, State* state) {
        ++looked_at;
        pool.lookup(*state);
        const Int found = static_cast<Int>(pool.found.size()), computed = found * config_.block_size;
        const Int wanted = chunk(state->tokens() - computed, threshold, state->tokens());
        const Int tokens = std::min(wanted, plan.budget);
        plan.stopped = (wanted > plan.budget && !config_.enable_chunked_prefill) || !blocks_fit(*state, computed + tokens);
        if (plan.stopped) return false;
        pool.grow(*state, computed + tokens, true);
        state->computed = computed;
        running.push_back(state);
        apart_.push_back(state);
        waiting.count(state->adapter, 1);
        plan.items.push_back({state, tokens, computed, computed});
        plan.budget -= tokens;
        state->preempted = false;
        return true;
    }

    bool blocks_fit(const State& state, Int tokens) const {
        const Int tested = config_.scheduler_reserve_full_isl ? state.tokens() : tokens;
        return pool.needed(state, tested, true) + (running.empty() ? 0 : watermark_blocks_) <= pool.free();
    }

    const Config config_;
    std::vector<std::pair<Line::iterator, Line::iterator>> heads_;
    Int watermark_blocks_;
    std::vector<State*> apart_;  // who runs and is not in lockstep, by their seats
    std::vector<State*> walk_;
    Plan* flying_ = nullptr;
};

}  // namespace replay
