"""The load of a published run, made again as its clients made it: the same generator in the same order, lengths drawn anew."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from backend.csv_tables import check_column, read_csv
from backend.from_runs import counted
from sim.errors import ScenarioError
from workloads.requests import RequestTable

MODELS = {"llama-3.1-8b-instruct": ("llama-3.1-8b", "llama31"), "qwen-2.5-7b-instruct": ("qwen2.5-7b", "qwen25")}
"""A published model -> shipped geometry, and the prefix of its columns in the table of lengths."""

_DRAWS = 1 << 16

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of a run and its adapters' ranks."""

    requests: RequestTable
    ranks: tuple[int, ...]


def load_of(run: Mapping[Any, Any], lengths: pd.DataFrame, window_s: float, seed: int, ends_per_token: float) -> Load:
    """The run's requests of the first `window_s`: arrivals as its own seed made them, lengths by ours.

    Lengths come from the table, scaled to the means of the run's prepared requests where it names them. A model ends an answer
    of its own with the probability `ends_per_token` at each token. Which rank meets which rate is not known.
    """
    arrival, adapter = arrivals(str(run["adapter_rates"]), float(str(run["window_s"])), _seed(run))
    kept = arrival < window_s
    arrival, adapter = arrival[kept], adapter[kept]
    rng = np.random.default_rng(seed)
    count = len(arrival)
    prompts, outputs = _lengths(run, lengths, count, rng)
    if ends_per_token > 0:
        outputs = np.minimum(outputs, np.ceil(rng.exponential(1 / ends_per_token, count)))
    whole = [np.maximum(1, np.rint(values)).astype(np.int64) for values in (prompts, outputs)]
    ranks = spread(str(run["adapter_ranks"]), "adapter_ranks").astype(int)
    return Load(RequestTable(arrival, whole[0], whole[1], adapter), tuple(ranks.tolist()))


def _seed(run: Mapping[Any, Any]) -> int:
    known = float(run.get("seed", 0) or 0)
    return 0 if isnan(known) else int(known)


def spread(text: str, where: str) -> FloatArray:
    """A value for each adapter: the values take turns as long as each has any left, as the published lists were made."""
    pairs = [[value, count] for value, count in counted(text, where)]
    values: list[float] = []
    while any(count for _, count in pairs):
        for pair in pairs:
            if pair[1]:
                values.append(pair[0])
                pair[1] -= 1
    return np.array(values)


def arrivals(rates: str, window_s: float, seed: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """When requests are sent and for which adapter (from 1): a Poisson process each, all gaps from one generator in order of wake-up.

    The clients' own `random` and NumPy generators, both of `seed`: one shuffles the rates, the other draws the gaps. They woke a
    little late, so that the order of draws of neighbours in time is not exactly theirs; the counts are, to some per mille.
    """
    rate = spread(rates, "adapter_rates").tolist()
    random.Random(seed).shuffle(rate)  # noqa: S311 the generator that the clients used
    draws = _gaps(seed)
    waking = [(next(draws) / rate[i], i) for i in range(len(rate))]
    heapify(waking)
    times, adapters = [], []
    while waking[0][0] < window_s:
        now, i = waking[0]
        times.append(now)
        adapters.append(i + 1)
        heapreplace(waking, (now + next(draws) / rate[i], i))
    return np.array(times), np.array(adapters, dtype=np.int64)


def _gaps(seed: int) -> Any:
    generator = np.random.RandomState(seed)
    while True:
        yield from generator.standard_exponential(_DRAWS).tolist()


def _lengths(
    run: Mapping[Any, Any], table: pd.DataFrame, count: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Pairs from the table, each as often as any other, scaled to the means of the run's prepared requests."""
    rounds = -(-count // len(table))
    chosen = np.concatenate([rng.permutation(len(table)) for _ in range(rounds)] or [np.array([], int)])[:count]
    prefix = MODELS[str(run["model"])][1]
    out = []
    for kind in ("input", "output"):
        values = table[f"{prefix}_{kind}_tokens"].to_numpy(float)[chosen]
        mean = float(run.get(f"pool_mean_{kind}_tokens", np.nan) or np.nan)
        out.append(values * mean / values.mean() if count and mean > 0 else values)
    return out[0], out[1]


def ends_per_token(run_means: pd.DataFrame, lengths: pd.DataFrame, model: str) -> float:
    """The probability of an answer to end at any token, from answers of runs that were shorter than those prepared for them.

    `run_means`: `mean_output_tokens` and `pool_mean_output_tokens` of runs that finished what they were sent.
    """
    from scipy.optimize import brentq

    share = float((run_means["mean_output_tokens"] / run_means["pool_mean_output_tokens"]).mean())
    tokens = lengths[f"{MODELS[model][1]}_output_tokens"].to_numpy(float)
    if share >= 1 - 1e-6:
        return 0.0
    return float(brentq(lambda p: ((1 - np.exp(-p * tokens)) / p).mean() / tokens.mean() - share, 1e-9, 1.0))


def read_lengths(file: Path) -> pd.DataFrame:
    """Prompt and output lengths to draw from, a pair of columns a model. Raises `ScenarioError`, for a cell `BackendError`."""
    needed = [f"{prefix}_{kind}_tokens" for _, prefix in MODELS.values() for kind in ("input", "output")]
    table = read_csv(file, ScenarioError)
    if missing := [name for name in needed if name not in table.columns]:
        raise ScenarioError(f"{file}: has no column {missing[0]}; needs {', '.join(needed)}")
    if table.empty:
        raise ScenarioError(f"{file}: has no rows")
    for column in needed:
        check_column(file, table, column, above=0)
    return table
