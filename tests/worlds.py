"""Small worlds for tests: a backend with simple costs, and random workloads."""

from __future__ import annotations

import numpy as np
import pandas as pd

from backend.base import AdapterShape, Capacity, LoadTiming, StepBatch, StepTiming
from sim.tables import StepTotals
from workloads.requests import RequestTable


class WorldBackend:
    """1 ms a step + 10 µs a token; 5 ms to stage, 2 ms to load. Checks residency and block tables of every step."""

    needs_block_tables = True

    def __init__(self, blocks: int, max_loras: int, block_size: int = 4, host_s: float = 0.0) -> None:
        self.host_s = host_s
        self.blocks, self.max_loras, self.block_size = blocks, max_loras, block_size
        self.staged: set[int] = set()
        self.slots: dict[int, int] = {}
        self.batches: list[StepBatch] = []

    def capacity(self) -> Capacity:
        return Capacity(self.blocks, self.block_size, self.max_loras)

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        assert adapter.adapter_id not in self.staged
        self.staged.add(adapter.adapter_id)
        return LoadTiming(0.005, 1)

    def drop(self, adapter_id: int) -> None:
        self.staged.remove(adapter_id)

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        assert adapter.adapter_id in self.staged
        assert 0 <= slot < self.max_loras
        self.slots[slot] = adapter.adapter_id
        return LoadTiming(0.002, 1)

    def execute(self, batch: StepBatch) -> StepTiming:
        written: set[int] = set()
        places: dict[int, tuple[int, int]] = {}
        rows = zip(batch.query_lens, batch.context_lens, batch.slots, batch.block_tables, strict=True)
        for q, c, slot, table in rows:
            assert len(table) == -(-(q + c) // self.block_size)
            assert all(0 <= b < self.blocks for b in table)
            for index, block in enumerate(table):
                assert places.setdefault(block, (index, slot)) == (index, slot), (
                    "I5: a block is shared that must not be"
                )
            writes = set(table[c // self.block_size :])
            assert not written & writes, "I5: two requests write one block"
            written |= writes
        assert len({s for s in batch.slots if s >= 0}) <= self.max_loras, "I3: too many adapters"
        assert all(s in self.slots for s in batch.slots if s >= 0), "I4: an adapter is not in its slot"
        self.batches.append(batch)
        return StepTiming(0.001 + 1e-5 * batch.tokens, self.host_s)

    def close(self) -> None:
        pass


def random_requests(seed: int, count: int, adapters: int, longest: int) -> RequestTable:
    """Bursts and pauses; some prompts begin alike, within and across adapters; two priorities."""
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.exponential(0.004, count).cumsum() * rng.integers(0, 2, count))
    prompt, output = rng.integers(1, longest, count), rng.integers(1, longest, count)
    return RequestTable(
        arrival,
        prompt,
        output,
        rng.integers(0, adapters + 1, count),
        rng.integers(0, 2, count),
        rng.integers(-1, 3, count),
        rng.integers(0, prompt + 1),
    )


def totals_of(steps: pd.DataFrame) -> tuple[StepTotals, ...]:
    """What an engine adds up while it runs, from a table of its steps."""
    totals = StepTotals()
    for row in steps.itertuples():
        totals.add(row)
    return (totals,)
