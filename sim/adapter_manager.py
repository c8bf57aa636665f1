"""Which adapters are in host memory (`max_cpu_loras`) and in GPU slots (`max_loras`).

Rules: vLLM `lora/worker_manager.py` and `lora/model_manager.py` (`LRUCacheWorkerLoRAManager`,
`LRUCacheLoRAModelManager`). The manager decides; the engine carries the moves out and pays for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from sim.errors import AdapterError
from sim.eviction import EVICTION, AdapterCache


@dataclass(frozen=True, slots=True)
class Move:
    """One change of residency of `adapter`.

    `kind`: stage (read from disk), keep (now in host memory), drop (from host memory), load (host memory → `slot`),
    evict (from `slot`).
    """

    kind: str
    adapter: int
    slot: int = -1


class AdapterManager:
    """Two caches, GPU within host: what is dropped from host memory leaves its slot, too. The base model needs none.

    `moves`: what happened since `take()` was called last, also where an operation failed half-way.
    """

    def __init__(
        self,
        max_loras: int,
        max_cpu_loras: int,
        eviction: str = "lru",
        cost: Callable[[int], float] = lambda _: 1.0,
    ) -> None:
        self.max_loras = max_loras
        self.host = AdapterCache(max_cpu_loras, EVICTION[eviction], cost)
        self.gpu = AdapterCache(max_loras, EVICTION[eviction], cost)
        self.slots: dict[int, int] = {}
        self.moves: list[Move] = []
        self._free = list(range(max_loras))

    def take(self) -> list[Move]:
        """The moves since the last call."""
        moves, self.moves = self.moves, []
        return moves

    def apply(self, adapters: Collection[int]) -> None:
        """Bring a step's adapters in, one after the other (`_apply_adapters`)."""
        if len(adapters) > self.max_loras:
            raise AdapterError(f"a step uses {len(adapters)} adapters, max_loras is {self.max_loras}")
        needed = adapters if self.host.eviction.protects_step else ()
        for adapter in adapters:
            self.bring(adapter, needed)

    def bring(self, adapter: int, needed: Collection[int] = ()) -> None:
        """Bring one adapter into host memory and a slot, or note its use (`add_adapter`).

        `needed`: adapters that must not be evicted for it.
        """
        if adapter in self.host.entries:
            self.host.touch(adapter)
        else:
            self._stage(adapter, needed)
        if adapter in self.gpu.entries:
            self.gpu.touch(adapter)
        else:
            self._load(adapter, needed)

    def _stage(self, adapter: int, needed: Collection[int]) -> None:
        self._note("stage", adapter)
        if self.host.full:
            victim = self.host.victim(needed)
            self._drop(victim)
            if victim in self.slots:
                self._evict(victim)
        self.host.add(adapter)
        self._note("keep", adapter)

    def _load(self, adapter: int, needed: Collection[int]) -> None:
        if self.gpu.full:
            self._evict(self.gpu.victim(needed))
        slot = min(self._free)
        self._free.remove(slot)
        self.slots[adapter] = slot
        self.gpu.add(adapter)
        self._note("load", adapter, slot)

    def _drop(self, adapter: int) -> None:
        self.host.remove(adapter)
        self._note("drop", adapter)

    def _evict(self, adapter: int) -> None:
        slot = self.slots.pop(adapter)
        self._free.append(slot)
        self.gpu.remove(adapter)
        self._note("evict", adapter, slot)

    def _note(self, kind: str, adapter: int, slot: int = -1) -> None:
        self.moves.append(Move(kind, adapter, slot))

    def pin(self, adapter: int) -> None:
        """Never evict `adapter`, which must be in host memory; it gets a slot if it has none (`pin_adapter`)."""
        if adapter not in self.host.entries:
            raise AdapterError(f"adapter {adapter} is not in host memory, only what is there can be pinned")
        self.host.pinned.add(adapter)
        if adapter not in self.gpu.entries:
            self._load(adapter, ())
        self.gpu.pinned.add(adapter)

    def remove(self, adapter: int) -> bool:
        """Take `adapter` out of its slot and of host memory, pinned or not; False if it is not there."""
        if adapter not in self.host.entries:
            return False
        if adapter in self.slots:
            self._evict(adapter)
        self._drop(adapter)
        return True

    def clear(self) -> None:
        """Take everything out, the longest unused first (`remove_all_adapters`)."""
        for adapter in list(self.host.entries):
            self._drop(adapter)
            if adapter in self.slots:
                self._evict(adapter)


class PlainAdapterManager(AdapterManager):
    """vLLM's manager without LRU (`WorkerLoRAManager`): each step's adapters replace everything; nothing can be pinned.

    vLLM's model runner does not use it; it is here so that logs made with it can be checked.
    """

    def apply(self, adapters: Collection[int]) -> None:
        """Remove what is not asked for, then bring in what is missing."""
        if len(adapters) > self.max_loras:
            raise AdapterError(f"a step uses {len(adapters)} adapters, max_loras is {self.max_loras}")
        # vLLM walks the differences of two sets of ids, so their order is that of Python's set of int.
        wanted, present = set(adapters), set(self.host.entries)
        for adapter in present - wanted:
            self.remove(adapter)
        for adapter in wanted - present:
            self.bring(adapter)

    def bring(self, adapter: int, needed: Iterable[int] = ()) -> None:
        """Bring one adapter in; raises `AdapterError` if host memory or the slots are full."""
        del needed
        if adapter in self.host.entries:
            return
        self._note("stage", adapter)
        if self.host.full:
            raise AdapterError(f"no room for adapter {adapter} in host memory")
        self.host.add(adapter)
        self._note("keep", adapter)
        if self.gpu.full:
            raise AdapterError(f"no free slot for adapter {adapter}")
        self._load(adapter, ())
