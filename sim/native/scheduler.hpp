// Which tokens of which requests the next step computes: sim/scheduler.py, Scheduler with `fcfs` or `priority`.
#pragma once

#include <algorithm>
#include <deque>

#include "kv_pool.hpp"
#include "waiting_line.hpp"

namespace replay {

// sim/scheduler.py, Scheduled.
struct Item {
    State* state;
    Int tokens, computed, found = 0;
    bool samples = false;
};

// sim/scheduler.py, StepPlan: the first `running` items ran before, the others are admitted.
struct Plan {
    Int budget = 0, running = 0, tokens = 0, sampled = 0;
    std::vector<Item> items;
    std::vector<State*> preempted;
    std::vector<State*> skipped;  // passed over, where the line was not looked through to its end
    Int passed = 0;               // passed over, all of them
    bool to_the_end = false;      // the line was looked through, with all slots taken
    bool stopped = false;         // admission ended for want of blocks, or of budget for a whole prompt

    Int admitted() const { return static_cast<Int>(items.size()) - running; }
    void begin(Int tokens_at_most) {
        budget = tokens_at_most;
        running = tokens = sampled = 0;
        items.clear();
        preempted.clear();
        skipped.clear();
        passed = 0;
        to_the_end = stopped = false;
    }
};

class Scheduler {
  public:
    Scheduler(const Config& config, Int adapters, const std::vector<Int>& pinned)
        : pool(config.num_gpu_blocks, config.block_size, config.enable_prefix_caching),
          waiting(config.priority, adapters, pinned), config_(config),
          watermark_blocks_(static_cast<Int>(config.watermark * static_cast<double>(pool.total + 1))) {}

    KvPool pool;
    WaitingLine waiting;
    std::vector<State*> running;

    void schedule(Plan& plan) {
        plan.begin(config_.max_num_batched_tokens);
        const bool alone = running.size() + waiting.all.size() <= 1;
        const Int threshold = alone ? 0 : config_.long_prefill_token_threshold;
        schedule_running(plan, threshold);
        plan.running = static_cast<Int>(plan.items.size());
        if (plan.preempted.empty()) admit(plan, threshold);
        for (Item& item : plan.items) advance(item, plan);
    }

    // Applies the outcome of a step that ends at `now_s`; fills `finished`.
    void update(const Plan& plan, double now_s, std::vector<State*>& finished) {
        finished.clear();
        for (const Item& item : plan.items) {
            State& state = *item.state;
            if (!item.samples) continue;
            if (std::isnan(state.first_token_s)) state.first_token_s = now_s;
            if (state.done) continue;
            ++state.emitted;
            if (state.placeholders && !state.preempted) {
                --state.placeholders;
                pool.register_full(state, state.computed - state.placeholders);
            }
            if (state.emitted >= state.limit) finished.push_back(&state);
        }
        for (State* state : finished)
            if (state->preempted) waiting.remove(state);
        for (State* state : finished) {
            state->done = true;
            pool.release(*state);
            if (!state->preempted) waiting.count(state->adapter, -1);
        }
        if (!finished.empty())
            running.erase(std::remove_if(running.begin(), running.end(), [](State* s) { return s->done; }), running.end());
    }

  private:
    void schedule_running(Plan& plan, Int threshold) {
        std::size_t index = 0;
        while (index < running.size() && plan.budget > 0) {
            State* state = running[index];
            const Int count = chunk(left(*state), threshold, plan.budget);
            if (count == 0) {
                ++index;
                continue;
            }
            bool out = false;
            while (!out && !pool.grow(*state, state->computed + count)) {
                State* victim = choose_victim();
                const auto at = static_cast<std::size_t>(std::find(running.begin(), running.end(), victim) - running.begin());
                index -= at < index;
                preempt(victim, plan, at);
                out = victim == state;
            }
            if (out) continue;
            plan.items.push_back({state, count, state->computed});
            plan.budget -= count;
            ++index;
        }
    }

    Int left(const State& s) const {
        if (s.placeholders && s.emitted + s.placeholders >= s.limit) return 0;
        return std::min(s.tokens() + s.placeholders - s.computed, config_.max_model_len - s.computed - 1);
    }
    static Int chunk(Int left, Int threshold, Int budget) {
        return threshold ? std::min({left, budget, threshold}) : std::min(left, budget);
    }

    State* choose_victim() const {
        if (!config_.priority) return running.back();
        return *std::max_element(running.begin(), running.end(), [](const State* a, const State* b) {
            return a->priority != b->priority ? a->priority < b->priority : a->arrival_s < b->arrival_s;
        });
    }

    void preempt(State* victim, Plan& plan, std::size_t at) {
        running.erase(running.begin() + static_cast<std::ptrdiff_t>(at));
        const auto gone = std::remove_if(plan.items.begin(), plan.items.end(), [&](const Item& item) {
            if (item.state == victim) plan.budget += item.tokens;
            return item.state == victim;
        });
        plan.items.erase(gone, plan.items.end());
        waiting.count(victim->adapter, -1);
        pool.release(*victim);
        victim->computed = victim->placeholders = 0;
        victim->preempted = true;
        ++victim->preemptions;
        waiting.requeue(victim);
        plan.preempted.push_back(victim);
    }

    bool has_room(const Plan& plan) const {
        return plan.budget > 0 && static_cast<Int>(running.size()) < config_.max_num_seqs;
    }

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
        pool.lookup(*state);
        const Int found = static_cast<Int>(pool.found.size()), computed = found * config_.block_size;
        const Int wanted = chunk(state->tokens() - computed, threshold, state->tokens());
        const Int tokens = std::min(wanted, plan.budget);
        plan.stopped = (wanted > plan.budget && !config_.enable_chunked_prefill) || !blocks_fit(*state, computed + tokens);
        if (plan.stopped) return false;
        pool.grow(*state, computed + tokens, true);
        state->computed = computed;
        running.push_back(state);
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

    void advance(Item& item, Plan& plan) {
        State& state = *item.state;
        plan.tokens += item.tokens;
        state.computed += item.tokens;
        item.samples = state.computed == state.tokens() + state.placeholders;
        plan.sampled += item.samples;
        state.placeholders += item.samples && config_.async_scheduling;
    }

    const Config config_;
    std::vector<std::pair<Line::iterator, Line::iterator>> heads_;
    Int watermark_blocks_;
};

}  // namespace replay
