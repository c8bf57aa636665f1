"""An engine at work on the CPU alone: what the simulator does between two executed steps.

`multilora measure` runs it between the steps it times: in a process that does nothing but execute steps, the host's part
of one is shorter than in a run, where a scheduler has been at work and caches hold other things.
"""

from __future__ import annotations

from itertools import count

import numpy as np
import simpy

from backend.base import AdapterShape, Capacity, LoadTiming, StepBatch, StepTiming
from sim.config import EngineConfig
from sim.replica import Process, Replica
from sim.state import RequestState
from workloads.adapters import Catalogue
from workloads.requests import Request

STEP_S, REQUESTS_PER_S = 0.008, 8.0
"""So that about eighteen requests of the lengths below run at a time."""


class _Nothing:
    """A backend that executes nothing: every step takes `STEP_S`."""

    needs_block_tables = True

    def capacity(self) -> Capacity:
        return Capacity(20_000, 16, 16)

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        return LoadTiming(STEP_S, 0)

    def drop(self, adapter_id: int) -> None:
        pass

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        return LoadTiming(STEP_S, 0)

    def execute(self, batch: StepBatch) -> StepTiming:
        return StepTiming(STEP_S, 0.0)

    def close(self) -> None:
        pass


class BackgroundEngine:
    """A replica under random traffic without end, whose steps nobody executes."""

    def __init__(self, seed: int = 0) -> None:
        self.env = simpy.Environment()
        config = EngineConfig(max_loras=16, max_cpu_loras=32, max_lora_rank=64)
        self.catalogue = Catalogue.uniform(64, [8, 16, 32, 64])
        self.replica = Replica(self.env, self.catalogue, config, _Nothing())
        self.rng = np.random.default_rng(seed)
        self.env.process(self._arrivals())
        self.env.process(self.replica.run())

    def _arrivals(self) -> Process:
        for number in count():
            yield self.env.timeout(self.rng.exponential(1 / REQUESTS_PER_S))
            prompt, output = int(self.rng.integers(20, 1500)), int(self.rng.integers(50, 500))
            adapter = int(self.rng.integers(0, len(self.catalogue) + 1))
            self.replica.add(RequestState(Request(number, self.env.now, prompt, output, adapter), output))

    def step(self) -> None:
        """Schedule one more step, and apply what it yielded."""
        done = self.replica.totals.steps
        while self.replica.totals.steps == done:
            self.env.step()
