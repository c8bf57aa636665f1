"""A profile of an engine of which only whole runs are known: step costs from what its clients saw.

A run in a steady state with R requests in the batch, D distinct adapters, S slots and T prompt tokens a second has steps of
m = base + R·request + D·adapter + (S − D)·idle slot, and of each second T·token go to prompts: mean ITL = m + ITL·T·token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from backend.errors import BackendError
from backend.predictor import HOST_TERMS, TERMS, FloatArray, Predictor, Regime
from backend.regression import least_relative

COSTS = ("base_s", "request_s", "adapter_s", "idle_slot_s", "prompt_token_s")
NEEDED = (
    "srv_running_mean",
    "max_loras",
    "adapter_rates",
    "itl_mean_ms",
    "request_throughput_rps",
    "mean_input_tokens",
)


def counted(text: str, where: str) -> list[tuple[float, int]]:
    """`value:count;…` as pairs. Raises `BackendError` naming `where`."""
    try:
        pairs = [part.split(":") for part in str(text).split(";")]
        return [(float(value), int(count)) for value, count in pairs]
    except ValueError as error:
        raise BackendError(f"{where} is {text!r}, must be value:count;value:count;…") from error


def distinct_adapters(run: Mapping[Any, Any]) -> float:
    """Distinct adapters to expect in a batch of the run's mean size, at most its slots: each is there as often as it is asked."""
    rates = counted(str(run["adapter_rates"]), "adapter_rates")
    total = sum(rate * count for rate, count in rates)
    running = float(str(run["srv_running_mean"]))
    there = sum(count * -np.expm1(-running * rate / total) for rate, count in rates)
    return float(min(there, float(str(run["max_loras"]))))


def step_costs(runs: pd.DataFrame) -> dict[str, float]:
    """Seconds of `COSTS`, all >= 0, of the least relative error of the runs' mean ITL. Raises `BackendError` for too few."""
    if len(runs) < len(COSTS):
        raise BackendError(f"{len(runs)} runs are too few for {len(COSTS)} costs")
    itl = runs["itl_mean_ms"].to_numpy(float) / 1e3
    work, tokens_per_s = _work(runs)
    columns = np.column_stack([work, itl * tokens_per_s])
    return dict(zip(COSTS, least_relative(columns, itl), strict=True))


def itl_of(runs: pd.DataFrame, costs: Mapping[Any, Any]) -> FloatArray:
    """Mean ITL in ms that the costs give runs whose mean batch and throughput are known; infinite where prompts take all time."""
    work, tokens_per_s = _work(runs)
    step = work @ np.array([costs[name] for name in COSTS[:-1]])
    left = 1.0 - tokens_per_s * costs["prompt_token_s"]
    return np.where(left > 0, 1e3 * step / np.maximum(left, 1e-9), np.inf)


def _work(runs: pd.DataFrame) -> tuple[FloatArray, FloatArray]:
    """What multiplies all costs but the last, float64[runs, 4], and prompt tokens a second, float64[runs]."""
    distinct = np.array([distinct_adapters(run) for run in runs.to_dict("records")])
    columns = [np.ones(len(runs)), runs["srv_running_mean"], distinct, runs["max_loras"] - distinct]
    tokens_per_s = runs["request_throughput_rps"].to_numpy(float) * runs["mean_input_tokens"].to_numpy(float)
    return np.column_stack(columns).astype(float), tokens_per_s


def predictor_of(costs: Mapping[str, float]) -> Predictor:
    """The costs as one regime without graphs; a step's rows beyond one a request are prompts."""
    terms = dict.fromkeys(TERMS, 0.0)
    token = costs["prompt_token_s"]
    terms |= {"requests": costs["request_s"] - token, "active_adapters": costs["adapter_s"]}
    terms["idle_slots"] = costs["idle_slot_s"]
    knots = (0.0, 1e6)
    device = (costs["base_s"], costs["base_s"] + 1e6 * token, 0.0, *terms.values())
    return Predictor((), {"eager": Regime(knots, (0.0,), device, (0.0,) * HOST_TERMS, {}, {})})
