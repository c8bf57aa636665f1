"""What each adapter's users cost: their part of the seconds that the engine was busy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from sim.tables import RunTables

FloatArray = npt.NDArray[np.float64]


def cost_shares(tables: RunTables) -> pd.Series[float]:
    """By adapter (0 = base), adding up to 1: seconds of steps, each shared out by tokens, and of loads inside steps.

    A step's seconds without its loads are divided by the tokens it computed. A request pays that price for its prompt (the
    mean price of prompt tokens from its first step to its first token) and for each further token, one a step. A load that
    a step waited for is paid by the adapter that was loaded. Steps do not say whose tokens they computed, so where requests
    were preempted or skipped in between, or prompts took turns, shares are close, not exact. NaN without step rows.
    """
    seconds = pd.Series(0.0, index=pd.Index(sorted(tables.requests["adapter"].unique()), name="adapter"))
    for requests, steps, moves in _engines(tables):
        if len(steps):
            paid = pd.Series(_request_seconds(requests, steps, tables.horizon_s), index=requests["adapter"].to_numpy())
            computed, loaded = float((steps["end_s"] - steps["start_s"]).sum()), float(steps["load_s"].sum())
            seconds = seconds.add(_scaled(paid.groupby(level=0).sum(), computed - loaded), fill_value=0.0)
            seconds = seconds.add(_scaled(_load_seconds(moves), loaded), fill_value=0.0)
    return (_scaled(seconds, 1.0) if len(tables.steps) else seconds * np.nan).rename_axis("adapter")


def _engines(tables: RunTables) -> list[tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]]:
    """Each engine's own requests, steps and moves."""
    parts = (tables.requests, tables.steps, tables.moves)
    if tables.replicas is None:
        return [parts]
    return [tuple(part[part["replica"] == i] for part in parts) for i in tables.replicas["replica"]]


def _request_seconds(requests: pd.DataFrame, steps: pd.DataFrame, horizon_s: float) -> FloatArray:
    """Engine seconds of each request."""
    tokens, prompt_tokens = steps["tokens"].clip(lower=1).to_numpy(float), steps["prefill_tokens"].to_numpy(float)
    price = (steps["end_s"] - steps["start_s"] - steps["load_s"]).to_numpy(float) / tokens
    # Sums over all steps so far, so that a span of steps is a difference of two.
    one_a_step, prompts_s, prompts = (_so_far(v) for v in (price, price * prompt_tokens, prompt_tokens))
    end = steps["end_s"].to_numpy(float)
    start = np.searchsorted(end, requests["first_scheduled_s"].fillna(horizon_s).to_numpy(float), side="right")
    first = np.searchsorted(end, requests["first_token_s"].fillna(horizon_s).to_numpy(float), side="right")
    last = np.searchsorted(end, requests["finish_s"].fillna(horizon_s).to_numpy(float), side="right")
    begun = requests["first_token_s"].notna().to_numpy()
    prompt = np.where(begun, requests["prompt_tokens"] - requests["cached_tokens"], 0).clip(min=0)
    mean = (prompts_s[first] - prompts_s[start]) / np.maximum(1.0, prompts[first] - prompts[start])
    return np.asarray(prompt * mean + np.where(begun, one_a_step[last] - one_a_step[first], 0.0), float)


def _so_far(values: FloatArray) -> FloatArray:
    return np.concatenate([[0.0], np.cumsum(values)])


def _load_seconds(moves: pd.DataFrame) -> pd.Series[float]:
    loads = moves[moves["kind"].isin(["stage", "load"])]
    return (loads["end_s"] - loads["start_s"]).groupby(loads["adapter"]).sum()


def _scaled(values: pd.Series[float], total: float) -> pd.Series[float]:
    """`values` so that they add up to `total`; none if they are all nothing."""
    there = float(values.sum())
    return values * (total / there) if there > 0 else values * 0.0
