"""A replay with what a live run's machine was by chance: its loads, one by one, and its host's speed."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import replace

import pandas as pd

from backend.base import AdapterShape, LoadTiming
from backend.host_fit import times
from backend.predictor import Predictor
from backend.replay import ReplayBackend


def host_factor(live: pd.DataFrame, replay: pd.DataFrame) -> float:
    """What the host took for decodes of `live` over those of `replay` (their steps), in the mean."""
    means = [steps[steps["prefill_tokens"] == 0]["host_s"].mean() for steps in (live, replay)]
    return float(means[0] / means[1])


class AsItWas(ReplayBackend):
    """`inner`, but each adapter's reads and copies take what they took in a live run, whose `moves` these are, in their order (those that it
    had not: as `inner`), and the host `factor` times as long.
    """

    def __init__(self, inner: ReplayBackend, moves: pd.DataFrame, factor: float) -> None:
        assert isinstance(inner.profile.predictor, Predictor)
        profile = replace(inner.profile, predictor=times(inner.profile.predictor, factor))
        super().__init__(profile, inner.geometry, inner.limits, inner.num_gpu_blocks)
        self._took: defaultdict[tuple[str, int], deque[float]] = defaultdict(deque)
        for kind, adapter, start_s, end_s in moves[["kind", "adapter", "start_s", "end_s"]].itertuples(index=False):
            self._took[kind, adapter].append(end_s - start_s)

    @property
    def step_costs(self) -> None:
        """Nothing that a compiled replay could know: like loads do not take alike."""

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        """Disk to host."""
        return self._as_it_was("stage", adapter.adapter_id, super().stage(adapter))

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        """Host to slot."""
        return self._as_it_was("load", adapter.adapter_id, super().load(adapter, slot))

    def _as_it_was(self, kind: str, adapter: int, timing: LoadTiming) -> LoadTiming:
        took = self._took[kind, adapter]
        return replace(timing, elapsed_s=took.popleft()) if took else timing
