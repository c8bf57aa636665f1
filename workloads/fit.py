"""A `[workload]` table made from a trace: synthetic traffic that is like it, and how much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from workloads import fitting, popularity
from workloads.build import build_workload
from workloads.describe import Statistics, describe
from workloads.requests import BASE, RequestTable

IntArray = npt.NDArray[np.int64]

CLOSE = 0.03
"""KS distance up to which a Zipf–Mandelbrot law stands for the shares themselves."""

MOST_PIECES = 240
SHORTEST_PIECE_S = 10.0
SHARES = np.concatenate([np.linspace(0, 0.98, 50), np.linspace(0.985, 0.995, 3), np.linspace(0.996, 1, 5)])
"""Quantiles of the lengths that are kept, closer in the tail, where most of the tokens can be."""

REUSED = 20_000
"""Requests, the first ones, to which locality is fitted."""


def fit(requests: RequestTable, locality: str = "repeat") -> tuple[int, dict[str, object]]:
    """(`adapters.count`, the `[workload]` table) of synthetic traffic like `requests`.

    `locality`: `repeat` keeps popularity and comes near the hit curve; `lru_stack` keeps the hit curve and makes all
    adapters equally popular in the long run.

    Rates by pieces of at least 10 s, gamma gaps within them, a popularity law (the shares themselves where no law is
    close), repeats that give the LRU hit curve, length quantiles. Not kept: which client is bursty, prompts and outputs
    that go together, common prefixes, drift.
    """
    span = float(requests.arrival_s[-1])
    piece_s = max(SHORTEST_PIECE_S, span / MOST_PIECES)
    arrivals = fitting.arrivals(requests.arrival_s, piece_s)
    cv = round(min(max(arrivals.cv, 0.05), 50.0), 4)
    table: dict[str, object] = {"kind": "synthetic", "duration_s": max(span, 1e-3)}
    table |= {"arrival": "gamma", "cv": cv} if abs(cv - 1) > CLOSE else {"arrival": "poisson"}
    table["rate"] = {
        "kind": "piecewise",
        "start_s": [round(v, 3) for v in arrivals.start_s.tolist()],
        "rps": [round(v, 6) for v in arrivals.rps.tolist()],
    }
    for key, column in (("prompt", requests.prompt_tokens), ("output", requests.output_tokens)):
        tokens = [round(v, 1) for v in np.quantile(column, SHARES).tolist()]
        table[key] = {"kind": "quantiles", "tokens": tokens, "shares": [round(v, 4) for v in SHARES.tolist()]}
    count, identity = _identity(requests.adapter, locality)
    return count, table | identity


def _identity(adapter: IntArray, locality: str) -> tuple[int, dict[str, object]]:
    named = adapter[adapter != BASE]
    base: dict[str, object] = {"base_share": round(float((adapter == BASE).mean()), 6)}
    if len(named) == 0:
        return 1, base | {"popularity": {"kind": "uniform"}}
    counts = np.sort(np.bincount(named))[::-1]
    counts = counts[counts > 0]
    if locality == "lru_stack":
        distances = [round(v, 7) for v in fitting.stack(named).tolist()]
        return len(counts), base | {"locality": {"kind": "lru_stack", "distances": distances}}
    law = fitting.zipf_mandelbrot(counts) if len(counts) > 1 else None
    if law is not None and law.ks <= CLOSE:
        p = popularity.zipf_mandelbrot(len(counts), law.s, law.q)
        chosen: dict[str, object] = {"kind": "zipf_mandelbrot", "s": round(law.s, 4), "q": round(law.q, 4)}
    else:
        p = counts / counts.sum()
        chosen = {"kind": "empirical", "weights": counts.tolist()}
    repeat = fitting.repeat(named[:REUSED], p, np.random.default_rng(0))
    local = {"locality": {"kind": "repeat", "share": repeat.share, "mean_gap": repeat.mean_gap}} if repeat.share else {}
    return len(counts), base | {"popularity": chosen} | local


def compare(
    requests: RequestTable, count: int, table: dict[str, object], seed: int = 0
) -> list[tuple[str, object, object]]:
    """(statistic, in the trace, in synthetic traffic of the same length made from `table`), one for each statistic."""
    made = build_workload(table, adapter_count=count, seed=seed, base_dir=Path())
    real, synthetic = describe(requests), describe(made.requests)
    return [(key, value, synthetic.get(key)) for key, value in real.items()]


def worst(rows: list[tuple[str, object, object]]) -> Statistics:
    """How far the synthetic traffic is off: greatest difference of the hit curves and shares, relative of the others."""

    def far(start: tuple[str, ...], *, relative: bool) -> float | None:
        chosen = [row[1:] for row in rows if row[0].startswith(start) and not row[0].endswith("shuffled")]
        pairs = [(a, b) for a, b in chosen if isinstance(a, float) and isinstance(b, float)]
        pairs = [(a, b) for a, b in pairs if a or not relative]
        return max((abs(b - a) / (abs(a) if relative else 1.0) for a, b in pairs), default=None)

    return {
        "rate_rel": far(("rate_rps",), relative=True),
        "gap_cv_rel": far(("gap_cv",), relative=True),
        "dispersion_rel": far(("dispersion",), relative=True),
        "share_abs": far(("top1", "top10", "base"), relative=False),
        "hit_abs": far(("lru_hit_",), relative=False),
        "median_length_rel": far(("p50_",), relative=True),
        "mean_length_rel": far(("mean_",), relative=True),
    }
