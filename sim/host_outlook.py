"""What is known of the host of a measured run before it begins, or after its first seconds, and the run simulated under that."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
from tqdm import tqdm

from backend.fitting import measured
from backend.geometry import load_geometry
from backend.host_draw import HostDraw, HostOutlook
from backend.host_fit import times, with_host_of, with_time_between
from backend.host_speed import HostSpeed
from backend.host_spread import Spread
from backend.memory import memory_plan
from backend.online import OnlineRuns
from backend.predictor import Predictor
from backend.profile import Profile
from sim.closed_loop import Trace, compared, replayed
from sim.config import EngineConfig
from sim.run import limits_of


@dataclass(frozen=True, slots=True)
class Loop:
    """A measured run to be simulated in a closed loop: `profile` was made from `runs`, whose hosts went as in `records` (none of either: from
    no live run); `seeds` runs are drawn.
    """

    trace: Trace
    profile: Profile
    config: EngineConfig
    rank: int
    runs: Sequence[pd.DataFrame]
    records: tuple[HostSpeed, ...]
    seeds: int

    @classmethod
    def of(
        cls, trace: Trace, profile: Profile, config: EngineConfig, rank: int, runs: OnlineRuns | None, seeds: int
    ) -> Loop:
        """With the records of `runs`."""
        logs = [] if runs is None else list(runs.runs.values())
        records = tuple(HostSpeed.of(profile.predictor, log) for log in logs)
        return cls(trace, profile, config, rank, logs, records, seeds)

    def table(self, name: str, known: pd.DataFrame | None, seconds: float) -> pd.DataFrame:
        """Metrics measured and simulated, under `name`; `known`: steps of the run's first `seconds`, which its host is known by."""
        predictor = self.profile.predictor
        if not self.records and known is not None and seconds < float("inf"):
            predictor = self.fitted(known, seconds)
        outlook = self._outlook(known, seconds)
        logs = [*self.runs, *(() if known is None else (known,))]
        profile = replace(self.profile, predictor=with_time_between(predictor, logs) if logs else predictor)
        count = 1 if outlook is None or seconds == float("inf") else self.seeds
        drawn = [None if outlook is None else HostDraw(outlook, seed, count) for seed in range(count)]
        blocks = memory_plan(
            load_geometry(str(profile.meta["geometry"])), limits_of(self.config), profile.gpu_bytes
        ).num_gpu_blocks
        label = f"{self.trace.name}, {name}"
        shown = tqdm(drawn, desc=label, disable=not sys.stderr.isatty(), unit="run", delay=2)
        played = [replayed(self.trace, profile, self.config, blocks, self.rank, host) for host in shown]
        table = compared(self.trace, played)
        names = {"simulated": name, **{column: f"{name}_{column}" for column in ("error", "low", "high")}}
        return table.rename(columns=names)

    def fitted(self, known: pd.DataFrame, seconds: float) -> Predictor:
        """Step costs with the host fitted to `known`, the run's first `seconds`: the level that a run which begins so is likely to have."""
        predictor = self.profile.predictor
        if not self.records:
            return with_host_of(predictor, measured(known))
        level = HostSpeed.of(predictor, known).level(0.0, seconds)
        return times(predictor, Spread.of(self.records).expected(level, seconds))

    def _outlook(self, known: pd.DataFrame | None, seconds: float) -> HostOutlook | None:
        own = None if known is None else HostSpeed.of(self.profile.predictor, known)
        if seconds == float("inf") and own is not None:
            return HostOutlook((), Spread(0.0), own, seconds)
        return HostOutlook(self.records, Spread.of(self.records), own, seconds) if self.records else None
