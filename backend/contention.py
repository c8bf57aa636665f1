"""What a decode step and an adapter load cost each other when a load runs beside the steps, over a link and memory they share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import pandas as pd

from backend.base import NO_SLOT, AdapterShape, StepBatch
from backend.errors import BackendError

if TYPE_CHECKING:
    from backend.compositions import Room
    from backend.live import LiveBackend

REPEATS = 9
EAGER = "6144 prompt tokens"
"""The kind of step measured that no graph is captured for."""

ADAPTERS = 4
"""Adapters that are copied beside a step in turn, until it is over."""


@dataclass(frozen=True, slots=True)
class Contention:
    """Factors on the seconds of a step while a load runs, and on those of a load while steps run; 1: not measured.

    `eager`: of steps of more than `captured_rows` rows, whose launches go over the link that a load keeps busy.
    """

    step: float = 1.0
    eager: float = 1.0
    load: float = 1.0
    captured_rows: int = 0

    def __post_init__(self) -> None:
        factors = self.step, self.eager, self.load
        if not all(0 < factor < float("inf") for factor in factors):
            raise BackendError(f"contention: step, eager and load must be positive factors, are {factors}")

    def of_step(self, rows: int) -> float:
        """The factor on a step of `rows` rows."""
        return self.step if rows <= self.captured_rows else self.eager

    @classmethod
    def of(cls, meta: Mapping[str, Any], captured_rows: int) -> Contention:
        """Of a profile's facts. Raises `BackendError` if it has some that are none."""
        found = meta.get("contention")
        if found is None:
            return cls()
        try:
            return cls(float(found["step"]), float(found["eager"]), float(found["load"]), captured_rows)
        except (KeyError, TypeError, ValueError) as error:
            raise BackendError(f"profile: contention must have step, eager and load ({error})") from error


def measure_contention(backend: LiveBackend, room: Room, modules: tuple[str, ...]) -> pd.DataFrame:
    """On CUDA: `kind, step_ms, step_beside_ms, load_ms, load_beside_ms`, medians; device time of steps, copies on a stream
    of their own into slots that the step does not use.
    """
    import torch

    from backend.compositions import again, compose

    rank, slots = max(room.slots_of_rank.items())
    adapters = [AdapterShape(20_000 + i, rank, modules) for i in range(ADAPTERS)]
    for adapter in adapters:
        backend.stage(adapter)
    packed = [backend.store.packed(adapter.adapter_id) for adapter in adapters]
    bank, side = backend.decoder.bank, torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def copy(count: int) -> Callable[[], float]:
        """Starts copies; returns what tells their milliseconds once they are done."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            begin.record()
            for i in range(count):
                one = packed[i % ADAPTERS]
                bank.weights[slots[-1 - i % ADAPTERS], : len(one)].copy_(one, non_blocking=True)
            end.record()

        def taken_ms() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end))

        return taken_ms

    def medians_ms(batch: StepBatch, copies: int) -> tuple[float, float, float]:
        """Of the step alone, of the step beside so many copies, and of the copies, in turns: a GPU that rested is faster."""
        alone, beside, copied = [], [], []
        for _ in range(REPEATS):
            waiting = copy(copies)
            beside.append(backend.execute(again(batch)).device_s * 1e3)
            copied.append(waiting())
            alone.append(backend.execute(again(batch)).device_s * 1e3)
            time.sleep(max(0.0, copied[-1] - beside[-1]) * 1e-3)
        return median(alone), median(beside), median(copied)

    load_ms = median(copy(1)() for _ in range(REPEATS))
    others, rows = [s for r, s in _pairs(room) if r != rank], []
    for kind, query, context in (
        ("32 decodes", [1] * 32, 500),
        ("256 decodes", [1] * 256, 500),
        ("2048 prompt tokens", [512] * 4, 0),
        (EAGER, [1536] * 4, 0),
    ):
        used = [others[i % len(others)] for i in range(len(query))] if others else [NO_SLOT] * len(query)
        batch = compose(query, [context] * len(query), used, room)
        if batch is None:
            continue
        once_ms = max(backend.execute(again(batch)).device_s for _ in range(2)) * 1e3
        step, beside, _ = medians_ms(batch, 1 + math.ceil(1.5 * once_ms / load_ms))
        _, _, one = medians_ms(batch, 1)
        rows.append((kind, step, beside, load_ms, one))
    for adapter in adapters:
        backend.drop(adapter.adapter_id)
    return pd.DataFrame(rows, columns=["kind", "step_ms", "step_beside_ms", "load_ms", "load_beside_ms"])


def _pairs(room: Room) -> list[tuple[int, int]]:
    return [(rank, slot) for rank, slots in room.slots_of_rank.items() for slot in slots[:8]]


def facts(table: pd.DataFrame) -> dict[str, object]:
    """What a profile keeps: the factors, medians over the kinds of step, and the rows."""
    slower, eager = table["step_beside_ms"] / table["step_ms"], table["kind"] == EAGER
    return {
        "step": float(slower[~eager].median()),
        "eager": float(slower[eager].median()),
        "load": float((table["load_beside_ms"] / table["load_ms"]).median()),
        "rows": table.round(4).to_dict("records"),
    }
