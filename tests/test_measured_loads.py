"""Loads are measured as a run has them."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

from backend.base import AdapterShape, EngineLimits, LoadTiming, StepBatch, StepTiming
from backend.compositions import Room
from backend.live import LiveBackend
from backend.measure import RANKS, READS, STEPS_BETWEEN, measure_loads


class Recorded:
    """Notes what it is asked for; its n-th move or step takes n milliseconds."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def _next(self, kind: str, what: object) -> float:
        self.asked.append((kind, what))
        return 1e-3 * len(self.asked)

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        return LoadTiming(self._next("stage", adapter), adapter.rank)

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        return LoadTiming(self._next("load", adapter), adapter.rank)

    def drop(self, adapter_id: int) -> None:
        self.asked.append(("drop", adapter_id))

    def execute(self, batch: StepBatch) -> StepTiming:
        return StepTiming(self._next("step", batch.context_lens[0]), 0.0)


def test_an_adapter_is_read_then_copied_and_steps_run_before() -> None:
    backend, repeats = Recorded(), 2
    room = Room(EngineLimits(4, 64, 8, 512, 1024, 16, 0.9), 200, {})
    table = measure_loads(cast("LiveBackend", backend), room, repeats)
    kinds = [kind for kind, _ in backend.asked]
    for at, (kind, what) in enumerate(backend.asked):
        if kind == "load":
            assert backend.asked[at - 1] == ("stage", what), "a copy follows its own read"
            assert kinds[at - 1 - STEPS_BETWEEN : at - 1] == ["step"] * STEPS_BETWEEN
    adapters = {what.adapter_id for kind, what in backend.asked if kind == "stage"}
    assert len(adapters) == len(RANKS) * (repeats + 1)
    last = Counter(what for kind, what in backend.asked if kind == "drop")
    assert last == dict.fromkeys(adapters, READS), "what is read again was dropped before, and nothing is left"
    each = READS * (repeats + 1) - 1  # the first of a rank is not timed once
    assert Counter(zip(table["kind"], table["rank"], strict=True)) == {
        (kind, rank): each for kind in ("stage", "load") for rank in RANKS
    }
