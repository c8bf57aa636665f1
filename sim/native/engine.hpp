// One engine on a clock of its own: sim/replica.py, Replica.
#pragma once

#include <deque>
#include <memory>

#include "adapter_slots.hpp"
#include "clock.hpp"
#include "scheduler.hpp"

namespace replay {

// A step that was handed to the GPU.
struct Flight {
    Plan plan;
    StepRow row{};
};

class Engine {
  public:
    Engine(Config config, std::shared_ptr<const Requests> requests, std::shared_ptr<const Adapters> adapters,
           std::shared_ptr<const StepCosts> costs, const std::vector<Int>& pinned, const std::vector<Int>& registered,
           Int keep_rows, double now_s)
        : config(config), scheduler(config, *adapters, costs->sizes, pinned),
          slots(config.max_loras, config.max_cpu_loras, adapters->count()), clock{now_s}, requests_(std::move(requests)),
          adapters_(std::move(adapters)), costs_(std::move(costs)), keep_rows_(keep_rows),
          counted_(this->adapters_->rank.size(), 0) {
        for (Int a : registered) slots.bring(a);
        carry_out(true);
        std::fill(uses().table.begin(), uses().table.end(), Use{});
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
    Totals totals;
    Clock clock;
    Int finished = 0;

    // Whether nothing is left to do until a request arrives.
    bool idle() const { return !planning_ && !landing_; }
    // When the step in the air lands; `now_s` if the next thing is a plan.
    double next_s() const { return landing_ ? land_s_ : clock.now_s; }

    Int add(Int row, double at_s) {
        const Requests& r = *requests_;
        states.push_back({row, r.prompt_tokens[row], r.limit[row], r.adapter[row], r.priority[row], r.arrival_s[row]});
        State& state = states.back();
        if (config.enable_prefix_caching && r.prefix_id[row] >= 0)
            state.findable = std::make_unique<Findable>(Findable{r.prefix(row), {}, {}});
        scheduler.waiting.add(&state);
        nobody_fits_ = false;
        if (idle()) {
            clock.now_s = at_s;
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
                clock.now_s = land_s_;
                land(*landing_);
                landing_ = nullptr;
                planning_ = true;
            }
            if (full()) return true;
            if (!planning_ || (!last && clock.now_s >= until_s) || clock.now_s > until_s) return false;
            if (scheduler.running.empty() && scheduler.waiting.all.empty() && !flying_) {
                planning_ = false;
                return false;
            }
            if (repeat(until_s, last)) continue;
            step();
        }
    }

    // Play until `at_s` and count the requests that wait or run then; -1 where rows must be taken first.
    Int look(double at_s) {
        if (advance(at_s, false)) return -1;
        return scheduler.running.size() + static_cast<Int>(scheduler.waiting.all.size());
    }

    // What each adapter lived through so far.
    std::vector<Use> adapter_uses() const {
        std::vector<Use> out = scheduler.lockstep.uses.table;
        for (Int a = 1; a <= adapters_->count(); ++a) {
            if (scheduler.lockstep.rows.of(a) == 0) continue;
            const Int plans = scheduler.lockstep.uses.going_on(a, scheduler.lockstep.planned);
            out[a].step_uses += plans;
            out[a].hits += plans;
        }
        return out;
    }

  private:
    AdapterUses& uses() { return scheduler.lockstep.uses; }
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
        if (landing_) land_later(*landing_, clock.landed_s(landing_->row));
        else if (stuck) throw IntegrityError("I10: the engine has requests and plans nothing");
    }
    // Nothing is planned until `flight` lands.
    void land_later(Flight& flight, double at_s) {
        landing_ = &flight;
        land_s_ = at_s;
        planning_ = false;
    }

    // Two flights are enough: one in the air, one being planned.
    Flight& spare() { return flying_ == &flights_[0] ? flights_[1] : flights_[0]; }

    Flight* plan_and_launch() {
        Flight& flight = spare();
        Plan& plan = flight.plan;
        scheduler.schedule(plan, flying_ ? &flying_->plan : nullptr);
        Int cached = 0;
        for (std::size_t i = static_cast<std::size_t>(plan.running); i < plan.items.size(); ++i) {
            const Item& item = plan.items[i];
            cached += item.found;
            if (std::isnan(item.state->first_scheduled_s)) {
                item.state->first_scheduled_s = clock.now_s;
                item.state->cached_tokens = item.found;
            }
        }
        note_progress(static_cast<Int>(plan.preempted.size()), plan.sampled);
        // Whether one more request fits may change with what the cache holds, and with the budget that prompts leave.
        nobody_fits_ = plan.items.empty() && plan.preempted.empty() && !(scheduler.pool.caching && plan.stopped);
        if (plan.tokens == 0) return nullptr;
        launch(flight, cached);
        scheduler.commit(plan);
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
        const Features f = features(plan);
        bring_in(plan, f.active_adapters);
        for (const Move& move : slots.moves) {
            row.stages += move.kind == STAGE;
            row.activations += move.kind == LOAD;
            row.evictions += move.kind == EVICT;
        }
        const auto [stage_s, copy_s] = carry_out();
        for (const Item& item : plan.items) {
            if (item.computed >= item.state->prompt) continue;
            row.prefill_tokens += item.tokens;
            ++row.prefill_requests;
        }
        row.tokens = plan.tokens;
        row.decode_requests = f.requests - row.prefill_requests;
        row.distinct_adapters = f.active_adapters;
        row.admitted = plan.admitted();
        row.preempted = static_cast<Int>(plan.preempted.size());
        row.skipped = plan.passed;
        row.cached_tokens = cached;
        row.used_blocks = scheduler.pool.used();
        row.free_blocks = scheduler.pool.free();
        clock.launch(row, *costs_, costs_->predict(f), stage_s, copy_s);
        after_prompts_ = !f.decode_only;
    }

    // What the costs of the next step depend on.
    Features features(const Plan& plan) {
        Lockstep& lockstep = scheduler.lockstep;
        Features f;
        prompts_.begin();
        for (const Item& item : plan.items) {
            prompts_.add(f, item.tokens, item.computed, costs_->sizes);
            lockstep.rows.add(item.state->adapter, item.tokens);
        }
        lockstep.rows.fill(f);
        for (const Item& item : plan.items) lockstep.rows.add(item.state->adapter, -item.tokens);
        lockstep.fill(f, prompts_.decodes);
        prompts_.end(f, costs_->sizes);
        f.decode_only = f.decodes == f.requests;
        f.after_prompts = after_prompts_;
        f.skipped = plan.passed;
        f.idle_slots = f.active_adapters ? std::max<Int>(0, config.max_loras - f.active_adapters) : 0;
        return f;
    }

    // How the adapters of the next plan come in (residency.hpp).
    void bring_in(const Plan& plan, Int adapters);
    void load_last(const Plan& plan, Int number);
    void load_in_turn(const Plan& plan, Int number);
    std::pair<double, double> carry_out(bool at_once = false);

    void land(Flight& flight) {
        scheduler.update(flight.plan, clock.now_s, done_);
        for (State* state : done_) state->finish_s = clock.now_s;
        finished += static_cast<Int>(done_.size());
        if (!done_.empty()) nobody_fits_ = false;
        flight.row.finished = static_cast<Int>(done_.size());
        record(flight.row, totals);
    }

    void record(StepRow& row, Totals& totals) {
        row.running = scheduler.running.size();
        row.waiting = static_cast<Int>(scheduler.waiting.all.size());
        row.step = totals.steps;
        totals.add(row);
        if (keep_rows_) rows.push_back(row);
    }

    bool repeat(double until_s, bool last);  // many like steps at once (repeat.hpp)

    std::shared_ptr<const Requests> requests_;
    std::shared_ptr<const Adapters> adapters_;
    std::shared_ptr<const StepCosts> costs_;
    PromptSum prompts_;
    Int keep_rows_;
    std::vector<Int> counted_;  // by adapter: the number of the last plan that counted it
    std::vector<Int> used_;
    std::vector<State*> done_, filling_;
    Flight flights_[2];
    Flight *landing_ = nullptr, *flying_ = nullptr;
    double land_s_ = 0.0;
    bool planning_ = false, after_prompts_ = false;
    bool nobody_fits_ = false;  // the last plan was of the lockstep alone, and nothing has happened since
    Int preemptions_ = 0;
};

}  // namespace replay
