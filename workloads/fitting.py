"""Laws fitted to a trace: popularity by maximum likelihood, locality and arrivals by what they must reproduce."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, minimize_scalar

from workloads import locality, popularity, reuse

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SLOTS = np.array([1, 2, 4, 8, 16, 32, 64, 128])
"""Cache sizes at which hit curves are compared."""


@dataclass(frozen=True, slots=True)
class ZipfFit:
    """`p(r) ~ (r + q) ** -s`; `ks`: the greatest distance between its cumulated shares and the trace's."""

    s: float
    q: float
    ks: float


def _loss(s: float, q: float, counts: FloatArray) -> float:
    logs = -s * np.log(np.arange(1, len(counts) + 1) + q)
    top = logs.max()
    return float(-(counts * (logs - top - np.log(np.exp(logs - top).sum()))).sum() / counts.sum())


def _fitted(s: float, q: float, counts: FloatArray) -> ZipfFit:
    law = np.cumsum(popularity.zipf_mandelbrot(len(counts), s, q))
    return ZipfFit(s, q, float(np.abs(law - np.cumsum(counts) / counts.sum()).max()))


def zipf(counts: IntArray) -> ZipfFit:
    """Zipf's law by maximum likelihood over ranks; `counts` of each adapter, zeros left out."""
    ranked = np.sort(counts[counts > 0])[::-1].astype(float)
    found = minimize_scalar(lambda s: _loss(s, 0.0, ranked), bounds=(0.0, 12.0), method="bounded")
    return _fitted(float(found.x), 0.0, ranked)


def zipf_mandelbrot(counts: IntArray) -> ZipfFit:
    """The Zipf–Mandelbrot law by maximum likelihood over ranks; `counts` of each adapter, zeros left out."""
    ranked = np.sort(counts[counts > 0])[::-1].astype(float)
    start = zipf(counts)
    best = minimize(
        lambda v: _loss(np.exp(v[0]), np.expm1(np.abs(v[1])), ranked),
        [np.log(max(start.s, 0.05)), 0.5], method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-6, "fatol": 1e-12},
    )  # fmt: skip
    return _fitted(float(np.exp(best.x[0])), float(np.expm1(np.abs(best.x[1]))), ranked)


@dataclass(frozen=True, slots=True)
class RepeatFit:
    """Parameters of `locality.repeat`; `error`: greatest difference of the hit curves at `SLOTS`."""

    share: float
    mean_gap: float
    error: float


def repeat(adapter: IntArray, p: FloatArray, rng: np.random.Generator) -> RepeatFit:
    """The repeats that, over independent draws with shares `p`, give the LRU hit curve of `adapter` best."""
    wanted = reuse.hit_curve(reuse.stack_distances(adapter), SLOTS)
    drawn = popularity.draw(p, len(adapter), rng)
    best = RepeatFit(0.0, 1.0, _curve_error(drawn, wanted))
    for mean_gap in (1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 16.0, 32.0):
        for share in np.arange(0.05, 1.0, 0.1):
            ranks = locality.repeat(drawn, float(share), mean_gap, np.random.default_rng(0))
            error = _curve_error(ranks, wanted)
            if error < best.error - 0.005:  # a law with locality must earn its two parameters
                best = RepeatFit(round(float(share), 2), mean_gap, error)
    return best


def stack(adapter: IntArray) -> FloatArray:
    """Weights of the positions of `locality.lru_stack` as `adapter` uses them, float64[m] that sum to 1.

    A first use counts at the position behind all adapters used before it.
    """
    distances = reuse.stack_distances(adapter)
    first = distances == reuse.FIRST
    weights = np.bincount(np.where(first, np.cumsum(first) - 1, distances)).astype(float)
    return popularity.shares(weights)


def _curve_error(adapter: IntArray, wanted: FloatArray) -> float:
    return float(np.abs(reuse.hit_curve(reuse.stack_distances(adapter), SLOTS) - wanted).max())


@dataclass(frozen=True, slots=True)
class ArrivalFit:
    """A rate by pieces, and the coefficient of variation of the gaps on the clock that those rates drive."""

    start_s: FloatArray
    rps: FloatArray
    cv: float


def arrivals(arrival_s: FloatArray, piece_s: float) -> ArrivalFit:
    """Rates of pieces of `piece_s` (the last may be shorter), and the burstiness that is left within them.

    Counts scatter also where the rate is steady, and will again when arrivals are drawn: the rates are drawn together so
    far that rates and scatter together vary as the counts do.
    """
    span = float(arrival_s[-1]) if len(arrival_s) else 0.0
    pieces = max(1, round(span / piece_s))
    edges = np.linspace(0.0, max(span, 1e-9), pieces + 1)
    counts = np.histogram(arrival_s, edges)[0].astype(float)
    scattered = float(counts.var()) / max(float(counts.mean()), 1e-9)
    within = min(_bent_cv(arrival_s, edges, counts) ** 2, scattered)
    drawn_together = counts.mean() + (counts - counts.mean()) * np.sqrt(1 - within / scattered if scattered else 1.0)
    return ArrivalFit(edges[:-1], drawn_together / np.diff(edges), _bent_cv(arrival_s, edges, drawn_together))


def _bent_cv(arrival_s: FloatArray, edges: FloatArray, expected: FloatArray) -> float:
    """Coefficient of variation of the gaps on the clock that `expected` arrivals per piece drive."""
    gaps = np.diff(np.interp(arrival_s, edges, np.concatenate([[0.0], np.cumsum(expected)])))
    return float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.mean() > 0 else 1.0
