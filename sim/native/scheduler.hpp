// Which tokens of which requests the next step computes: sim/scheduler.py, Scheduler with `fcfs` or `priority`.
#pragma once

#include <algorithm>
#include <deque>
#include <set>

#include "kv_pool.hpp"

namespace replay {

// sim/scheduler.py, Scheduled.
struct Item {
    State* state;
    Int tokens, computed, found = 0;
    bool samples = false;
};

// sim/scheduler.py, StepPlan: the first `running` items ran before, the others are admitted.
struct Plan {
    Int budget = 0, running = 0, tokens = 0;
    std::vector<Item> items;
    std::vector<State*> preempted, skipped;
    bool stopped = false;  // admission ended for want of blocks, or of budget for a whole prompt

    Int admitted() const { return static_cast<Int>(items.size()) - running; }
    void begin(Int tokens_at_most) {
        budget = tokens_at_most;
        running = tokens = 0;
        items.clear();
        preempted.clear();
        skipped.clear();
        stopped = false;
    }
};

// Smallest first (sim/waiting.py): by priority and arrival, or by place in line.
struct WaitingOrder {
    bool priority;
    bool operator()(const State* a, const State* b) const {
        if (!priority) return a->place < b->place;
        if (a->priority != b->priority) return a->priority < b->priority;
        if (a->arrival_s != b->arrival_s) return a->arrival_s < b->arrival_s;
        return a->row < b->row;
    }
};

class Scheduler {
  public:
    Scheduler(const Config& config, Int adapters, const std::vector<Int>& pinned)
        : pool(config.num_gpu_blocks, config.block_size, config.enable_prefix_caching),
          waiting(WaitingOrder{config.priority}), config_(config), uses_(adapters + 1, 0), pinned_(adapters + 1, 0),
          watermark_blocks_(static_cast<Int>(config.watermark * static_cast<double>(pool.total + 1))) {
        for (Int a : pinned) {
            pinned_[a] = 1;
            ++distinct_;
        }
    }

    KvPool pool;
    std::set<State*, WaitingOrder> waiting;
    std::vector<State*> running;

    void add(State* state) { enqueue(state, ++last_place_); }

    void schedule(Plan& plan) {
        plan.begin(config_.max_num_batched_tokens);
        const bool alone = running.size() + waiting.size() <= 1;
        const Int threshold = alone ? 0 : config_.long_prefill_token_threshold;
        schedule_running(plan, threshold);
        plan.running = static_cast<Int>(plan.items.size());
        if (plan.preempted.empty()) admit(plan, threshold);
        for (Item& item : plan.items) advance(item, plan);
    }

    // Applies a step's outcome; fills `finished`.
    void update(const Plan& plan, std::vector<State*>& finished) {
        finished.clear();
        for (const Item& item : plan.items) {
            State& state = *item.state;
            if (!item.samples || state.done) continue;
            ++state.emitted;
            if (state.placeholders && !state.preempted) {
                --state.placeholders;
                pool.register_full(state, state.computed - state.placeholders);
            }
            if (state.emitted >= state.limit) finished.push_back(&state);
        }
        for (State* state : finished)
            if (state->preempted) dequeue(state);
        for (State* state : finished) {
            state->done = true;
            pool.release(*state);
            if (!state->preempted) count(state->adapter, -1);
        }
        if (!finished.empty())
            running.erase(std::remove_if(running.begin(), running.end(), [](State* s) { return s->done; }), running.end());
    }

  private:
    void enqueue(State* state, Int place) {
        state->place = place;
        state->waiting = true;
        waiting.insert(state);
    }
    void dequeue(State* state) {
        waiting.erase(state);
        state->waiting = false;
    }
    // Adapters of running requests; `distinct_` counts them and the pinned ones.
    void count(Int adapter, Int change) {
        if (adapter == BASE) return;
        const bool before = uses_[adapter] > 0 || pinned_[adapter];
        uses_[adapter] += change;
        distinct_ += (uses_[adapter] > 0 || pinned_[adapter]) - before;
    }

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
        count(victim->adapter, -1);
        pool.release(*victim);
        victim->computed = victim->placeholders = 0;
        victim->preempted = true;
        ++victim->preemptions;
        enqueue(victim, --first_place_);
        plan.preempted.push_back(victim);
    }

    void admit(Plan& plan, Int threshold) {
        for (State* state : waiting) {
            if (!(plan.budget > 0 && static_cast<Int>(running.size()) < config_.max_num_seqs)) break;
            const Int adapter = state->adapter;
            if (adapter != BASE && !uses_[adapter] && !pinned_[adapter] && distinct_ == config_.max_loras) {
                plan.skipped.push_back(state);
                continue;
            }
            pool.lookup(*state);
            const Int found = static_cast<Int>(pool.found.size()), computed = found * config_.block_size;
            const Int wanted = chunk(state->tokens() - computed, threshold, state->tokens());
            plan.stopped = wanted > plan.budget && !config_.enable_chunked_prefill;
            if (plan.stopped) break;
            const Int tokens = std::min(wanted, plan.budget);
            plan.stopped = !blocks_fit(*state, computed + tokens);
            if (plan.stopped) break;
            pool.grow(*state, computed + tokens, true);
            state->computed = computed;
            running.push_back(state);
            count(adapter, 1);
            plan.items.push_back({state, tokens, computed, computed});
            plan.budget -= tokens;
            state->preempted = false;
        }
        for (Int i = plan.running; i < static_cast<Int>(plan.items.size()); ++i) dequeue(plan.items[i].state);
        for (State* state : plan.skipped) ++state->skips;
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
        state.placeholders += item.samples && config_.async_scheduling;
    }

    const Config config_;
    std::vector<Int> uses_;
    std::vector<char> pinned_;
    Int distinct_ = 0, first_place_ = 0, last_place_ = 0;
    Int watermark_blocks_;
};

}  // namespace replay
