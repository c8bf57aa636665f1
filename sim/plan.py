"""`multilora plan`: the cheapest deployment that keeps a promise, how sure that is, and what would break it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import joblib
import numpy as np

from backend.errors import BackendError
from backend.profile import load_profile
from sim.deployment import Trial, attempt
from sim.errors import ScenarioError
from sim.plan_checks import binds_of, headroom_of, rate_of
from sim.plan_grid import Grid, candidates_of, prices_of
from sim.plan_search import Candidate, Found, Judge, Part, improve, search
from sim.scenario import Scenario
from sim.slo import Promise
from sim.traffic import Traffic, keep_ranks, traffic_of
from workloads.adapters import Catalogue


@dataclass(frozen=True, slots=True)
class Runner:
    """The plan with one thing changed in one part: what, the cost per hour of the whole, that part's trial, its P99 TTFT in all."""

    change: str
    cost: float
    trial: Trial
    p99_ttft_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer. `parts`: one deployment, or one for small and one for large ranks; `runners`: what else was looked at."""

    parts: tuple[Part, ...]
    promise: Promise
    priced: bool
    trials: list[Trial]
    rates: list[tuple[float, float]]
    headroom: dict[str, bool | None]
    binds: dict[str, float]
    runners: list[Runner]
    tried: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """Per hour: USD where prices are given, else GPUs."""
        return sum(part.found.cost for part in self.parts)


def plan(scenario: Scenario, promise: Promise, grid: Grid) -> Plan:
    """Search the grid and examine the best. Raises `ScenarioError` if nothing keeps the promise."""
    started = time.monotonic()
    if scenario.backend != "profile":
        raise ScenarioError(f"a plan needs backend.kind profile, is {scenario.backend}")
    profiles = grid.profiles or ((scenario.profile,) if scenario.profile else ())
    if not profiles:
        raise ScenarioError("a plan needs a profile: --profile or backend.profile")
    prices, priced = prices_of(scenario, profiles)
    for profile in profiles:
        measured = load_profile(profile).meta.get("geometry")
        if measured != scenario.geometry:
            raise ScenarioError(f"--profile {profile}: measured for {measured}, the model is {scenario.geometry}")
    traffic = tuple(traffic_of(scenario, scenario.seed + i) for i in range(grid.seeds))
    with joblib.Parallel(n_jobs=grid.jobs) as pool:
        searcher = Searcher(scenario, promise, grid, prices, pool)
        parts = searcher.best(traffic)
        if parts is None:
            raise ScenarioError(
                f"no deployment of the grid keeps {promise} with up to {grid.most_replicas} replicas"
                f" ({searcher.tried} trials); loosen the promise, allow more replicas or another GPU"
            )
        trials = [attempt(part.found.deployment, part.traffic, promise) for part in parts]
        runners = searcher.runners(parts, trials)
        rates = [rate_of(part, promise, pool) for part in parts]
        headroom = headroom_of(parts, promise, pool)
        binds = binds_of(parts, promise, rates, pool)
    return Plan(
        parts, promise, priced, trials, rates, headroom, binds, runners, searcher.tried, time.monotonic() - started,
        _notes(scenario, traffic),
    )  # fmt: skip


def _notes(scenario: Scenario, traffic: Sequence[Traffic]) -> list[str]:
    notes = []
    first = traffic[0].requests
    if len(traffic) > 1 and all(np.array_equal(first.arrival_s, t.requests.arrival_s) for t in traffic[1:]):
        same = all(np.array_equal(first.adapter, t.requests.adapter) for t in traffic[1:])
        what = "nothing of this workload" if same else "only the adapters, not the arrivals,"
        notes.append(f"{what} depends on the seed: intervals say less than they seem to")
    if scenario.engine.max_cpu_loras is None:
        notes.append("host memory is taken to be free: max_cpu_loras may have room for all adapters")
    return notes


class Searcher:
    """Searches the grid for a scenario, on `pool`'s processes."""

    def __init__(
        self, scenario: Scenario, promise: Promise, grid: Grid, prices: dict[str, float], pool: joblib.Parallel
    ) -> None:
        self.scenario = scenario
        self.promise = promise
        self.grid = grid
        self.prices = prices
        self.pool = pool
        self.tried = 0

    def best(self, traffic: tuple[Traffic, ...]) -> tuple[Part, ...] | None:
        """One engine for all, or where that is cheaper small and large ranks apart."""
        whole = self.cheapest(traffic, None)
        best: tuple[Part, ...] | None = None if whole is None else (Part("all adapters", traffic, whole),)
        for split in self._splits(traffic[0].catalogue):
            most = None if best is None else sum(part.found.cost for part in best)
            apart = self._apart(traffic, split, most)
            if apart is not None:
                best = apart
        return best

    def _splits(self, catalogue: Catalogue) -> list[int]:
        ranks = sorted({a.rank for a in catalogue})
        if self.grid.splits is not None:
            return [s for s in self.grid.splits if ranks and ranks[0] <= s < ranks[-1]]
        return ranks[:-1]

    def _apart(self, traffic: tuple[Traffic, ...], split: int, most: float | None) -> tuple[Part, ...] | None:
        """Two deployments, if they cost less than `most`."""
        small = tuple(keep_ranks(t, 0, split, base=True) for t in traffic)
        large = tuple(keep_ranks(t, split, 10_000, base=False) for t in traffic)
        if any(len(t.requests) == 0 for t in (*small, *large)):
            return None
        parts: list[Part] = []
        cheapest = min(self.prices.values())
        for name, some in ((f"ranks up to {split}", small), (f"ranks above {split}", large)):
            spent = sum(part.found.cost for part in parts)
            left = None if most is None else most - spent - (cheapest if not parts else 0.0)
            found = None if left is not None and left <= cheapest * (1 - 1e-9) else self.cheapest(some, left)
            if found is None or (left is not None and found.cost >= left * (1 - 1e-9)):
                return None
            parts.append(Part(name, some, found))
        return tuple(parts)

    def cheapest(self, traffic: tuple[Traffic, ...], below: float | None) -> Found | None:
        """The best candidate for this traffic with cost below `below`; None if there is none."""
        candidates = candidates_of(self.scenario, traffic[0], self.grid, self.prices)
        room = math.inf if below is None else below * (1 - 1e-9)

        def evaluate(some: Sequence[Candidate], best: Found | None) -> Iterable[Found | None]:
            worth = [c for c in some if c.price < room and not (best is not None and _same_alone(c, best, self.grid))]
            answers = self.pool(
                joblib.delayed(_improve)(c, best, traffic, self.promise, self._most(c, room)) for c in worth
            )
            self.tried += sum(tried for _, tried in answers)
            return [found for found, _ in answers]

        return search(candidates, evaluate)

    def _most(self, candidate: Candidate, room: float) -> int:
        return (
            self.grid.most_replicas if room == math.inf else min(self.grid.most_replicas, int(room / candidate.price))
        )

    def runners(self, parts: tuple[Part, ...], trials: Sequence[Trial]) -> list[Runner]:
        """The plan with one thing changed at a time: what keeps the promise first, then by cost."""
        out = []
        for i, part in enumerate(parts):
            prefix = f"{part.name}: " if len(parts) > 1 else ""
            others = [n for n in range(len(parts)) if n != i]
            cost = sum(parts[n].found.cost for n in others)
            slowest = max((trials[n].facts["p99_ttft_s"] for n in others), default=0.0)
            changed = [*self._neighbours(part), *self._more_or_fewer(part)]
            found = self.pool(joblib.delayed(_neighbour)(c, n, part.traffic, self.promise) for _, c, n in changed)
            for (name, _, _), answer in zip(changed, found, strict=True):
                if answer is not None:
                    own, trial = answer
                    ttft = max(slowest, trial.facts["p99_ttft_s"])
                    out.append(Runner(prefix + name, cost + own, trial, ttft))
        return sorted(out, key=lambda r: (not r.trial.kept, r.cost, -r.trial.attained))

    def _more_or_fewer(self, part: Part) -> Iterator[tuple[str, Candidate, int]]:
        """The plan's engines with other numbers of replicas, on each kind of GPU."""
        own, now = part.found.candidate, part.found.replicas
        for profile, price in self.prices.items():
            there = profile == own.deployment.profile
            counts = {max(1, now // 2), now - 1, now + 1, 2 * now} - {0, now}
            for count in sorted(n for n in counts if n <= self.grid.most_replicas):
                name = f"replicas {count}" if there else f"GPU {profile}, replicas {count}"
                yield name, Candidate(replace(own.deployment, profile=profile), price), count

    def _neighbours(self, part: Part) -> Iterator[tuple[str, Candidate, int]]:
        own = part.found.candidate
        seen = {own.deployment}
        engine = own.deployment.engine
        for other in candidates_of(self.scenario, part.traffic[0], self.grid, self.prices):
            d = other.deployment
            names = {
                "max_loras": d.engine.max_loras if d.engine.max_loras != engine.max_loras else None,
                "max_cpu_loras": d.engine.host_loras if d.engine.host_loras != engine.host_loras else None,
                "GPU": d.profile if d.profile != own.deployment.profile else None,
                "router": d.fleet.router if d.fleet.router != own.deployment.fleet.router else None,
                "placement": d.fleet.placement if d.fleet.placement != own.deployment.fleet.placement else None,
            }
            changes = [f"{key} {value}" for key, value in names.items() if value is not None]
            if (
                d not in seen
                and len(changes) == 1
                and (part.found.replicas > 1 or not changes[0].startswith(("ro", "pl")))
            ):
                seen.add(d)
                yield changes[0], other, part.found.replicas


def _same_alone(candidate: Candidate, best: Found, grid: Grid) -> bool:
    """With one replica routes do not matter: of such candidates the first speaks for all."""
    first = candidate.deployment.fleet
    alone = best.cost <= candidate.price * (1 + 1e-9)
    return alone and (first.router, first.placement) != grid.routes[0]


def _improve(
    candidate: Candidate, best: Found | None, traffic: tuple[Traffic, ...], promise: Promise, most: int
) -> tuple[Found | None, int]:
    judge = Judge(traffic, promise)
    return improve(candidate, best, judge, most), judge.trials


def _neighbour(
    candidate: Candidate, replicas: int, traffic: tuple[Traffic, ...], promise: Promise
) -> tuple[float, Trial] | None:
    try:
        trial = attempt(candidate.deployment.of(replicas), traffic, promise, to_the_end=True)
    except (ScenarioError, BackendError):
        return None
    return candidate.cost(replicas), trial
