"""The LRU manager of adapters: a host cache of `max_cpu_loras`, and `max_loras` GPU slots.

Rule: vLLM `lora/worker_manager.py` and `lora/model_manager.py` (`LRUCacheWorkerLoRAManager`,
`LRUCacheLoRAModelManager`). It decides; the engine carries the moves out and pays for them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Move:
    """One change of residency. `kind`: stage (disk → host), drop (from host), load (host → slot), evict (from slot)."""

    kind: str
    adapter: int
    slot: int = -1


class AdapterManager:
    """Which adapters are in host memory and in which slots; both ordered from oldest to youngest use."""

    def __init__(self, max_loras: int, max_cpu_loras: int) -> None:
        self.max_loras = max_loras
        self.max_cpu_loras = max_cpu_loras
        self.host: OrderedDict[int, None] = OrderedDict()
        self.slots: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(max_loras))

    def apply(self, adapters: Iterable[int]) -> list[Move]:
        """Bring a step's adapters in, one after the other; returns the moves in order.

        As in vLLM nothing protects the adapters of a step from each other: bringing one in may evict one that the
        same step needs and that comes later, which is then brought in again.
        """
        moves: list[Move] = []
        for adapter in adapters:
            self._stage(adapter, moves)
            self._activate(adapter, moves)
        return moves

    def _stage(self, adapter: int, moves: list[Move]) -> None:
        if adapter in self.host:
            self.host.move_to_end(adapter)
            return
        moves.append(Move("stage", adapter))
        if len(self.host) == self.max_cpu_loras:
            oldest = next(iter(self.host))
            del self.host[oldest]
            moves.append(Move("drop", oldest))
            if oldest in self.slots:
                self._evict(oldest, moves)
        self.host[adapter] = None

    def _activate(self, adapter: int, moves: list[Move]) -> None:
        if adapter in self.slots:
            self.slots.move_to_end(adapter)
            return
        if not self._free:
            self._evict(next(iter(self.slots)), moves)
        slot = min(self._free)
        self._free.remove(slot)
        self.slots[adapter] = slot
        moves.append(Move("load", adapter, slot))

    def _evict(self, adapter: int, moves: list[Move]) -> None:
        slot = self.slots.pop(adapter)
        self._free.append(slot)
        moves.append(Move("evict", adapter, slot))
