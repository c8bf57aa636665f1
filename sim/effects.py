"""One change at a time on the same requests: what adapter loads cost and what hides them, what base-only requests and ranks pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sim.deployment import NO_RELIEF, Deployment, Relief, open_replica, play
from sim.errors import ScenarioError
from sim.fleet_tables import uses_of
from sim.slo import times_s
from sim.traffic import Traffic
from workloads.adapters import Catalogue
from workloads.popularity import with_base
from workloads.requests import BASE

Mask = npt.NDArray[np.bool_]
RANKS = (8, 16, 32, 64, 128)
"""Values of `max_lora_rank` that are tried for adapters of the least rank."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A deployment and its traffic (a seed each) under one change; `counted`: whose requests a row tells of."""

    name: str
    deployment: Deployment
    traffic: tuple[Traffic, ...]
    counted: Mapping[str, tuple[Mask, ...]]
    relief: Relief = NO_RELIEF


@dataclass(frozen=True, slots=True)
class Effect:
    """A row: latencies in ms of the counted requests over all seeds; of the whole run its loads, their share of the steps' time
    and the share of steps outside what the profile measured; KV blocks of a replica.
    """

    name: str
    requests: int
    mean_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float
    disk_loads: int
    slot_loads: int
    load_share: float
    num_gpu_blocks: int
    extrapolated_share: float


def effects(variants: Iterator[Variant]) -> Iterator[Effect]:
    """Simulate each variant to its end."""
    for variant in variants:
        fleets = [
            play(variant.deployment, t, relief=variant.relief, seed=seed) for seed, t in enumerate(variant.traffic)
        ]
        totals = [engine.totals for f in fleets for m in f.members for engine in m.lives]
        uses = [use for f in fleets for use in uses_of(f)[0].values()]
        times = [times_s(f.tickets) for f in fleets]
        busy, steps = sum(total.busy_s for total in totals), sum(total.steps for total in totals)
        for group, masks in variant.counted.items():
            ttft, tpot = (
                np.concatenate([t[key][mask] for t, mask in zip(times, masks, strict=True)]) for key in ("ttft", "tpot")
            )
            yield Effect(
                f"{variant.name}{group and ': '}{group}", len(ttft), 1e3 * float(ttft.mean()),
                1e3 * float(np.percentile(ttft, 99)), 1e3 * float(np.nanmean(tpot)), sum(use.stages for use in uses),
                sum(use.activations for use in uses), sum(total.load_s for total in totals) / max(1e-9, busy),
                open_replica(variant.deployment, variant.relief).capacity().num_gpu_blocks,
                sum(total.extrapolated for total in totals) / max(1, steps),
            )  # fmt: skip


def _all(traffic: Sequence[Traffic]) -> Mapping[str, tuple[Mask, ...]]:
    return {"": tuple(np.ones(len(t.requests), dtype=bool) for t in traffic)}


def loads(deployment: Deployment, traffic: tuple[Traffic, ...]) -> Iterator[Variant]:
    """A host cache as small as vLLM's default, one for all adapters, pinning, overlap, and what perfect prefetch would give."""
    engine, count = deployment.engine, len(traffic[0].catalogue)
    small = replace(deployment, engine=replace(engine, max_cpu_loras=engine.max_loras, lora_loading="blocking"))
    large = replace(small, engine=replace(small.engine, max_cpu_loras=max(count, engine.max_loras)))
    counted, free = _all(traffic), tuple(replace(t, pinned=()) for t in traffic)
    half = max(1, engine.max_loras // 2)
    pinned = tuple(replace(t, pinned=hottest(t, half)) for t in traffic)
    later = replace(large, engine=replace(large.engine, lora_loading="overlapped"))
    read = Relief(free_stages=True)
    yield Variant(f"host cache of {engine.max_loras} (max_cpu_loras = max_loras)", small, free, counted)
    yield Variant(f"host cache of {count}, all adapters", large, free, counted)
    yield Variant(f"  and the {half} hottest pinned", large, pinned, counted)
    yield Variant("  and loads overlapped with steps", later, free, counted)
    yield Variant("  and all read from disk before (prefetch into host memory)", large, free, counted, read)
    yield Variant("  both: read before, loads overlapped", later, free, counted, read)
    yield Variant("nothing to load", large, free, counted, Relief(free_stages=True, free_loads=True))


def hottest(traffic: Traffic, count: int) -> tuple[int, ...]:
    """The adapters with the most requests."""
    requests = np.bincount(traffic.requests.adapter, minlength=len(traffic.catalogue) + 1)[1:]
    return tuple(int(i) + 1 for i in np.argsort(-requests, kind="stable")[:count])


def base(deployment: Deployment, traffic: tuple[Traffic, ...], share: float) -> Iterator[Variant]:
    """Base-only requests alone on an engine without LoRA, on one with it, and beside requests of adapters."""
    mixed = tuple(_with_base(t, share, seed) for seed, t in enumerate(traffic))
    masks = tuple(t.requests.adapter == BASE for t in mixed)
    if not any(mask.any() for mask in masks):
        raise ScenarioError("no request goes to the base model: give --base-share or workload.base_share")
    plain = tuple(
        replace(t, pinned=(), requests=replace(t.requests, adapter=np.zeros(len(t.requests), np.int64))) for t in mixed
    )
    yield Variant("no LoRA, all are base requests", replace(deployment, lora=False), plain, {"these": masks})
    yield Variant("LoRA on, all are base requests", deployment, plain, {"these": masks})
    others = tuple(~mask for mask in masks)
    groups = {"these": masks} | ({"the others": others} if any(mask.any() for mask in others) else {})
    yield Variant("LoRA on, the others use adapters", deployment, mixed, groups)


def _with_base(traffic: Traffic, share: float, seed: int) -> Traffic:
    adapter = with_base(traffic.requests.adapter, share, np.random.default_rng(seed))
    return replace(traffic, requests=replace(traffic.requests, adapter=adapter))


def rank(deployment: Deployment, traffic: tuple[Traffic, ...]) -> Iterator[Variant]:
    """Adapters of the least rank there is, under rising `max_lora_rank`: computed at their own rank, or padded to it."""
    least = min((a.rank for a in traffic[0].catalogue), default=8)
    counted = _all(traffic)
    for most in (r for r in RANKS if r >= least):
        bound = replace(deployment, engine=replace(deployment.engine, max_lora_rank=most))
        for name, own in (("own ranks", least), ("padded", most)):
            if name == "own ranks" or most > least:
                some = tuple(replace(t, catalogue=of_rank(t.catalogue, own)) for t in traffic)
                yield Variant(f"rank {least}, max_lora_rank {most}, {name}", bound, some, counted)


def of_rank(catalogue: Catalogue, value: int) -> Catalogue:
    """The same adapters, all of one rank. Raises `WorkloadError` for a rank that none can have."""
    return Catalogue(tuple(replace(a, rank=value) for a in catalogue))


KINDS: Mapping[str, Callable[[Deployment, tuple[Traffic, ...], float], Iterator[Variant]]] = {
    "loads": lambda deployment, traffic, _: loads(deployment, traffic),
    "base": base,
    "rank": lambda deployment, traffic, _: rank(deployment, traffic),
}
"""`--of` by name; each takes the deployment, its traffic and `--base-share`."""
