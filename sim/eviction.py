"""Which adapter leaves a full cache (GPU slots, or host memory). Each policy is one function.

`lru` is vLLM's (`vllm/utils/cache.py`, `LRUCache`). Like vLLM it protects nobody: bringing one adapter of a step in may
throw out another that the same step needs. The other policies never evict an adapter that the step needs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from sim.errors import AdapterError


@dataclass(slots=True)
class Entry:
    """An adapter in a cache: the how many'th load brought it, steps that used it since, and `cost_aware`'s score.

    `cost`: what bringing it back costs, in any unit.
    """

    adapter: int
    loaded: int
    cost: float
    uses: int = 0
    score: float = 0.0


def least_recently_used(entries: Iterable[Entry]) -> Entry:
    """The entry unused for longest; `entries` come in that order."""
    return next(iter(entries))


def first_in(entries: Iterable[Entry]) -> Entry:
    """The entry that was brought in first, used or not."""
    return min(entries, key=lambda e: e.loaded)


def least_frequently_used(entries: Iterable[Entry]) -> Entry:
    """The entry that fewest steps have used since it came; of equals the one unused for longest."""
    return min(entries, key=lambda e: e.uses)


def cost_aware(entries: Iterable[Entry]) -> Entry:
    """The entry with the lowest score: uses x cost of bringing it back, above what was evicted before.

    GreedyDual with frequency (Young 1994; Cherkasova 1998, GDSF): the floor rises with each eviction, so that old fame
    fades. All slots have one size, so cost is not divided by it.
    """
    return min(entries, key=lambda e: e.score)


@dataclass(frozen=True, slots=True)
class Eviction:
    """A policy: how it chooses, and whether the adapters that a step needs are safe from it."""

    choose: Callable[[Iterable[Entry]], Entry]
    protects_step: bool = True


EVICTION: Mapping[str, Eviction] = {
    "lru": Eviction(least_recently_used, protects_step=False),
    "lru_protected": Eviction(least_recently_used),
    "fifo": Eviction(first_in),
    "lfu": Eviction(least_frequently_used),
    "cost_aware": Eviction(cost_aware),
}
"""`engine.lora_eviction_policy` by name."""


@dataclass(slots=True)
class AdapterCache:
    """One level of adapter memory: at most `capacity` adapters, from longest to shortest unused."""

    capacity: int
    eviction: Eviction
    cost: Callable[[int], float]
    entries: OrderedDict[int, Entry] = field(default_factory=OrderedDict)
    pinned: set[int] = field(default_factory=set)
    _floor: float = 0.0
    _loads: int = 0

    @property
    def full(self) -> bool:
        return len(self.entries) >= self.capacity

    def add(self, adapter: int) -> None:
        """Bring `adapter` in; the caller has made room."""
        self._loads += 1
        self.entries[adapter] = Entry(adapter, self._loads, self.cost(adapter))
        self.touch(adapter)

    def touch(self, adapter: int) -> None:
        """A step uses `adapter`."""
        entry = self.entries[adapter]
        entry.uses += 1
        entry.score = self._floor + entry.uses * entry.cost
        self.entries.move_to_end(adapter)

    def remove(self, adapter: int) -> None:
        """`adapter` leaves, and is no longer pinned."""
        del self.entries[adapter]
        self.pinned.discard(adapter)

    def victim(self, needed: Collection[int]) -> int:
        """The adapter to evict next: never a pinned one, nor one of the `needed`."""
        kept = self.pinned.union(needed) if needed else self.pinned
        free = (
            [entry for entry in self.entries.values() if entry.adapter not in kept] if kept else self.entries.values()
        )
        if not free:
            raise AdapterError(f"all {len(self.entries)} adapters in a full cache are pinned or needed in this step")
        victim = self.eviction.choose(free)
        self._floor = max(self._floor, victim.score)
        return victim.adapter
