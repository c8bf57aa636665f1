"""A promise about latency: its text, whether a run kept it, and when a run can no longer keep it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sim.errors import ScenarioError

if TYPE_CHECKING:
    from sim.fleet import Fleet
    from sim.fleet_member import Ticket

FloatArray = npt.NDArray[np.float64]
METRICS = ("ttft", "tpot", "e2el")
UNITS = {"s": 1.0, "ms": 1e-3}
LOOK_S = 0.5
"""Simulated seconds between two looks of a `Watch`."""

_TERM = re.compile(r"(\w+?)_(mean|p\d{1,2}(?:\.\d+)?)\s*<=\s*([0-9.]+(?:e-?\d+)?)\s*(ms|s)")


@dataclass(frozen=True, slots=True)
class Limit:
    """One bound: the `percentile` (None: the mean) of `metric` over all requests is at most `limit_s`."""

    metric: str
    percentile: float | None
    limit_s: float

    @property
    def name(self) -> str:
        return f"{self.metric}_{'mean' if self.percentile is None else f'p{self.percentile:g}'}"

    def value(self, values_s: FloatArray) -> float:
        """What is held against the limit; 0 without any request."""
        if len(values_s) == 0:
            return 0.0
        if self.percentile is None:
            return float(values_s.mean())
        with np.errstate(invalid="ignore"):  # between two unfinished requests
            value = float(np.percentile(values_s, self.percentile))
        return math.inf if math.isnan(value) else value

    def allowed(self, count: int) -> float:
        """How many of `count` values may exceed the limit before the percentile surely does."""
        if self.percentile is None:
            return math.inf
        return count - 1 - math.floor(self.percentile / 100 * (count - 1))


@dataclass(frozen=True, slots=True)
class Promise:
    """`limits`, all of them, and at least `attainment` of the requests within every limit's bound at once (None: any)."""

    limits: tuple[Limit, ...]
    attainment: float | None = None

    def __str__(self) -> str:
        text = ", ".join(f"{limit.name}<={limit.limit_s:g}s" for limit in self.limits)
        return text if self.attainment is None else f"{text}, attainment>={self.attainment:g}"

    def allowed(self, count: int) -> float:
        """How many of `count` requests may miss a bound."""
        return math.inf if self.attainment is None else math.floor((1 - self.attainment) * count + 1e-9)


def parse_slo(text: str, attainment: float | None = None) -> Promise:
    """`ttft_p99<=1.0s, tpot_p99<=60ms` as a promise. Raises `ScenarioError` for anything else."""
    limits = []
    for term in text.split(","):
        match = _TERM.fullmatch(term.strip())
        if match is None or match[1] not in METRICS or not float(match[3]) > 0:
            raise ScenarioError(
                f"--slo {term.strip()!r}: must be METRIC_STATISTIC<=NUMBER UNIT with {', '.join(METRICS)}; mean or p1 to"
                " p99.9; s or ms; such as ttft_p99<=1.0s"
            )
        percentile = None if match[2] == "mean" else float(match[2][1:])
        limits.append(Limit(match[1], percentile, float(match[3]) * UNITS[match[4]]))
    if attainment is not None and not 0 < attainment <= 1:
        raise ScenarioError(f"--attainment is {attainment}, must be in (0, 1]")
    return Promise(tuple(limits), attainment)


def times_s(tickets: Sequence[Ticket]) -> dict[str, FloatArray]:
    """TTFT, TPOT (nan with one token) and E2E of finished requests, in seconds; `inf` for those that are not."""
    arrival, first, finish, emitted = _progress(tickets)
    there = ~np.isnan(finish)
    tpot = np.divide(finish - first, emitted - 1, out=np.full(len(finish), math.nan), where=emitted > 1)
    times = {"ttft": first - arrival, "tpot": tpot, "e2el": finish - arrival}
    return {metric: np.where(there, column, math.inf) for metric, column in times.items()}


def _progress(tickets: Sequence[Ticket]) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Arrival, first token, finish (nan: not yet) and tokens so far of each, float64[n]."""
    rows = [(ticket.state.arrival_s, *ticket.state.progress()) for ticket in tickets]
    arrival, first, finish, emitted = np.array(rows, dtype=np.float64).reshape(len(rows), 4).T
    return arrival, first, finish, emitted


def values_of(promise: Promise, times: Mapping[str, FloatArray]) -> dict[str, float]:
    """What each limit is held against, by its name."""
    return {limit.name: limit.value(times[limit.metric][~np.isnan(times[limit.metric])]) for limit in promise.limits}


def attained(promise: Promise, times: Mapping[str, FloatArray]) -> float:
    """The share of requests within every limit's bound."""
    within = [~(times[limit.metric] > limit.limit_s) for limit in promise.limits]
    return float(np.logical_and.reduce(within).mean()) if len(times["ttft"]) else 1.0


def keeps(promise: Promise, times: Mapping[str, FloatArray]) -> bool:
    """Whether the promise is kept over these requests."""
    values = values_of(promise, times)
    kept = all(values[limit.name] <= limit.limit_s for limit in promise.limits)
    return kept and (promise.attainment is None or attained(promise, times) >= promise.attainment)


class Watch:
    """Follows runs that are judged together, and says when the promise is broken whatever comes: no guess.

    `outputs`: output tokens of all their requests. Use one for all seeds, `next_run()` before each.
    """

    def __init__(self, promise: Promise, outputs: Sequence[int]) -> None:
        several = sum(n > 1 for n in outputs)
        self._promise = promise
        self._room = {
            limit.name: limit.allowed(several if limit.metric == "tpot" else len(outputs)) for limit in promise.limits
        }
        self._joint = promise.allowed(len(outputs))
        self.next_run()

    def next_run(self) -> None:
        """Another run begins."""
        self._seen = 0
        self._open: list[Ticket] = []
        self._missed = np.zeros((0, len(self._promise.limits)), dtype=np.bool_)
        self._looked_s = 0.0

    def __call__(self, fleet: Fleet) -> bool:
        """Whether nothing can save the promise any more."""
        now = fleet.env.now
        if now - self._looked_s < LOOK_S:
            return False
        self._looked_s = now
        fresh = fleet.tickets[self._seen :]
        self._seen = len(fleet.tickets)
        self._open += fresh
        self._missed = np.vstack([self._missed, np.zeros((len(fresh), len(self._promise.limits)), dtype=np.bool_)])
        self._look(now)
        return self._joint < 0 or any(room < 0 for room in self._room.values())

    def _look(self, now: float) -> None:
        """Note what the open requests have missed by now; those that finished are closed."""
        arrival, first, finish, emitted = _progress(self._open)
        done, before = ~np.isnan(finish), self._missed.any(axis=1)
        so_far = {
            "ttft": np.where(np.isnan(first), now, first) - arrival,
            "tpot": np.divide(finish - first, emitted - 1, out=np.zeros(len(done)), where=done & (emitted > 1)),
            "e2el": np.where(done, finish, now) - arrival,
        }
        for i, limit in enumerate(self._promise.limits):
            missed = (so_far[limit.metric] > limit.limit_s) & ~self._missed[:, i]
            self._room[limit.name] -= int(missed.sum())
            self._missed[:, i] |= missed
        self._joint -= int((self._missed.any(axis=1) & ~before).sum())
        self._open = [ticket for ticket, gone in zip(self._open, done.tolist(), strict=True) if not gone]
        self._missed = self._missed[~done]
