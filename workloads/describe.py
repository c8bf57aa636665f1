"""What a trace is like: rate, bursts, skew, reuse and lengths, in one flat dictionary."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workloads import fitting, reuse
from workloads.requests import BASE, RequestTable

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

BINS_S = (1, 10, 60)
QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
REUSED = 200_000
"""Requests of which reuse is counted at most: the first ones."""

Statistics = dict[str, float | int | None]


def dispersion(arrival_s: FloatArray, bin_s: float) -> float | None:
    """Variance over mean of the counts in bins of `bin_s`; 1 for Poisson arrivals. None with fewer than five whole bins."""
    bins = int(arrival_s[-1] // bin_s) if len(arrival_s) else 0
    if bins < 5:
        return None
    counts = np.bincount((arrival_s // bin_s).astype(np.int64))[:bins]
    return float(counts.var(ddof=1) / counts.mean()) if counts.any() else None


def arrival_statistics(arrival_s: FloatArray) -> Statistics:
    """Rate over the whole span, burstiness of the gaps, dispersion of counts."""
    gaps = np.diff(arrival_s)
    span = float(arrival_s[-1] - arrival_s[0]) if len(arrival_s) else 0.0
    out: Statistics = {
        "requests": len(arrival_s),
        "span_s": span,
        "rate_rps": (len(arrival_s) - 1) / span if span > 0 else None,
        "gap_cv": float(gaps.std() / gaps.mean()) if span > 0 else None,
    }
    return out | {f"dispersion_{b}s": dispersion(arrival_s - arrival_s[:1].sum(), b) for b in BINS_S}


def skew_statistics(adapter: IntArray) -> Statistics:
    """How the requests that name an adapter spread over the adapters. Empty if none does."""
    counts = np.sort(np.bincount(adapter[adapter != BASE]))[::-1]
    counts = counts[counts > 0]
    out: Statistics = {
        "base_share": float((adapter == BASE).mean()) if len(adapter) else None,
        "adapters_used": len(counts),
    }
    if len(counts) < 2:
        return out
    share = counts / counts.sum()
    zipf, mandelbrot = fitting.zipf(counts), fitting.zipf_mandelbrot(counts)
    return out | {
        "top1_share": float(share[0]),
        "top10pct_share": float(share[: -(-len(share) // 10)].sum()),
        "effective_adapters": float(1 / (share**2).sum()),
        "zipf_s": zipf.s,
        "zipf_ks": zipf.ks,
        "zipf_mandelbrot_s": mandelbrot.s,
        "zipf_mandelbrot_q": mandelbrot.q,
        "zipf_mandelbrot_ks": mandelbrot.ks,
    }


def hit_curves(adapter: IntArray, slots: IntArray) -> tuple[FloatArray, FloatArray]:
    """LRU hit ratios at `slots`: in the order of the trace, and of the same requests shuffled."""
    named = adapter[adapter != BASE][:REUSED]
    shuffled = np.random.default_rng(0).permutation(named)
    return tuple(reuse.hit_curve(reuse.stack_distances(a), slots) for a in (named, shuffled))  # type: ignore[return-value]


def reuse_statistics(adapter: IntArray) -> Statistics:
    """LRU hit ratios at `fitting.SLOTS`, as `lru_hit_K` and `lru_hit_K_shuffled`. Empty without adapters."""
    if not (adapter != BASE).any():
        return {}
    real, shuffled = hit_curves(adapter, fitting.SLOTS)
    pairs = zip(fitting.SLOTS.tolist(), real.tolist(), shuffled.tolist(), strict=True)
    return {key: v for k, a, b in pairs for key, v in ((f"lru_hit_{k}", a), (f"lru_hit_{k}_shuffled", b))}


def length_statistics(requests: RequestTable) -> Statistics:
    """Means and quantiles of prompts and outputs, and the share of prompt tokens that begin as another's do."""
    out: Statistics = {}
    for name, column in (("prompt_tokens", requests.prompt_tokens), ("output_tokens", requests.output_tokens)):
        out[f"mean_{name}"] = float(column.mean())
        for q, value in zip(QUANTILES, np.quantile(column, QUANTILES), strict=True):
            out[f"p{100 * q:g}_{name}"] = float(value)
    return out


def describe(requests: RequestTable) -> Statistics:
    """All statistics of `requests`, at least one."""
    return {
        **arrival_statistics(requests.arrival_s),
        **skew_statistics(requests.adapter),
        **reuse_statistics(requests.adapter),
        **length_statistics(requests),
    }
