"""What a plan chooses from: engines, GPU kinds and routes, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sim.deployment import Deployment
from sim.errors import ScenarioError
from sim.fleet_config import FleetConfig
from sim.plan_search import Candidate, with_router
from sim.scenario import Scenario
from sim.traffic import Traffic
from workloads.adapters import Catalogue

ROUTES = (
    ("least_outstanding", "everywhere"),
    ("adapter_affinity", "everywhere"),
    ("bounded_hashing", "everywhere"),
    ("gateway_scorers", "everywhere"),
    ("least_outstanding", "packed"),
    ("least_outstanding", "hot_copies"),
)
"""Router and placement, where there is more than one replica."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256)
"""Values that vLLM's `--max-lora-rank` takes."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What a plan chooses from; empty: by the scenario."""

    profiles: tuple[str, ...] = ()
    max_loras: tuple[int, ...] = ()
    max_cpu_loras: tuple[int, ...] = ()
    splits: tuple[int, ...] | None = None
    routes: tuple[tuple[str, str], ...] = ROUTES
    most_replicas: int = 64
    seeds: int = 3
    jobs: int = 2


def vllm_rank(catalogue: Catalogue) -> int:
    """The least `--max-lora-rank` of vLLM that takes every adapter."""
    top = max((a.rank for a in catalogue), default=8)
    return next((r for r in VLLM_RANKS if r >= top), top)


def candidates_of(scenario: Scenario, traffic: Traffic, grid: Grid, prices: dict[str, float]) -> list[Candidate]:
    """Every engine and route of the grid that fits the traffic's ranks; cheap GPUs first, then what usually wins."""
    rank = vllm_rank(traffic.catalogue)
    count = max(1, len(traffic.catalogue))
    slots = grid.max_loras or tuple(n for n in (4, 8, 16, 32, 64, 128) if n < 2 * count) or (count,)
    out = []
    for profile in sorted(prices, key=lambda p: prices[p]):
        for router, placement in grid.routes:
            for max_loras in sorted(slots, key=lambda n: (abs(math.log2(n / 32)), n)):
                for host in _hosts(scenario, grid, max_loras, count):
                    engine = replace(scenario.engine, max_loras=max_loras, max_cpu_loras=host, max_lora_rank=rank)
                    deployment = Deployment(scenario.geometry, profile, engine, FleetConfig())
                    out.append(Candidate(with_router(deployment, router, placement), prices[profile]))
    return out


def _hosts(scenario: Scenario, grid: Grid, max_loras: int, count: int) -> list[int]:
    """`max_cpu_loras` to try: those given, else the scenario's (vLLM's default: `max_loras`) and room for all adapters."""
    given = grid.max_cpu_loras or (scenario.engine.max_cpu_loras or max_loras, count)
    return sorted({max(max_loras, n) for n in given if n} or {max_loras}, reverse=True)


def prices_of(scenario: Scenario, profiles: Sequence[str]) -> tuple[dict[str, float], bool]:
    """Price per hour of each profile's GPU, and whether it is in USD: without any price a GPU hour counts 1."""
    given = {profile: scenario.cost.of(profile) for profile in profiles}
    missing = [profile for profile, price in given.items() if price is None]
    if missing and len(profiles) > 1:
        raise ScenarioError(f"cost.gpu_hour_usd: needs a price for {missing[0]}, to compare {len(profiles)} GPU kinds")
    return {profile: price or 1.0 for profile, price in given.items()}, not missing
