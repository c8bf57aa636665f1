"""Adapters read and copied among measured steps, as an engine has them: disk -> host memory -> slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from backend.base import AdapterShape, Backend

TURNS = 2
"""How often a round reads each adapter."""

SEED = 20261124
"""Of the orders in which rounds read them."""


class Move(NamedTuple):
    """A row of `loads.parquet`: `kind` stage (disk -> host) or load (host -> slot)."""

    kind: str
    rank: int
    nbytes: int
    elapsed_s: float


class LoadTurns:
    """Reads of `shapes`; `slots`: the slot that an adapter of each rank is copied into.

    How fast a processor is that others share changes from one half minute to the next: so reads lie as far apart as
    rounds are long, with steps between. Ranks are mixed, every adapter has host memory of its own, and all but the first
    reads go into memory that an adapter left, whose turn was long ago: a copy that is repeated on the spot finds its bytes
    in the processor's caches. The first read of a rank is not timed.
    """

    def __init__(self, backend: Backend, shapes: Sequence[AdapterShape], slots: Mapping[int, int]) -> None:
        self.backend = backend
        self.shapes = tuple(shapes)
        self.slots = slots
        self.held: set[int] = set()
        self.known: set[int] = set()

    def of_round(self, number: int) -> list[Callable[[], list[Move]]]:
        """The reads of round `number`, in an order of its own; each is to be called between two of its steps."""
        rng = np.random.default_rng((SEED, number))
        order = [self.shapes[i] for _ in range(TURNS) for i in rng.permutation(len(self.shapes)).tolist()]
        return [partial(self._move, shape) for shape in order]

    def _move(self, shape: AdapterShape) -> list[Move]:
        if shape.adapter_id in self.held:
            self.backend.drop(shape.adapter_id)
        timings = {"stage": self.backend.stage(shape)}
        timings["load"] = self.backend.load(shape, self.slots[shape.rank])
        self.held.add(shape.adapter_id)
        first = shape.rank not in self.known
        self.known.add(shape.rank)
        return [] if first else [Move(kind, shape.rank, t.nbytes, t.elapsed_s) for kind, t in timings.items()]

    def close(self) -> None:
        """Drop what is in host memory."""
        for adapter_id in sorted(self.held):
            self.backend.drop(adapter_id)
        self.held.clear()
