"""A replay in which each adapter takes one of the times that adapters took in the measurement, not their mean: what chance is in a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from backend.base import AdapterShape, LoadTiming
from backend.replay import ReplayBackend


class DrawnLoads(ReplayBackend):
    """`inner`, but reads and copies take a measured repeat over the mean of its kind and size times as long, drawn by `seed`.

    `loads`: a profile's `loads.parquet`. Of sizes that were not measured the nearest stands for them.
    """

    def __init__(self, inner: ReplayBackend, loads: pd.DataFrame, seed: int) -> None:
        super().__init__(inner.profile, inner.geometry, inner.limits, inner.num_gpu_blocks)
        over_mean = loads["elapsed_s"] / loads.groupby(["kind", "nbytes"])["elapsed_s"].transform("mean")
        self._repeats: dict[str, dict[int, list[float]]] = {"stage": {}, "load": {}}
        for kind, nbytes, share in zip(loads["kind"], loads["nbytes"], over_mean, strict=True):
            self._repeats[kind].setdefault(int(nbytes), []).append(float(share))
        self._rng = np.random.default_rng(seed)

    @property
    def step_costs(self) -> None:
        """Nothing that a compiled replay could know: it takes all loads of an adapter alike."""

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        """Disk to host."""
        return self._drawn("stage", super().stage(adapter))

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        """Host to slot."""
        return self._drawn("load", super().load(adapter, slot))

    def _drawn(self, kind: str, timing: LoadTiming) -> LoadTiming:
        sizes = self._repeats[kind]
        repeats = sizes[min(sizes, key=lambda nbytes: abs(nbytes - timing.nbytes))]
        return replace(timing, elapsed_s=timing.elapsed_s * repeats[self._rng.integers(len(repeats))])
