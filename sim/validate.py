"""`multilora validate`: a profile held against measured runs that did not make it, step by step and in a closed loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from backend.fitting import measured, with_features
from backend.online import OnlineRuns
from backend.profile import Profile
from backend.step_logs import read_steps
from sim.closed_loop import read_trace
from sim.config import EngineConfig
from sim.errors import ScenarioError
from sim.host_outlook import Loop

SEEDS = 32
"""Simulations of a run, each with another host."""

_ROWS = (8, 16, 32, 64, 128)
_BUSY_STEPS = 9
"""Neighbouring steps of a kind whose median stands for what the machine was like at that time."""


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run to validate against: its tables, and the engine it ran on."""

    requests: Path
    steps: Path | None
    max_loras: int


def engine_of(run: Run, settings: Mapping[str, object]) -> EngineConfig:
    """VLLM's engine as the run had it: every adapter fits the host, slots are walked as a set."""
    defaults: dict[str, object] = {"enable_prefix_caching": False, "lora_order": "set"}
    slots = {"max_loras": run.max_loras, "max_cpu_loras": 1 << 20}
    return EngineConfig(**{**defaults, **settings, **slots})  # type: ignore[arg-type]


def step_errors(profile: Profile, steps: pd.DataFrame) -> pd.DataFrame:
    """Each step with `composition`, `predicted_s`, `error` (relative) and `device_error` (of the step, where nothing hid it)."""
    table = with_features(steps)
    features = measured(steps).steps
    times = np.array([profile.predictor.predict(f)[:2] for f in features])
    sizes = np.searchsorted(_ROWS, table["rows"])
    table["composition"] = [
        _decodes(size) if decodes else "with prompts" for size, decodes in zip(sizes, table["decode_only"], strict=True)
    ]
    table["predicted_s"] = times.sum(axis=1)
    table["error"] = table["predicted_s"] / table["elapsed_s"] - 1.0
    table["device_error"] = np.where(
        table["decode_only"], (times[:, 0] - table["device_s"]) / table["elapsed_s"], np.nan
    )
    return table


def _decodes(size: int) -> str:
    """The composition of decodes of up to the row count `_ROWS[size]`; padded, so that names sort as sizes do."""
    first = f"{_ROWS[size - 1] + 1 if size else 1:3}"
    return f"decodes {first} to {_ROWS[size]}" if size < len(_ROWS) else f"decodes {first} and more"


def by_composition(errors: pd.DataFrame) -> pd.DataFrame:
    """MAPE, p95 and bias by composition and over all; `device_mape`: of the device's part; `best`, `noise`: what would be left.

    `best`: with each composition's predictions times the factor that leaves the least MAPE, found with sight of these very steps: about
    what a function of the composition can reach. `noise`: were each step predicted by the median of its nearest steps of that
    composition in time, before and after: a machine's own scatter.
    """
    parts = [(name, part) for name, part in errors.groupby("composition", sort=True)]
    rows = []
    for name, part in [*parts, ("all", errors)]:
        error = part["error"].abs()
        rows.append(
            {
                "composition": name,
                "steps": len(part),
                "mape": error.mean(),
                "p95": error.quantile(0.95),
                "bias": part["error"].mean(),
                "device_mape": part["device_error"].abs().mean(),
                "best": _best(part),
                "noise": _noise(part),
            }
        )
    return pd.DataFrame(rows)


def _best(part: pd.DataFrame) -> float:
    left = []
    for _, group in part.groupby("composition"):
        ordered = np.sort(1.0 + group["error"])[
            ::-1
        ]  # the best factor is the median of the inverse ratios, weighed by the ratios
        middle = int(np.searchsorted(np.cumsum(ordered), ordered.sum() / 2))
        left.append(np.abs(ordered / ordered[middle] - 1.0))
    return float(np.concatenate(left).mean())


def _noise(part: pd.DataFrame) -> float:
    scatter = []
    for _, group in part.groupby("composition"):
        near = group["error"].rolling(_BUSY_STEPS, center=True, min_periods=1).median()
        scatter.append(((1.0 + near) / (1.0 + group["error"]) - 1.0).abs())
    return float(pd.concat(scatter).mean())


@dataclass(frozen=True, slots=True)
class Validation:
    """What validating one run gave: `steps` (None without a log) and `loop`, as it is and with the host fitted; `left_out`: the run that
    the profile was made from and that this is, which it was made anew without.
    """

    name: str
    steps: pd.DataFrame | None
    loop: pd.DataFrame
    errors: pd.DataFrame | None
    left_out: str | None = None


def validate(
    run: Run,
    profile: Profile,
    *,
    rank: int,
    runs: OnlineRuns | None = None,
    fit_host_s: float | None = 10.0,
    seeds: int = SEEDS,
    engine: Mapping[str, object] | None = None,
) -> Validation:
    """Hold `profile`, made from `runs`, against one measured run that did not make it: one that did is left out of it first.

    `loop` has a row a metric: `measured`, `blind` (nothing fitted) and, with a step log, `host_fitted` (host seconds fitted to
    the first `fit_host_s` of it), each with its relative error; where `runs` tell how hosts go, these are medians over `seeds`, with
    `_low` and `_high`. `host_known`, no prediction: with the host as fast as the log says at every time, so that its error is that of all
    the rest. Raises `ScenarioError` or `BackendError`.
    """
    config = engine_of(run, engine or {})
    trace = read_trace(run.requests, run.steps)
    log = None if run.steps is None else read_steps([run.steps], rank, "held_out").assign(max_loras=run.max_loras)
    own = None if runs is None or log is None else runs.run_of(log)
    if runs is not None and own is not None:
        runs = runs.without(own)
        profile = replace(profile, predictor=runs.predictor())
    loop = Loop.of(trace, profile, config, rank, runs, seeds)
    table = loop.table("blind", None, 0.0)
    if log is None:
        return Validation(trace.name, None, table, None)
    errors = step_errors(profile, log)
    steps = by_composition(errors)
    if fit_host_s is not None:
        first = log[log["t_s"] < fit_host_s]
        if first.empty:
            raise ScenarioError(f"no step of the log began in its first {fit_host_s:g} s")
        for name, part, seconds in (("host_fitted", first, fit_host_s), ("host_known", log, float("inf"))):
            table = table.merge(loop.table(name, part, seconds).drop(columns="measured"), on="metric", how="left")
        fitted = replace(profile, predictor=loop.fitted(first, fit_host_s))
        after = by_composition(step_errors(fitted, log[log["t_s"] >= fit_host_s]))
        steps = steps.merge(
            after[["composition", "mape", "p95"]], on="composition", how="left", suffixes=("", "_host_fitted")
        )
    return Validation(trace.name, steps, table, errors, own)


def pair(traces: Sequence[Path], steps: Sequence[Path], max_loras: Sequence[int]) -> list[Run]:
    """The runs that the command line names. Raises `ScenarioError` if the lists do not fit each other."""
    if len(steps) not in (0, len(traces)):
        raise ScenarioError(f"--steps names {len(steps)} files, --trace {len(traces)}: one for each, or none")
    if len(max_loras) not in (1, len(traces)):
        raise ScenarioError(
            f"--max-loras has {len(max_loras)} values for {len(traces)} traces: one for each, or one for all"
        )
    logs: list[Path | None] = [*steps] or [None] * len(traces)
    slots = list(max_loras) * (len(traces) if len(max_loras) == 1 else 1)
    return [Run(*each) for each in zip(traces, logs, slots, strict=True)]
