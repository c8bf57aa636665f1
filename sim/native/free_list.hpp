// The blocks that nobody holds, in the order in which they are given out, and those that can be found by what is in them.
#pragma once

#include <unordered_map>

#include "records.hpp"

namespace replay {

// What identifies the tokens of a block of a common beginning.
struct SharedKey {
    Int adapter, prefix, index;
    bool operator==(const SharedKey& o) const { return adapter == o.adapter && prefix == o.prefix && index == o.index; }
};

struct SharedKeyHash {
    std::size_t operator()(const SharedKey& k) const {
        std::uint64_t h = 0x9E3779B97F4A7C15ull;
        for (std::uint64_t part : {std::uint64_t(k.adapter), std::uint64_t(k.prefix), std::uint64_t(k.index)}) {
            h = (h ^ part) * 0xBF58476D1CE4E5B9ull;
            h ^= h >> 29;
        }
        return static_cast<std::size_t>(h);
    }
};

// A ring of runs of blocks around the entry 0: those that nobody can find lie in runs of any length, each findable one is a run
// of its own, also while it is held.
class FreeList {
  public:
    explicit FreeList(Int blocks) : runs_(1) {
        runs_[0].before = runs_[0].after = 0;
        front(blocks);
    }

    Int size() const { return size_; }
    Int holders(int run) const { return runs_[run].holders; }

    // Blocks that cannot be found come back.
    void front(Int count) { add(count, runs_[0].after, 0, runs_[0].after); }
    void back(Int count) { add(count, runs_[0].before, runs_[0].before, 0); }

    // The first `count` blocks are held from now on, and can no longer be found.
    void take(Int count) {
        size_ -= count;
        while (count > 0) {
            const int first = runs_[0].after;
            Run& run = runs_[first];
            const Int taken = std::min(count, run.count);
            count -= taken;
            run.count -= taken;
            if (run.count > 0) break;
            if (run.index >= 0) forget(first);
            unlink(first);
            spare_.push_back(first);
        }
    }

    // The oldest copy of a block: of a common beginning, or of a request's own (`prefix` -1); or -1.
    int find(const State& state, Int index, Int prefix) const {
        if (prefix < 0) {
            const Findable* of = state.findable.get();
            return of != nullptr && index < static_cast<Int>(of->own.size()) ? of->own[index] : -1;
        }
        const auto at = shared_.find({state.adapter, prefix, index});
        return at == shared_.end() ? -1 : at->second;
    }

    // One more request holds a findable block.
    void hold(int run) {
        if (runs_[run].holders++ > 0) return;
        unlink(run);
        --size_;
    }

    // One request less holds it; the last one leaves it at the end.
    void let_go(int run) {
        if (--runs_[run].holders > 0) return;
        if (const State* own = runs_[run].own; own != nullptr && own->done) {
            spare_.push_back(run);
            back(1);
            return;
        }
        link(runs_[0].before, run, 0);
        ++size_;
    }

    // A block of a common beginning that a request holds can be found from now on.
    int publish(State& state, Int index, Int prefix) {
        const int run = fresh();
        runs_[run].index = index;
        runs_[run].holders = 1;
        if (keys_.size() < runs_.size()) keys_.resize(runs_.size());
        keys_[run] = {state.adapter, prefix, index};
        enter(run, shared_.try_emplace(keys_[run], -1).first->second);
        return run;
    }

    // A request's own full block comes back, and it may come back for it.
    void back_own(State& state, Int index) {
        if (!state.findable) state.findable = std::make_unique<Findable>();
        std::vector<int>& own = state.findable->own;
        if (index >= static_cast<Int>(own.size())) own.resize(index + 1, -1);
        const int run = fresh();
        runs_[run].index = index;
        runs_[run].own = &state;
        enter(run, own[index]);
        link(runs_[0].before, run, 0);
        ++size_;
    }

  private:
    struct Run {
        int before = -1, after = -1;
        int older = -1, newer = -1;  // in the ring of copies of one findable block
        Int count = 1;
        Int holders = 0;
        Int index = -1;        // which block of a request it is; -1: it cannot be found
        State* own = nullptr;  // the request whose own block it is, or none: it has a key in `keys_`
    };

    int fresh() {
        if (spare_.empty()) {
            runs_.emplace_back();
            return static_cast<int>(runs_.size()) - 1;
        }
        const int run = spare_.back();
        spare_.pop_back();
        runs_[run] = Run{};
        return run;
    }
    // To the run `beside`, if its blocks cannot be found either, else as a run of their own.
    void add(Int count, int beside, int before, int after) {
        if (count == 0) return;
        size_ += count;
        if (beside != 0 && runs_[beside].index < 0) {
            runs_[beside].count += count;
            return;
        }
        const int run = fresh();
        runs_[run].count = count;
        link(before, run, after);
    }

    void link(int before, int run, int after) {
        runs_[run].before = before;
        runs_[run].after = after;
        runs_[before].after = run;
        runs_[after].before = run;
    }
    void unlink(int run) {
        runs_[runs_[run].before].after = runs_[run].after;
        runs_[runs_[run].after].before = runs_[run].before;
    }

    // As the newest copy; `first` is the oldest.
    void enter(int run, int& first) {
        if (first < 0) {
            first = runs_[run].older = runs_[run].newer = run;
            return;
        }
        const int last = runs_[first].older;
        runs_[run].older = last;
        runs_[run].newer = first;
        runs_[last].newer = run;
        runs_[first].older = run;
    }
    void forget(int run) {
        const Run& r = runs_[run];
        if (r.own != nullptr && r.own->done) return;
        const bool alone = r.newer == run;
        runs_[r.older].newer = r.newer;
        runs_[r.newer].older = r.older;
        if (r.own != nullptr) {
            int& first = r.own->findable->own[r.index];
            if (first == run) first = alone ? -1 : r.newer;
            return;
        }
        const auto at = shared_.find(keys_[run]);
        if (at->second != run) return;
        if (alone) shared_.erase(at);
        else at->second = r.newer;
    }

    Int size_ = 0;
    std::vector<Run> runs_;
    std::vector<int> spare_;  // entries of `runs_` that are none
    std::vector<SharedKey> keys_;
    std::unordered_map<SharedKey, int, SharedKeyHash> shared_;
};

}  // namespace replay
