"""`multilora validate`: a profile held against measured runs that did not make it, step by step and in a closed loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from backend.fitting import measured, with_features
from backend.geometry import load_geometry
from backend.memory import memory_plan
from backend.profile import Profile
from backend.regression import with_host_of
from backend.step_logs import read_steps
from sim.closed_loop import Trace, compared, read_trace, replayed
from sim.config import EngineConfig
from sim.errors import ScenarioError
from sim.run import limits_of

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


def fitted_host(profile: Profile, steps: pd.DataFrame, seconds: float) -> Profile:
    """The profile with its host seconds fitted to the first `seconds` of a step log; the device's stay."""
    first = steps[steps["t_s"] < seconds]
    if first.empty:
        raise ScenarioError(f"no step of the log began in its first {seconds:g} s")
    return replace(profile, predictor=with_host_of(profile.predictor, measured(first)))


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
    """MAPE, p95 and bias by composition and over all; `device_mape`: of the device's part; `noise`: beside like neighbours.

    `noise` is what is left if each step were predicted by the median of its nearest steps of that composition in time: a
    machine's own scatter, which no function of the composition can know.
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
                "noise": _noise(part),
            }
        )
    return pd.DataFrame(rows)


def _noise(part: pd.DataFrame) -> float:
    scatter = []
    for _, group in part.groupby("composition"):
        near = group["error"].rolling(_BUSY_STEPS, center=True, min_periods=1).median()
        scatter.append(((1.0 + near) / (1.0 + group["error"]) - 1.0).abs())
    return float(pd.concat(scatter).mean())


@dataclass(frozen=True, slots=True)
class Validation:
    """What validating one run gave: `steps` (None without a log) and `loop`, as it is and with the host fitted."""

    name: str
    steps: pd.DataFrame | None
    loop: pd.DataFrame
    errors: pd.DataFrame | None


def validate(
    run: Run,
    profile: Profile,
    *,
    rank: int,
    fit_host_s: float | None = 10.0,
    engine: Mapping[str, object] | None = None,
) -> Validation:
    """Hold `profile` against one measured run.

    `loop` has a row a metric: `measured`, `blind` (nothing fitted) and, with a step log, `host_fitted` (host seconds fitted to
    the first `fit_host_s` of it), each with its relative error. Raises `ScenarioError` or `BackendError`.
    """
    config = engine_of(run, engine or {})
    trace = read_trace(run.requests, run.steps)
    blocks = memory_plan(
        load_geometry(str(profile.meta["geometry"])), limits_of(config), profile.gpu_bytes
    ).num_gpu_blocks
    loop = _loop(trace, profile, config, blocks, rank, "blind")
    if run.steps is None:
        return Validation(trace.name, None, loop, None)
    log = read_steps([run.steps], rank, "held_out").assign(max_loras=run.max_loras)
    errors = step_errors(profile, log)
    table = by_composition(errors)
    if fit_host_s is not None:
        own = fitted_host(profile, log, fit_host_s)
        loop = loop.merge(_loop(trace, own, config, blocks, rank, "host_fitted").drop(columns="measured"), on="metric")
        fitted = by_composition(step_errors(own, log[log["t_s"] >= fit_host_s]))
        table = table.merge(
            fitted[["composition", "mape", "p95"]], on="composition", how="left", suffixes=("", "_host_fitted")
        )
    return Validation(trace.name, table, loop, errors)


def _loop(trace: Trace, profile: Profile, config: EngineConfig, blocks: int, rank: int, name: str) -> pd.DataFrame:
    table = compared(trace, replayed(trace, profile, config, blocks, rank))
    return table.rename(columns={"simulated": name, "error": f"{name}_error"})


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
