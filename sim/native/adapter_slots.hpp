// Which adapters are in host memory and in GPU slots: sim/adapter_manager.py, AdapterManager with `lru` eviction.
#pragma once

#include <set>

#include "records.hpp"

namespace replay {

enum Kind : Int { STAGE, KEEP, DROP, LOAD, EVICT };

struct Move { Kind kind; Int adapter, slot; };

// One level of adapter memory: a ring around entry 0, from longest to shortest unused (sim/eviction.py, AdapterCache).
class LruCache {
  public:
    LruCache(Int capacity, Int adapters) : pinned(adapters + 1, 0), capacity_(capacity), links_(adapters + 1) {}

    std::vector<char> pinned;

    bool has(Int adapter) const { return links_[adapter].in; }
    bool full() const { return size_ >= capacity_; }
    void add(Int adapter) {
        links_[adapter].in = true;
        ++size_;
        append(adapter);
    }
    void touch(Int adapter) {
        if (links_[adapter].next == 0) return;
        cut(adapter);
        append(adapter);
    }
    // Of the longest unused, those that were `used` just now move to the end; so do pinned ones, for which it is all one.
    template <class Used>
    void renew(Used used) {
        for (Int left = size_; left > 0 && (pinned[links_[0].next] || used(links_[0].next)); --left) touch(links_[0].next);
    }
    void remove(Int adapter) {
        cut(adapter);
        links_[adapter].in = false;
        pinned[adapter] = 0;
        --size_;
    }
    Int victim() const {
        for (Int a = links_[0].next; a != 0; a = links_[a].next)
            if (!pinned[a]) return a;
        throw AdapterError("all " + std::to_string(size_) + " adapters in a full cache are pinned or needed in this step");
    }

  private:
    struct Link { Int prev = 0, next = 0; bool in = false; };
    void append(Int a) {
        const Int last = links_[0].prev;
        links_[a].prev = last;
        links_[a].next = 0;
        links_[last].next = a;
        links_[0].prev = a;
    }
    void cut(Int a) {
        links_[links_[a].prev].next = links_[a].next;
        links_[links_[a].next].prev = links_[a].prev;
    }
    Int capacity_, size_ = 0;
    std::vector<Link> links_;
};

class AdapterSlots {
  public:
    AdapterSlots(Int max_loras, Int max_cpu_loras, Int adapters)
        : host(max_cpu_loras, adapters), gpu(max_loras, adapters), slot(adapters + 1, -1) {
        for (Int s = 0; s < max_loras; ++s) free_.insert(s);
    }

    LruCache host, gpu;
    std::vector<Int> slot;
    std::vector<Move> moves;

    void bring(Int adapter) {
        if (host.has(adapter)) host.touch(adapter);
        else stage(adapter);
        if (gpu.has(adapter)) gpu.touch(adapter);
        else load(adapter);
    }
    // A resident adapter was used.
    void touch(Int adapter) {
        host.touch(adapter);
        gpu.touch(adapter);
    }
    // So that neither the host's nor the GPU's longest unused is one that was `used` just now.
    template <class Used>
    void renew(Used used) {
        host.renew(used);
        gpu.renew(used);
    }
    void pin(Int adapter) {
        host.pinned[adapter] = 1;
        if (!gpu.has(adapter)) load(adapter);
        gpu.pinned[adapter] = 1;
    }

  private:
    void stage(Int adapter) {
        moves.push_back({STAGE, adapter, -1});
        if (host.full()) {
            const Int victim = host.victim();
            host.remove(victim);
            moves.push_back({DROP, victim, -1});
            if (slot[victim] >= 0) evict(victim);
        }
        host.add(adapter);
        moves.push_back({KEEP, adapter, -1});
    }
    void load(Int adapter) {
        if (gpu.full()) evict(gpu.victim());
        slot[adapter] = *free_.begin();
        free_.erase(free_.begin());
        gpu.add(adapter);
        moves.push_back({LOAD, adapter, slot[adapter]});
    }
    void evict(Int adapter) {
        moves.push_back({EVICT, adapter, slot[adapter]});
        free_.insert(slot[adapter]);
        slot[adapter] = -1;
        gpu.remove(adapter);
    }

    std::set<Int> free_;
};

}  // namespace replay
