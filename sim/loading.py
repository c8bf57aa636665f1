"""Overlapped adapter loading: loads take their time beside the steps instead of inside them.

As SGLang's `--enable-lora-overlap-loading` (`lora/lora_overlap_loader.py`): a request is admitted once its adapter has
arrived; until then the engine goes on with the others. Loads go one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import simpy

from sim.adapter_manager import AdapterManager, Move
from sim.state import RequestState


class LoadLane:
    """The adapters on their way. `carry_out` has the backend do a move that begins at a time, and returns its seconds."""

    def __init__(
        self, env: simpy.Environment, manager: AdapterManager, carry_out: Callable[[Move, float], float]
    ) -> None:
        self.env = env
        self.manager = manager
        self.carry_out = carry_out
        self.loading: set[int] = set()
        self.arrived = env.event()
        self._free_at = 0.0

    def resident(self) -> set[int]:
        """The adapters that a step can use now."""
        return self.manager.slots.keys() - self.loading

    def start(self, awaiting: Iterable[RequestState], running: Iterable[int]) -> list[Move]:
        """Start loading for the `awaiting` requests, in order, as far as slots go that nobody needs."""
        kept = set(running) | self.loading | self.manager.gpu.pinned
        moves: list[Move] = []
        for state in awaiting:
            if state.adapter in kept:
                continue
            if len(kept) == self.manager.max_loras:
                break
            kept.add(state.adapter)
            moves += self._load(state.adapter, kept)
        return moves

    def _load(self, adapter: int, kept: set[int]) -> list[Move]:
        self.manager.bring(adapter, kept)
        moves = self.manager.take()
        self._free_at = max(self._free_at, self.env.now)
        for move in moves:
            self._free_at += self.carry_out(move, self._free_at)
        self.loading.add(adapter)
        self.env.process(self._arrive(adapter, self._free_at - self.env.now))
        return moves

    def _arrive(self, adapter: int, seconds: float) -> Generator[simpy.Event, Any, None]:
        yield self.env.timeout(seconds)
        self.loading.remove(adapter)
        self.arrived.succeed()
        self.arrived = self.env.event()
