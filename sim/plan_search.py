"""The search behind a plan: least cost first, most headroom second, without trying what cannot win.

Two assumptions prune: a deployment that keeps the promise keeps it with more replicas, and at a lower rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from backend.errors import BackendError
from sim.deployment import Deployment, attempt
from sim.errors import ScenarioError
from sim.slo import Promise
from sim.traffic import Traffic

STEP = 1.1
"""Headroom is searched on the grid of powers of this factor."""

MOST_STEPS = 15
"""Powers of `STEP` that the search climbs: more headroom than that decides nothing."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kind of replica and router, and what an hour of one replica costs."""

    deployment: Deployment
    price: float

    def cost(self, replicas: int) -> float:
        return replicas * self.price


@dataclass(frozen=True, slots=True)
class Found:
    """A candidate that keeps the promise with `replicas`, and still at `STEP ** climbed` times the rate."""

    candidate: Candidate
    replicas: int
    climbed: int

    @property
    def cost(self) -> float:
        return self.candidate.cost(self.replicas)

    @property
    def deployment(self) -> Deployment:
        return self.candidate.deployment.of(self.replicas)

    def better_than(self, other: Found | None) -> bool:
        """Cheaper, or as cheap with more headroom."""
        return other is None or (self.cost, -self.climbed) < (other.cost, -other.climbed)


@dataclass(frozen=True, slots=True)
class Part:
    """A deployment of its own for the adapters of some ranks: `name`, its traffic (a seed each) and what was found."""

    name: str
    traffic: tuple[Traffic, ...]
    found: Found


class Judge:
    """Whether a deployment keeps the promise at a rate; each question is answered by simulation once."""

    def __init__(self, traffic: Sequence[Traffic], promise: Promise) -> None:
        self._traffic = traffic
        self._promise = promise
        self._known: dict[tuple[Deployment, int], bool] = {}
        self.trials = 0

    def __call__(self, deployment: Deployment, climbed: int = 0) -> bool:
        """Whether it keeps the promise at `STEP ** climbed` times the rate. What cannot be served does not."""
        key = (deployment, climbed)
        if key not in self._known:
            self.trials += 1
            self._known[key] = self._try(deployment, STEP**climbed)
        return self._known[key]

    def _try(self, deployment: Deployment, factor: float) -> bool:
        try:
            return attempt(deployment, self._traffic, self._promise, factor=factor).kept
        except (ScenarioError, BackendError):
            return False


def least(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The least n in low … high that `holds`, which once true stays true; None if there is none."""
    if low > high or not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def greatest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The greatest n in low … high that `holds`, which does at `low` and once false stays false; in growing leaps."""
    leap = 1
    while low < high and holds(min(low + leap, high)):
        low, leap = min(low + leap, high), 2 * leap
    broken = min(low + leap, high) if low < high else high + 1
    while broken - low > 1:
        middle = (low + broken) // 2
        low, broken = (middle, broken) if holds(middle) else (low, middle)
    return low


def fewest(judge: Callable[[int], bool], most: int) -> int | None:
    """The fewest replicas that hold, at most `most`: doubled until they do, then halved between."""
    low, high = 1, 1
    while high < most and not judge(high):
        low, high = high + 1, min(2 * high, most)
    return least(low, high, judge)


def improve(candidate: Candidate, best: Found | None, judge: Judge, most: int) -> Found | None:
    """The candidate at its best where that beats `best`; else None, after as few trials as show it."""

    def keeps(replicas: int) -> bool:
        return judge(candidate.deployment.of(replicas))

    def climb(replicas: int, start: int) -> int:
        deployment = candidate.deployment.of(replicas)
        return greatest(start, MOST_STEPS, lambda steps: judge(deployment, steps))

    if best is None:
        count = fewest(keeps, most)
        return None if count is None else Found(candidate, count, climb(count, 0))
    cheaper = min(most, most_below(best.cost, candidate.price))
    count = least(1, cheaper, keeps)
    if count is not None:
        return Found(candidate, count, climb(count, 0))
    same = cheaper + 1
    if same <= most and candidate.cost(same) <= best.cost * (1 + 1e-9) and best.climbed < MOST_STEPS:
        if judge(candidate.deployment.of(same), best.climbed + 1):
            return Found(candidate, same, climb(same, best.climbed + 1))
    return None


def most_below(cost: float, price: float) -> int:
    """Most replicas that cost less than `cost`."""
    count = int(cost / price)
    while count > 0 and count * price >= cost * (1 - 1e-9):
        count -= 1
    return count


ROUND = 8
"""Candidates that are worked on against the same best one."""


def search(
    candidates: Sequence[Candidate], evaluate: Callable[[Sequence[Candidate], Found | None], Iterable[Found | None]]
) -> Found | None:
    """The best of all candidates; None if none keeps the promise.

    `evaluate(some, best)`: what `improve` says of each of `some`. They come in rounds of a fixed size, so that the
    answer does not depend on how many are worked on at once. Of equals the first wins.
    """
    best: Found | None = None
    # The first one alone: whatever it comes to spares the others the search from nothing.
    for first in (0, *range(1, len(candidates), ROUND)):
        for found in evaluate(candidates[first : first + ROUND] if first else candidates[:1], best):
            if found is not None and found.better_than(best):
                best = found
    return best


def exhaustive(candidates: Sequence[Candidate], judge: Judge, most: int) -> Found | None:
    """The same answer by trying every candidate with every number of replicas: for grids small enough."""
    best: Found | None = None
    for candidate in candidates:
        for replicas in range(1, most + 1):
            deployment = candidate.deployment.of(replicas)
            if not judge(deployment):
                continue
            climbed = 0
            while climbed < MOST_STEPS and judge(deployment, climbed + 1):
                climbed += 1
            found = Found(candidate, replicas, climbed)
            best = found if found.better_than(best) else best
    return best


def sustainable(keeps: Callable[[float], bool], *, start: float = 1.0, tolerance: float = 0.03) -> float:
    """The greatest factor that `keeps` the promise, by bisection to a relative `tolerance`; 0 if even start/1024 fails.

    Brackets by doubling or halving first; `keeps` is taken to be true below and false above one knee.
    """
    low, high = start, start
    if keeps(start):
        while keeps(high := 2 * low):
            low = high
            if low >= 1024 * start:
                return low
    else:
        while not keeps(low := high / 2):
            high = low
            if low <= start / 1024:
                return 0.0
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def with_router(deployment: Deployment, router: str, placement: str) -> Deployment:
    """The same engines behind another router and placement."""
    return replace(deployment, fleet=replace(deployment.fleet, router=router, placement=placement))
