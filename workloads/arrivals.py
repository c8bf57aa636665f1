"""Arrival processes: when requests come. A renewal process of unit rate, bent to a rate that may change with time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workloads.errors import WorkloadError

FloatArray = npt.NDArray[np.float64]

MOST_REQUESTS, MOST_PIECES = 10**8, 10**7
"""What is drawn at most; more would not fit into memory."""

PROCESSES = ("poisson", "gamma", "weibull")
"""Laws of the gaps between arrivals. `gamma` and `weibull` take a coefficient of variation, `poisson` has 1."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate that is constant between `edges_s` float64[m + 1] (from 0, rising): `rps` float64[m] >= 0."""

    edges_s: FloatArray
    rps: FloatArray

    def __post_init__(self) -> None:
        sound = (
            len(self.edges_s) == len(self.rps) + 1 > 1 and self.edges_s[0] == 0 and (np.diff(self.edges_s) > 0).all()
        )
        if not (sound and np.isfinite(self.rps).all() and (self.rps >= 0).all() and self.rps.any()):
            raise WorkloadError("a rate needs rising edges from 0 and finite rates >= 0, one of them > 0")

    def expected(self) -> FloatArray:
        """Expected arrivals up to each edge, float64[m + 1]."""
        return np.concatenate([[0.0], np.cumsum(np.diff(self.edges_s) * self.rps)])


def constant(rps: float, duration_s: float) -> Rate:
    """The same rate all the time."""
    return Rate(np.array([0.0, duration_s]), np.array([rps]))


def piecewise(start_s: FloatArray, rps: FloatArray, duration_s: float) -> Rate:
    """`rps[i]` from `start_s[i]` (the first 0) to the next start; the last one to the end."""
    inside = start_s < duration_s
    return Rate(np.append(start_s[inside], duration_s), rps[inside])


def diurnal(rps: float, amplitude: float, period_s: float, phase_s: float, duration_s: float) -> Rate:
    """`rps * (1 + amplitude * sin(2π (t + phase_s) / period_s))`, in steps of a 1440th of the period."""
    if not (0 <= amplitude <= 1 and period_s > 0):
        raise WorkloadError(f"diurnal needs amplitude from 0 to 1 and period_s > 0; got {amplitude}, {period_s}")
    if duration_s / period_s * 1440 > MOST_PIECES:
        raise WorkloadError(
            f"diurnal needs at most {MOST_PIECES // 1440} periods; {duration_s} s are more of {period_s} s"
        )
    edges = np.append(np.arange(0.0, duration_s, period_s / 1440), duration_s)
    edges = edges[np.append(True, np.diff(edges) > 0)]
    turn = 2 * np.pi / period_s
    integral = -np.diff(np.cos(turn * (edges + phase_s))) / turn
    return Rate(edges, np.maximum(0.0, rps * (1 + amplitude * integral / np.diff(edges))))


def flash_crowd(rps: float, factor: float, start_s: float, length_s: float, duration_s: float) -> Rate:
    """`rps`, but `factor` times as much for `length_s` from `start_s` on."""
    if not (factor > 0 and length_s > 0 and 0 <= start_s < duration_s):
        raise WorkloadError(
            f"flash_crowd needs factor and length_s > 0, start_s within the duration; got {factor}, {length_s}, {start_s}"
        )
    edges = np.unique([0.0, start_s, min(start_s + length_s, duration_s), duration_s])
    inside = (edges[:-1] >= start_s) & (edges[:-1] < start_s + length_s)
    return Rate(edges, np.where(inside, rps * factor, rps))


def mmpp(rps: FloatArray, mean_s: FloatArray, duration_s: float, rng: np.random.Generator) -> Rate:
    """A Markov-modulated rate: state i lasts exponentially, `mean_s[i]` on average, then any other follows.

    With Poisson arrivals that is an MMPP. It starts in a state drawn by the share of time that each has.
    """
    if not (len(rps) == len(mean_s) >= 2 and (mean_s > 0).all()):
        raise WorkloadError("mmpp needs at least two states, each with rps >= 0 and mean_s > 0")
    if duration_s / mean_s.mean() > MOST_PIECES:
        raise WorkloadError(
            f"mmpp needs at most {MOST_PIECES} changes of state; {duration_s} s of {mean_s.tolist()} have more"
        )
    states, starts = [int(rng.choice(len(rps), p=mean_s / mean_s.sum()))], [0.0]
    while (end := starts[-1] + rng.exponential(mean_s[states[-1]])) < duration_s:
        states.append((states[-1] + int(rng.integers(1, len(rps)))) % len(rps))
        starts.append(end)
    return Rate(np.append(starts, duration_s), rps[states])


def _weibull_shape(cv: float) -> float:
    """The Weibull shape whose coefficient of variation is `cv`."""
    from scipy.optimize import brentq  # a third of a second that other traffic need not wait for

    return float(brentq(lambda k: math.lgamma(1 + 2 / k) - 2 * math.lgamma(1 + 1 / k) - math.log1p(cv**2), 0.05, 500.0))


def _gaps(process: str, cv: float, count: int, rng: np.random.Generator) -> FloatArray:
    if process == "poisson":
        return rng.exponential(1.0, count)
    if process == "gamma":
        return rng.gamma(cv**-2, cv**2, count)
    shape = _weibull_shape(cv)
    gaps: FloatArray = rng.weibull(shape, count) / math.gamma(1 + 1 / shape)
    return gaps


def _first_gap(process: str, cv: float, rng: np.random.Generator) -> float:
    """The wait for the first arrival, seen from a moment that has nothing to do with the process (inspection paradox)."""
    if process == "gamma":
        spanning = rng.gamma(cv**-2 + 1, cv**2)
    elif process == "weibull":
        shape = _weibull_shape(cv)
        spanning = rng.gamma(1 + 1 / shape) ** (1 / shape) / math.gamma(1 + 1 / shape)
    else:
        return float(rng.exponential(1.0))
    return float(spanning * rng.random())


def draw(rate: Rate, process: str, cv: float, rng: np.random.Generator) -> FloatArray:
    """Arrivals, float64[n] in order: gaps of `process` with coefficient of variation `cv` where the rate is steady.

    A stationary renewal process of unit rate whose clock runs as fast as `rate` says; expected count: its integral.
    """
    if process not in PROCESSES or not 0.01 <= cv <= 100:
        raise WorkloadError(f"arrivals need one of {', '.join(PROCESSES)} and cv from 0.01 to 100; got {process}, {cv}")
    expected = rate.expected()
    if expected[-1] > MOST_REQUESTS:
        raise WorkloadError(f"a rate that asks for {expected[-1]:.3g} requests, must be at most {MOST_REQUESTS}")
    chunks = [np.array([_first_gap(process, cv, rng)])]
    while (clock := float(chunks[-1][-1])) < expected[-1]:
        count = int((expected[-1] - clock) * 1.1) + 64
        chunks.append(clock + np.cumsum(_gaps(process, cv, count, rng)))
    times = np.concatenate(chunks)
    times = times[times < expected[-1]]
    # A time never falls into a piece of zero rate: `side="right"` passes over pieces in which nothing is expected.
    piece = np.searchsorted(expected, times, side="right") - 1
    slope = np.diff(rate.edges_s)[piece] / np.diff(expected)[piece]
    bent: FloatArray = rate.edges_s[piece] + (times - expected[piece]) * slope
    return bent
