"""What N fine-tunes cost as deltas of one base, and as N whole copies of the model, on the same requests.

Three arms, each as few GPUs as keep the promise: `deltas`, one deployment with LoRA; `dedicated`, each fine-tune merged and
on GPUs of its own; `time_shared`, merged models that share GPUs, which copy whole models in (`sim/swapping.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import joblib
import numpy as np

from backend.errors import BackendError
from sim.config import EngineConfig
from sim.deployment import Deployment, open_replica
from sim.errors import ScenarioError
from sim.fleet_config import FleetConfig
from sim.plan_grid import Grid, candidates_of
from sim.plan_search import Candidate, Found, Judge, fewest, least, most_below
from sim.scenario import Scenario
from sim.slo import Promise
from sim.swapping import Swap
from sim.traffic import Traffic, merged
from workloads.adapters import Catalogue
from workloads.requests import BASE

ARMS = ("deltas", "dedicated", "time_shared")
ROUTES = (("least_outstanding", "everywhere"), ("adapter_affinity", "everywhere"))
"""Routes of the deltas: enough for the fewest replicas; `multilora plan` looks at all."""

SHARED_ROUTES = (("adapter_affinity", "everywhere"), ("least_outstanding", "packed"))
"""Routes of models that share GPUs: to one where the model lies just now, or always to the model's own."""

AGEING_S = (0.1, 1.0)
"""How long a request waits for its model before those that lie in memory let nobody in any more, so that one of them can go."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What one arm comes to: `gpus`, their price per hour, and `how` they serve."""

    gpus: int
    cost: float
    how: str


@dataclass(frozen=True, slots=True)
class Cell:
    """All arms for `tenants` fine-tunes that share `rate_rps` requests per second; None: no number of GPUs keeps the promise."""

    tenants: int
    factor: float
    rate_rps: float
    arms: dict[str, Arm | None]

    @property
    def tenant_rps(self) -> float:
        """Mean requests per second of a fine-tune."""
        return self.rate_rps / self.tenants


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of every cell: `prices` by profile, `load_bytes_per_s` of whole models by profile, `most` GPUs."""

    scenario: Scenario
    promise: Promise
    grid: Grid
    prices: dict[str, float]
    load_bytes_per_s: dict[str, float]
    most: int


def of_tenants(traffic: Traffic, tenants: int) -> Traffic:
    """The same requests as those of the first `tenants` adapters: adapters whose numbers differ by `tenants` become one."""
    requests = traffic.requests
    folded = np.where(requests.adapter == BASE, BASE, (requests.adapter - 1) % tenants + 1)
    pinned = tuple(p for p in traffic.pinned if p <= tenants)
    return Traffic(replace(requests, adapter=folded), Catalogue(traffic.catalogue.adapters[:tenants]), pinned)


def as_models(traffic: Traffic, *, base: bool) -> Traffic:
    """Each adapter as a model of its own, and with `base` the base model as one more."""
    count = len(traffic.catalogue) + base
    requests = traffic.requests
    adapter = np.where(requests.adapter == BASE, count, requests.adapter)
    return Traffic(replace(requests, adapter=adapter), Catalogue.uniform(count, [8]))


def cheapest(candidates: Sequence[Candidate], traffic: Sequence[Traffic], promise: Promise, most: int) -> Found | None:
    """The fewest replicas of the cheapest candidate that keep the promise; of equals the first."""
    judge = Judge(traffic, promise)
    best: Found | None = None
    for candidate in candidates:
        replicas = _fewest(candidate, best, judge, most)
        if replicas is not None:
            best = Found(candidate, replicas, 0)
    return best


def _fewest(candidate: Candidate, best: Found | None, judge: Judge, most: int) -> int | None:
    """As few replicas as keep the promise, if that costs less than `best`."""

    def keeps(replicas: int) -> bool:
        return judge(candidate.deployment.of(replicas))

    if best is None:
        return fewest(keeps, most)
    return least(1, min(most, most_below(best.cost, candidate.price)), keeps)


def deltas(question: Question, traffic: Sequence[Traffic]) -> Arm | None:
    """One deployment with LoRA for all."""
    candidates = candidates_of(question.scenario, traffic[0], question.grid, question.prices)
    found = cheapest(candidates, traffic, question.promise, question.most)
    if found is None:
        return None
    return Arm(found.replicas, found.cost, f"max_loras {found.deployment.engine.max_loras}")


def dedicated(question: Question, traffic: Sequence[Traffic]) -> Arm | None:
    """Each fine-tune on GPUs of its own, where it keeps the promise to its own users; one without requests takes a GPU, too."""
    gpus, cost, kinds = 0, 0.0, sorted(question.prices, key=lambda p: question.prices[p])
    candidates = [Candidate(_copies(question, kind), question.prices[kind]) for kind in kinds]
    for model in range(1, len(traffic[0].catalogue) + 1):
        own = [t for t in (merged(t, model) for t in traffic) if len(t.requests)]
        found = cheapest(candidates, own, question.promise, question.most) if own else Found(candidates[0], 1, 0)
        if found is None:
            return None
        gpus, cost = gpus + found.replicas, cost + found.cost
    return Arm(gpus, cost, "a GPU or more each")


def time_shared(question: Question, traffic: Sequence[Traffic], alone: Arm | None) -> Arm | None:
    """Models that share GPUs: fewer than each needs `alone`, else that is what sharing comes to."""
    most = question.most if alone is None else min(question.most, alone.gpus - 1)
    found = cheapest(list(_shared(question)), traffic, question.promise, most) if most else None
    if found is None or (alone is not None and found.cost >= alone.cost):
        return None if alone is None else replace(alone, how="no fewer than dedicated")
    d = found.deployment
    assert d.swap is not None
    how = f"{d.swap.resident} in GPU memory, {d.fleet.router}, {d.fleet.placement}, ageing_s {d.engine.ageing_s:g}"
    return Arm(found.replicas, found.cost, how)


def _copies(question: Question, profile: str, swap: Swap | None = None, **engine: object) -> Deployment:
    """Engines without LoRA that serve one merged model, or with `swap` as many at a time as lie in memory."""
    alone: EngineConfig = replace(
        question.scenario.engine, max_loras=1 if swap is None else swap.resident, max_cpu_loras=100_000, max_lora_rank=8, lora_loading="blocking",
        **engine,  # type: ignore[arg-type]
    )  # fmt: skip
    return Deployment(question.scenario.geometry, profile, alone, FleetConfig(), lora=False, swap=swap)


def _shared(question: Question) -> Iterator[Candidate]:
    for kind in sorted(question.prices, key=lambda p: question.prices[p]):
        top = most_resident(lambda n, kind=kind: _copies(question, kind, Swap(n, 1.0)))  # type: ignore[misc]
        for resident in sorted({1, top}, reverse=True):
            for router, placement in SHARED_ROUTES if resident == top else SHARED_ROUTES[:1]:
                for ageing_s in AGEING_S:
                    swap = Swap(resident, question.load_bytes_per_s[kind])
                    engine = {"scheduling_policy": "adapter_aware", "ageing_s": ageing_s}
                    made = _copies(question, kind, swap, **engine)
                    fleet = FleetConfig(router=router, placement=placement)
                    yield Candidate(replace(made, fleet=fleet), question.prices[kind])


def most_resident(deployment: Callable[[int], Deployment]) -> int:
    """How many whole models fit into one GPU's memory beside the KV cache of one request. At least 1."""
    count = 1
    while True:
        try:
            open_replica(deployment(count + 1))
        except BackendError:
            return count
        count += 1


def arms(question: Question, traffic: Sequence[Traffic], tenants: int, factor: float) -> dict[str, Arm | None]:
    """All arms for `tenants` fine-tunes at `factor` times the rate."""
    some = [of_tenants(t, tenants).faster(factor) for t in traffic]
    base = any((t.requests.adapter == BASE).any() for t in traffic)
    models = [as_models(t, base=base) for t in some]
    alone = dedicated(question, models)
    return {
        "deltas": deltas(question, some), "dedicated": alone, "time_shared": time_shared(question, models, alone),
    }  # fmt: skip


class Table:
    """The cells that were asked for, each worked out once, on `pool`'s processes."""

    def __init__(self, question: Question, traffic: Sequence[Traffic], pool: joblib.Parallel) -> None:
        self.question = question
        self.traffic = traffic
        self.cells: dict[tuple[float, int], Cell] = {}
        self._pool = pool

    def fill(self, keys: Sequence[tuple[float, int]]) -> None:
        """Work out the cells of (factor, tenants) that are not there yet."""
        new = [key for key in dict.fromkeys(keys) if key not in self.cells]
        answers = self._pool(joblib.delayed(arms)(self.question, self.traffic, n, f) for f, n in new)
        for (f, n), found in zip(new, answers, strict=True):
            self.cells[f, n] = Cell(n, f, self.traffic[0].rate_rps * f, found)

    def row(self, factor: float) -> list[Cell]:
        """The cells of one factor, by rising number of tenants."""
        return [self.cells[key] for key in sorted(self.cells) if key[0] == factor]

    def break_even(self, factor: float, arm: str) -> int | None:
        """The number of tenants from which on deltas cost less than `arm`; None: not up to the most that were looked at.

        Between two neighbours of the row by bisection, which takes one change of sides for granted.
        """
        row = self.row(factor)
        dearer = [c.tenants for c in row if not cheaper(c, arm)]
        if not dearer:
            return row[0].tenants
        above = [c.tenants for c in row if c.tenants > dearer[-1]]
        if not above:
            return None
        low, high = dearer[-1], above[0]
        while high - low > 1:
            middle = (low + high) // 2
            self.fill([(factor, middle)])
            low, high = (low, middle) if cheaper(self.cells[factor, middle], arm) else (middle, high)
        return high


def cheaper(some: Cell, arm: str) -> bool:
    """Whether deltas cost less than `arm` there. An arm that cannot keep the promise costs more than one that can."""
    ours, theirs = some.arms["deltas"], some.arms[arm]
    return ours is not None and (theirs is None or ours.cost < theirs.cost * (1 - 1e-9))


def check_tenants(tenants: Sequence[int], factors: Sequence[float], adapters: int) -> None:
    """Raise `ScenarioError` for numbers of tenants and rates that the traffic cannot have."""
    for n in tenants:
        if not 1 <= n <= adapters:
            raise ScenarioError(f"--tenants {n}: must be from 1 to the {adapters} adapters of the scenario")
    for f in factors:
        if not 0 < f < float("inf"):
            raise ScenarioError(f"--rate-factor {f}: must be finite and > 0")
