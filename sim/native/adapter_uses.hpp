// How often steps used each adapter (sim/tables.py, AdapterUse), and which longest ago.
#pragma once

#include <algorithm>
#include <tuple>

#include "records.hpp"

namespace replay {

// An adapter whose requests decode in lockstep is used by every plan from one on to another, so the plans are counted at the end.
// Only who loads an adapter wants to know which were used longest ago: until then it is noted when each was used last.
class AdapterUses {
  public:
    AdapterUses(const Adapters& adapters, bool set_order)
        : table(adapters.rank.size()), order_(set_order ? &adapters.order : nullptr), last_(adapters.rank.size()),
          since_(adapters.rank.size(), 0) {}

    std::vector<Use> table;  // without what goes on

    // Every plan after `plan` uses it, until it ends with another.
    void begin(Int adapter, Int plan) { since_[adapter] = plan; }
    void end(Int adapter, Int plan) {
        if (adapter == BASE) return;
        table[adapter].step_uses += plan - since_[adapter];
        table[adapter].hits += plan - since_[adapter];
    }
    // A plan uses it beside those.
    void count(Int adapter, bool hit) {
        ++table[adapter].step_uses;
        table[adapter].hits += hit;
    }
    Int going_on(Int adapter, Int plan) const { return plan - since_[adapter]; }

    // A request in `seat` used it in `plan`.
    void touch(Int adapter, Int plan, Int seat) {
        Last& last = last_[adapter];
        if (adapter == BASE || plan <= known_) return;
        if (last.plan <= known_) touched_.push_back(adapter);
        if (last.plan < plan) last = {plan, seat};
        else last.seat = std::min(last.seat, seat);
    }

    // Adapters used since `known` was called, longest unused first.
    const std::vector<Int>& in_order() {
        const auto when = [&](Int a) { return std::make_tuple(last_[a].plan, order_ ? (*order_)[a] : 0, last_[a].seat); };
        std::sort(touched_.begin(), touched_.end(), [&](Int a, Int b) { return when(a) < when(b); });
        return touched_;
    }
    // Somebody else knows the order of all uses up to `plan`.
    void known(Int plan) {
        known_ = plan;
        touched_.clear();
    }

  private:
    struct Last { Int plan = 0, seat = 0; };
    const std::vector<Int>* order_;  // by adapter; none: as the requests come
    std::vector<Last> last_;
    std::vector<Int> since_, touched_;
    Int known_ = 0;
};

}  // namespace replay
