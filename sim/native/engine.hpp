// One engine on a clock of its own: sim/replica.py, Replica.
#pragma once

#include <memory>

#include "adapter_slots.hpp"
#include "scheduler.hpp"
#include "step_costs.hpp"

namespace replay {

// A step that was handed to the GPU.
struct Flight {
    bool there = false;
    Plan plan;
    StepRow row{};
    double end_s = 0;
};

class Engine {
  public:
    Engine(Config config, std::shared_ptr<const Requests> requests, std::shared_ptr<const Adapters> adapters,
           std::shared_ptr<const StepCosts> costs, const std::vector<Int>& pinned, const std::vector<Int>& registered,
           Int keep_rows, double now_s)
        : config(config), scheduler(config, adapters->count(), pinned),
          slots(config.max_loras, config.max_cpu_loras, adapters->count()), uses(adapters->count() + 1), now_s(now_s),
          requests_(std::move(requests)), adapters_(std::move(adapters)), costs_(std::move(costs)), sum_(costs_->sizes),
          keep_rows_(keep_rows), stamp_(this->adapters_->count() + 1, 0), lora_rows_(this->adapters_->count() + 1, 0) {
        for (Int a : registered) slots.bring(a);
        carry_out(true);
        std::fill(uses.begin(), uses.end(), Use{});
        moves.clear();
        for (Int a : pinned) {
            slots.bring(a);
            slots.pin(a);
        }
        carry_out(true);
    }

    const Config config;
    Scheduler scheduler;
    AdapterSlots slots;
    std::deque<State> states;
    std::vector<StepRow> rows;
    std::vector<MoveRow> moves;
    std::vector<Use> uses;
    Totals totals;
    double now_s;  // of the last thing that happened
    Int finished = 0;

    // Whether nothing is left to do until a request arrives.
    bool idle() const { return !planning_ && !landing_; }
    // When the step in the air lands; `now_s` if the next thing is a plan.
    double next_s() const { return landing_ ? land_s_ : now_s; }

    Int add(Int row, double at_s) {
        const Requests& r = *requests_;
        states.push_back({row, r.prompt_tokens[row], r.limit[row], r.adapter[row], r.priority[row], r.arrival_s[row]});
        State& state = states.back();
        if (config.enable_prefix_caching && r.prefix_id[row] >= 0)
            state.findable = std::make_unique<Findable>(Findable{r.prefix(row), {}, {}});
        scheduler.waiting.add(&state);
        steady_ = false;
        if (idle()) {
            now_s = at_s;
            planning_ = true;
        }
        return static_cast<Int>(states.size()) - 1;
    }

    // Play until `until_s`. What lands at that instant has landed then; a plan waits for what else happens at it, unless
    // it is the `last` one.
    // Returns whether it stopped because `keep_rows` rows have come together, which somebody must take first.
    bool advance(double until_s, bool last) {
        while (true) {
            if (full()) return true;
            if (landing_) {
                if (land_s_ > until_s) return false;
                now_s = land_s_;
                land(*landing_);
                landing_ = nullptr;
                planning_ = true;
            }
            if (full()) return true;
            if (!planning_ || (!last && now_s >= until_s) || now_s > until_s) return false;
            if (scheduler.running.empty() && scheduler.waiting.all.empty() && !flying_) {
                planning_ = false;
                return false;
            }
            if (steady_ && repeat(until_s, last)) continue;
            step();
        }
    }

    // Play until `at_s` and count the requests that wait or run then; -1 where rows must be taken first.
    Int look(double at_s) {
        if (advance(at_s, false)) return -1;
        return static_cast<Int>(scheduler.running.size() + scheduler.waiting.all.size());
    }

  private:
    bool full() const { return keep_rows_ > 0 && static_cast<Int>(rows.size()) >= keep_rows_; }

    void step() {
        Flight* launched = plan_and_launch();
        const bool stuck = launched == nullptr && spare().plan.preempted.empty();
        if (config.async_scheduling) {
            landing_ = flying_;
            flying_ = launched;
        } else {
            landing_ = launched;
        }
        if (landing_) {
            planning_ = false;
            land_s_ = now_s + std::max(0.0, landing_->end_s - now_s);
        } else if (stuck) {
            throw IntegrityError("I10: the engine has requests and plans nothing");
        }
    }

    // Two flights are enough: one in the air, one being planned.
    Flight& spare() { return flying_ == &flights_[0] ? flights_[1] : flights_[0]; }

    Flight* plan_and_launch() {
        Flight& flight = spare();
        Plan& plan = flight.plan;
        scheduler.schedule(plan);
        Int cached = 0;
        for (std::size_t i = static_cast<std::size_t>(plan.running); i < plan.items.size(); ++i) {
            const Item& item = plan.items[i];
            cached += item.found;
            if (std::isnan(item.state->first_scheduled_s)) {
                item.state->first_scheduled_s = now_s;
                item.state->cached_tokens = item.found;
            }
        }
        note_progress(static_cast<Int>(plan.preempted.size()), plan.sampled);
        if (plan.tokens == 0) return nullptr;
        launch(flight, cached);
        return &flight;
    }

    // sim/integrity.py, Progress.
    void note_progress(Int preempted, Int sampled) {
        preemptions_ = sampled ? 0 : preemptions_ + preempted;
        if (preemptions_ > 1000 + 10 * config.max_num_seqs) throw LivelockError(std::to_string(preemptions_));
    }

    void launch(Flight& flight, Int cached) {
        const Plan& plan = flight.plan;
        StepRow& row = flight.row = StepRow{};
        bool plain = plan.admitted() == 0 && plan.preempted.empty() &&
                     plan.items.size() == scheduler.running.size() && plan.sampled == static_cast<Int>(plan.items.size());
        ++steps_seen_;
        used_.clear();
        sum_.begin();
        for (const Item& item : plan.items) {
            const State& state = *item.state;
            sum_.add(item.tokens, item.computed);
            if (item.computed < state.prompt) {
                row.prefill_tokens += item.tokens;
                ++row.prefill_requests;
            }
            if (state.adapter == BASE) continue;
            if (stamp_[state.adapter] != steps_seen_) {
                stamp_[state.adapter] = steps_seen_;
                lora_rows_[state.adapter] = 0;
                used_.push_back(state.adapter);
            }
            lora_rows_[state.adapter] += item.tokens;
        }
        plain = plain && plan.tokens == static_cast<Int>(plan.items.size()) && row.prefill_requests == 0;
        for (Int a : used_) sum_.adapter(lora_rows_[a], adapters_->rank[a]);
        sum_.end(config.max_loras, after_prompts_, plan.passed);
        after_prompts_ = !sum_.f.decode_only;
        if (config.set_order)
            std::stable_sort(used_.begin(), used_.end(),
                             [&](Int a, Int b) { return adapters_->order[a] < adapters_->order[b]; });
        touch();
        plain = plain && slots.moves.empty();
        for (const Move& move : slots.moves) {
            row.stages += move.kind == STAGE;
            row.activations += move.kind == LOAD;
            row.evictions += move.kind == EVICT;
        }
        const auto [stage_s, copy_s] = carry_out();
        const Timing timing = costs_->predict(sum_.f);
        row.tokens = plan.tokens;
        row.decode_requests = static_cast<Int>(plan.items.size()) - row.prefill_requests;
        row.distinct_adapters = static_cast<Int>(used_.size());
        row.admitted = plan.admitted();
        row.preempted = static_cast<Int>(plan.preempted.size());
        row.skipped = plan.passed;
        row.cached_tokens = cached;
        fly(flight, timing, stage_s, copy_s);
        steady_ = plain;
    }

    // Times of a step that is launched now (sim/replica.py says what the host and the GPU do side by side).
    void fly(Flight& flight, const Timing& timing, double stage_s, double copy_s) {
        StepRow& row = flight.row;
        row.start_s = std::max(now_s, gpu_free_s_);
        const double ready_s = std::max(now_s + stage_s + timing.host_s, gpu_free_s_);
        gpu_free_s_ = ready_s + copy_s + timing.device_s;
        flight.end_s = row.end_s = gpu_free_s_;
        row.device_s = timing.device_s;
        row.host_s = timing.host_s;
        row.load_s = stage_s + copy_s;
        row.extrapolated = timing.extrapolated;
        row.used_blocks = scheduler.pool.used();
        row.free_blocks = scheduler.pool.free();
    }

    void touch() {
        for (Int a : used_) {
            ++uses[a].step_uses;
            uses[a].hits += slots.slot[a] >= 0;
        }
        slots.apply(used_);
    }

    // Seconds of the moves that were decided: (stages, loads); `at_once`: before the start, where they take no time.
    std::pair<double, double> carry_out(bool at_once = false) {
        double stage_s = 0.0, copy_s = 0.0;
        for (const Move& move : slots.moves) {
            const double at_s = at_once ? now_s : now_s + stage_s + copy_s;
            double seconds = 0.0;
            if (move.kind == STAGE) {
                ++uses[move.adapter].stages;
                seconds = adapters_->stage_s[move.adapter];
            } else if (move.kind == LOAD) {
                ++uses[move.adapter].activations;
                seconds = adapters_->load_s[move.adapter];
            } else if (move.kind == EVICT) {
                ++uses[move.adapter].evictions;
            }
            (move.kind == LOAD ? copy_s : stage_s) += seconds;
            if (keep_rows_) moves.push_back({at_s, at_s + seconds, move.kind, move.adapter, move.slot});
        }
        slots.moves.clear();
        return {stage_s, copy_s};
    }

    void land(Flight& flight) {
        scheduler.update(flight.plan, now_s, done_);
        for (State* state : done_) state->finish_s = now_s;
        finished += static_cast<Int>(done_.size());
        if (!done_.empty()) steady_ = false;
        flight.row.finished = static_cast<Int>(done_.size());
        record(flight.row);
    }

    void record(StepRow& row) {
        row.running = static_cast<Int>(scheduler.running.size());
        row.waiting = static_cast<Int>(scheduler.waiting.all.size());
        row.step = totals.steps;
        totals.add(row);
        if (keep_rows_) rows.push_back(row);
    }

    // Many like steps at once (repeat.hpp).
    bool repeat(double until_s, bool last);
    void sort_by_remainder();
    const std::vector<int>& bucket(Int steps) const;
    void take_blocks(const std::vector<int>& fresh, Int steps);
    void catch_up(std::size_t i, Int steps);

    std::shared_ptr<const Requests> requests_;
    std::shared_ptr<const Adapters> adapters_;
    std::shared_ptr<const StepCosts> costs_;
    FeatureSum sum_;
    Int keep_rows_;
    std::vector<Int> stamp_, lora_rows_, used_;
    std::vector<State*> done_;
    std::vector<std::vector<int>> buckets_;
    std::vector<int> touched_;
    std::vector<Int> moved_;
    Flight flights_[2];
    Flight *landing_ = nullptr, *flying_ = nullptr;
    double land_s_ = 0.0, gpu_free_s_ = 0.0;
    bool planning_ = false, steady_ = false, after_prompts_ = false;
    Int preemptions_ = 0, steps_seen_ = 0;
};

}  // namespace replay
