"""A deployment that a plan considers, tried on traffic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from backend.base import AdapterShape, Backend, Capacity, EngineLimits, LoadTiming, StepBatch, StepTiming
from backend.geometry import ModelGeometry, load_geometry
from backend.memory import memory_plan
from backend.predictor import Predictor
from backend.profile import Profile, load_profile
from backend.replay import ReplayBackend
from sim.config import EngineConfig
from sim.fleet import Fleet
from sim.fleet_config import FleetConfig, FleetEvent
from sim.fleet_tables import uses_of
from sim.slo import FloatArray, Promise, Watch, attained, keeps, times_s, values_of
from sim.swapping import Swap, SwappedModels, blocks_without_lora
from sim.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Deployment:
    """`replicas` engines of one kind behind a router.

    Without `lora` they have no slots, and no request may name an adapter; with `swap` adapters are whole merged models.
    """

    geometry: str
    profile: str
    engine: EngineConfig
    fleet: FleetConfig
    lora: bool = True
    swap: Swap | None = None

    @property
    def replicas(self) -> int:
        return self.fleet.replicas

    def of(self, replicas: int) -> Deployment:
        """The same with another number of replicas."""
        return replace(self, fleet=replace(self.fleet, replicas=replicas))


@dataclass(frozen=True, slots=True)
class Relief:
    """A what-if: steps that take `steps` times as long, `blocks` times the KV blocks, moves that take no time."""

    steps: float = 1.0
    blocks: float = 1.0
    free_loads: bool = False
    free_stages: bool = False
    max_loras: int | None = None


NO_RELIEF = Relief()


class WhatIf:
    """A backend under a `Relief`."""

    needs_block_tables = False

    def __init__(self, inner: ReplayBackend, relief: Relief) -> None:
        self._inner = inner
        self._relief = relief

    @property
    def step_costs(self) -> tuple[Predictor, float] | None:
        """As `ReplayBackend.step_costs`."""
        if (costs := self._inner.step_costs) is None:
            return None
        predictor, factor = costs
        return predictor, factor * self._relief.steps

    def capacity(self) -> Capacity:
        there = self._inner.capacity()
        return replace(there, num_gpu_blocks=int(there.num_gpu_blocks * self._relief.blocks))

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        timing = self._inner.stage(adapter)
        return replace(timing, elapsed_s=0.0) if self._relief.free_stages else timing

    def drop(self, adapter_id: int) -> None:
        self._inner.drop(adapter_id)

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        timing = self._inner.load(adapter, slot)
        return replace(timing, elapsed_s=0.0) if self._relief.free_loads else timing

    def execute(self, batch: StepBatch) -> StepTiming:
        timing, factor = self._inner.execute(batch), self._relief.steps
        return replace(timing, device_s=timing.device_s * factor, host_s=timing.host_s * factor)

    def close(self) -> None:
        self._inner.close()


@lru_cache(maxsize=256)
def _parts(geometry: str, profile: str, limits: EngineLimits, models: int) -> tuple[Profile, ModelGeometry, int]:
    """`models`: whole models beside each other on an engine without LoRA; 0: an engine with LoRA."""
    shapes, loaded = load_geometry(geometry), load_profile(profile)
    if models:
        return loaded, shapes, blocks_without_lora(shapes, limits, loaded.gpu_bytes, models)
    return loaded, shapes, memory_plan(shapes, limits, loaded.gpu_bytes).num_gpu_blocks


def open_replica(deployment: Deployment, relief: Relief = NO_RELIEF) -> Backend:
    """A backend for one replica. Raises `BackendError` for a model that does not fit."""
    from sim.run import limits_of

    limits, swap = limits_of(deployment.engine), deployment.swap
    models = swap.resident if swap is not None else int(not deployment.lora)
    profile, shapes, blocks = _parts(deployment.geometry, deployment.profile, limits, models)
    if swap is not None:
        return SwappedModels(profile, shapes, limits, blocks, swap)
    if relief.max_loras is not None:  # more slots, at no cost in KV blocks
        limits = replace(limits, max_loras=relief.max_loras)
    inner = ReplayBackend(profile, shapes, limits, blocks)
    return inner if relief == NO_RELIEF else WhatIf(inner, relief)


@dataclass(frozen=True, slots=True)
class Trial:
    """What a deployment came to over all seeds.

    `broken_early`: it was stopped when the promise could not be kept any more; the rest tells of what was seen until then.
    `values`: what each limit is held against, over all requests; `by_seed`: the same for each seed.
    """

    kept: bool
    broken_early: bool
    attained: float
    values: dict[str, float]
    by_seed: list[dict[str, float]]
    facts: dict[str, float]


def play(
    deployment: Deployment,
    traffic: Traffic,
    *,
    relief: Relief = NO_RELIEF,
    events: tuple[FleetEvent, ...] = (),
    seed: int = 0,
    watch: Watch | None = None,
) -> Fleet:
    """The fleet after it has served `traffic`, or after `watch` stopped it. Raises what `Fleet` raises for what cannot be served."""
    engine = deployment.engine
    if relief.max_loras is not None:
        host = max(relief.max_loras, engine.host_loras)
        engine = replace(engine, max_loras=relief.max_loras, max_cpu_loras=host)
    fleet = Fleet(
        traffic.requests, traffic.catalogue, engine, lambda: open_replica(deployment, relief),
        replace(deployment.fleet, events=events), pinned=traffic.pinned, seed=seed, step_rows=False,
    )  # fmt: skip
    fleet.run(watch=watch)
    return fleet


def attempt(
    deployment: Deployment,
    traffic: Sequence[Traffic],
    promise: Promise,
    *,
    factor: float = 1.0,
    relief: Relief = NO_RELIEF,
    events: tuple[FleetEvent, ...] = (),
    to_the_end: bool = False,
) -> Trial:
    """Try `deployment` on each seed's traffic, `factor` times as fast, all judged together.

    `to_the_end`: do not stop when the promise is broken. Raises what `Fleet` raises for what cannot be served.
    """
    watch = Watch(promise, [n for t in traffic for n in t.requests.output_tokens.tolist()])
    runs: list[Fleet] = []
    for seed, seeded in enumerate(traffic):
        watch.next_run()
        fleet = play(
            deployment, seeded.faster(factor), relief=relief, events=events, seed=seed,
            watch=None if to_the_end else watch,
        )  # fmt: skip
        runs.append(fleet)
        if not (to_the_end or fleet.settled):
            break
    times = [times_s(fleet.tickets) for fleet in runs]
    whole = {key: np.concatenate([part[key] for part in times]) for key in times[0]}
    early = not all(fleet.settled for fleet in runs)
    return Trial(
        not early and keeps(promise, whole), early, attained(promise, whole), values_of(promise, whole),
        [values_of(promise, part) for part in times], _facts(runs, whole),
    )  # fmt: skip


def _facts(runs: Sequence[Fleet], times: dict[str, FloatArray]) -> dict[str, float]:
    totals = [engine.totals for fleet in runs for member in fleet.members for engine in member.lives]
    states = [ticket.state for fleet in runs for ticket in fleet.tickets]
    busy, steps = sum(engine.busy_s for engine in totals), sum(engine.steps for engine in totals)
    engines = sum(len(fleet.members) * fleet.end_s for fleet in runs)
    finite = times["ttft"][np.isfinite(times["ttft"])]
    return {
        "p99_ttft_s": float(np.percentile(finite, 99)) if len(finite) else math.nan,
        "busy_share": busy / max(1e-9, engines),
        "load_share": sum(engine.load_s for engine in totals) / max(1e-9, busy),
        "skipped_share": sum(state.skips > 0 for state in states) / max(1, len(states)),
        "preemptions": float(sum(state.preemptions for state in states)),
        "max_kv_usage": max((engine.max_usage for engine in totals), default=0.0),
        "homes": _homes(runs),
        "stages": float(sum(engine.stages for engine in totals)),
        "extrapolated_share": sum(engine.extrapolated for engine in totals) / max(1, steps),
    }


def _homes(runs: Sequence[Fleet]) -> float:
    """How many replicas loaded an adapter, mean over the adapters that were used at all; 0 without adapters."""
    homes = [count for fleet in runs for count in uses_of(fleet)[1].values()]
    return float(np.mean(homes)) if homes else 0.0


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % confidence interval (Student's t); the half-width of one value is nan."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    from scipy.stats import t

    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(t.ppf(0.975, len(values) - 1)) * spread
