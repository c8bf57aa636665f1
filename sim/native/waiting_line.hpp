// The requests that wait (sim/waiting.py, `fcfs` and `priority`), and how often each was passed over for its adapter.
#pragma once

#include <set>

#include "records.hpp"

namespace replay {

// Smallest first: by priority and arrival, or by place in line.
struct WaitingOrder {
    bool priority;
    bool operator()(const State* a, const State* b) const {
        if (!priority) return a->place < b->place;
        if (a->priority != b->priority) return a->priority < b->priority;
        if (a->arrival_s != b->arrival_s) return a->arrival_s < b->arrival_s;
        return a->row < b->row;
    }
};

using Line = std::set<State*, WaitingOrder>;

// One line of all, and one of each adapter: where all slots are taken, only the lines of adapters that run are looked at.
// A step that comes to the end of the line passes over all requests of all other adapters; such steps are counted once, and
// each request takes the difference when it leaves.
class WaitingLine {
  public:
    WaitingLine(bool priority, Int adapters, const std::vector<Int>& pinned)
        : all(WaitingOrder{priority}), adapters_(static_cast<std::size_t>(adapters) + 1, PerAdapter(priority)) {
        for (Int a : pinned) {
            adapters_[a].pinned = true;
            running_.insert(a);
        }
    }

    Line all;

    void add(State* state) { enqueue(state, ++last_place_); }
    void requeue(State* state) { enqueue(state, --first_place_); }
    void remove(State* state) {
        all.erase(state);
        line(state->adapter).erase(state);
        state->skips = skips(*state);
        state->waiting = false;
    }

    // Running requests of an adapter come or go; a pinned adapter counts as running for ever.
    void count(Int adapter, Int change) {
        if (adapter == BASE) return;
        PerAdapter& a = adapters_[adapter];
        const bool before = a.users > 0 || a.pinned;
        a.users += change;
        const bool after = a.users > 0 || a.pinned;
        if (after && !before) {
            a.passes += passes_ - a.since;
            running_.insert(adapter);
        } else if (before && !after) {
            a.since = passes_;
            running_.erase(adapter);
        }
    }
    bool runs(Int adapter) const { return adapter == BASE || adapters_[adapter].users > 0 || adapters_[adapter].pinned; }
    Int distinct() const { return static_cast<Int>(running_.size()); }
    const std::set<Int>& running() const { return running_; }
    Line& line(Int adapter) { return adapters_[adapter].line; }

    // `steps` steps pass over all requests of adapters that do not run; returns how many requests those are.
    Int pass(Int steps) {
        passes_ += steps;
        Int kept = static_cast<Int>(line(BASE).size());
        for (Int a : running_) kept += static_cast<Int>(line(a).size());
        return static_cast<Int>(all.size()) - kept;
    }
    Int skips(const State& state) const {
        return state.skips + (state.waiting ? passes(state.adapter) - state.passes : 0);
    }

  private:
    struct PerAdapter {
        explicit PerAdapter(bool priority) : line(WaitingOrder{priority}) {}
        Line line;
        Int users = 0, passes = 0, since = 0;
        bool pinned = false;
    };
    Int passes(Int adapter) const {
        const PerAdapter& a = adapters_[adapter];
        return runs(adapter) ? a.passes : a.passes + passes_ - a.since;
    }
    void enqueue(State* state, Int place) {
        state->place = place;
        state->waiting = true;
        state->passes = passes(state->adapter);
        all.insert(state);
        line(state->adapter).insert(state);
    }

    std::vector<PerAdapter> adapters_;
    std::set<Int> running_;
    Int passes_ = 0, first_place_ = 0, last_place_ = 0;
};

}  // namespace replay
