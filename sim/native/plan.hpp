// What one step does.
#pragma once

#include "records.hpp"

namespace replay {

// sim/scheduler.py, Scheduled.
struct Item {
    State* state;
    Int tokens, computed, found = 0;
    bool samples = false;
};

// sim/scheduler.py, StepPlan: a token of each of the `decodes` requests in lockstep, and the `items` beside them, in the order of
// their seats; the first `running` of these ran before, the others are admitted.
struct Plan {
    Int number = 0;  // of those that were launched; 0: it was not
    Int budget = 0, decodes = 0, running = 0, tokens = 0, sampled = 0;
    std::vector<Item> items;
    std::vector<State*> sampling;  // who gets a token when it lands and is not counted in lockstep then
    std::vector<State*> preempted;
    std::vector<State*> skipped;  // passed over, where the line was not looked through to its end
    Int passed = 0;               // passed over, all of them
    bool to_the_end = false;      // the line was looked through, with all slots taken
    bool stopped = false;         // admission ended for want of blocks, or of budget for a whole prompt

    Int admitted() const { return static_cast<Int>(items.size()) - running; }
    void begin(Int tokens_at_most) {
        budget = tokens_at_most;
        number = 0;
        sampling.clear();
        only_lockstep();
    }
    // Nobody beside the lockstep.
    void only_lockstep() {
        decodes = running = tokens = sampled = passed = 0;
        items.clear();
        preempted.clear();
        skipped.clear();
        to_the_end = stopped = false;
    }
};

}  // namespace replay
