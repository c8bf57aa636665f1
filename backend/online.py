"""Runs of a live engine that a profile learnt from, kept in its folder: whoever is judged by one is judged without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from backend.fitting import accuracy_of, features_of, measured
from backend.host_fit import with_host_of
from backend.predictor import FloatArray, Predictor
from backend.profile import Profile, measured_steps
from backend.regression import Engine, fit_predictor

KIND = "online"
"""Kind of a profile's measured steps that come from runs; their column `run` names them."""

_SAME = 0.5
"""Share of a log's steps that a run must have, too, to be taken for the same; runs of one engine share at most 0.3 %, a run and its rounded copy 92 %."""


@dataclass(frozen=True, slots=True)
class OnlineRuns:
    """A timing grid (`grid`), logged runs by name (`runs`), and what is known of their engine: what a profile of logs is fitted to."""

    grid: pd.DataFrame
    runs: Mapping[str, pd.DataFrame]
    engine: Engine

    def predictor(self) -> Predictor:
        """The device by the grid, and by the runs where only they show it; the host by the runs, in the grid's shape."""
        joined = measured(pd.concat(self.runs.values(), ignore_index=True)) if self.runs else None
        fitted = fit_predictor(measured(self.grid), self.engine, joined)
        return fitted if joined is None else with_host_of(fitted, joined)

    def without(self, name: str) -> OnlineRuns:
        """All but one run."""
        return replace(self, runs={key: run for key, run in self.runs.items() if key != name})

    def run_of(self, steps: pd.DataFrame) -> str | None:
        """The run that `steps` are, or are part of, whatever their file is called and however it rounds; None if they are of no run here."""
        marks = _marks(steps)
        shared = {name: len(marks & _marks(run)) / len(marks) for name, run in self.runs.items()}
        name = max(shared, key=lambda name: shared[name], default=None)
        return name if name is not None and shared[name] > _SAME else None

    def accuracy(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """How well steps of each run are predicted from the grid and the other runs: over all, and by regime (`fitting.accuracy`)."""
        predicted, regimes = [], []
        for name, run in self.runs.items():
            predictor = self.without(name).predictor()
            features = features_of(run)
            predicted.append(np.array([sum(predictor.predict(f)[:2]) for f in features]))
            regimes += [predictor.regime(f)[0] for f in features]
        steps = pd.concat(self.runs.values(), ignore_index=True)
        seconds, placed = np.concatenate(predicted), np.array(regimes)
        return accuracy_of(seconds, steps), _by(placed, seconds, steps)


def _marks(steps: pd.DataFrame) -> set[tuple[int, int, int]]:
    """What steps are known by: their requests, and what they and their device took, in 10 µs."""
    took, device = ((steps[name] * 1e5).round().astype(int) for name in ("elapsed_s", "device_s"))
    return set(zip(steps["query_lens"].map(len), took, device, strict=True))


def _by(
    placed: np.ndarray[tuple[int], np.dtype[np.str_]], seconds: FloatArray, steps: pd.DataFrame
) -> dict[str, dict[str, float]]:
    return {str(name): accuracy_of(seconds[placed == name], steps[placed == name]) for name in np.unique(placed)}


def online_runs(name_or_path: str, profile: Profile) -> OnlineRuns | None:
    """The runs that a profile was made from; None if it was made from none."""
    file = measured_steps(name_or_path)
    facts = profile.meta.get("fit")
    if file is None or not isinstance(facts, dict):
        return None
    steps = pd.read_parquet(file)
    if "run" not in steps:
        return None
    online = steps[steps["kind"] == KIND]
    runs = {str(name): run.reset_index(drop=True) for name, run in online.groupby("run", sort=False)}
    engine = Engine(profile.predictor.graph_sizes, **facts)
    return OnlineRuns(steps[steps["kind"] == "grid"].reset_index(drop=True), runs, engine) if runs else None


def facts_of(engine: Engine) -> dict[str, object]:
    """What `online_runs` needs of an engine beside its captured sizes, for the profile's file."""
    return {key: getattr(engine, key) for key in ("seconds_per_key", "lora_rows", "seconds_per_slot_tile")}
