"""What a plan that was found amounts to: its sustainable rate, what it stands, what binds, and how to start it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import joblib
import numpy as np

from backend.profile import load_profile
from sim.config import EngineConfig
from sim.deployment import Deployment, Relief, attempt, interval
from sim.fleet_config import FleetEvent
from sim.plan_search import Found, Part, sustainable
from sim.slo import Promise
from sim.traffic import Traffic
from workloads.adapters import Catalogue
from workloads.requests import RequestTable


def rate_of(part: Part, promise: Promise, pool: joblib.Parallel) -> tuple[float, float]:
    """Sustainable req/s per replica: mean over seeds, each by bisection, and half its 95 % interval."""
    rates = pool(joblib.delayed(_seed_rate)(part.found, t, promise) for t in part.traffic)
    return interval([rate / part.found.replicas for rate in rates])


def _seed_rate(found: Found, traffic: Traffic, promise: Promise) -> float:
    factor = sustainable(lambda f: attempt(found.deployment, [traffic], promise, factor=f).kept)
    return factor * traffic.rate_rps


def more_adapters(traffic: Traffic, times: float, seed: int) -> Traffic:
    """`times` (1 to 2) as many adapters: that part of them, drawn by lot, gets a twin of its rank, and its requests go to
    either alike. The requests are the same.
    """
    n = len(traffic.catalogue)
    rng = np.random.default_rng(seed)
    doubled = np.sort(rng.permutation(n)[: round((times - 1) * n)]) + 1
    twins = [replace(traffic.catalogue[a], name=f"{traffic.catalogue[a].name}-twin") for a in doubled.tolist()]
    adapters = tuple(replace(a, adapter_id=i) for i, a in enumerate((*traffic.catalogue, *twins), start=1))
    twin_of = np.arange(n + 1)
    twin_of[doubled] = n + 1 + np.arange(len(doubled))
    requests: RequestTable = traffic.requests
    adapter = np.where(rng.random(len(requests)) < 0.5, twin_of[requests.adapter], requests.adapter)
    return replace(traffic, requests=replace(requests, adapter=adapter), catalogue=Catalogue(adapters))


def headroom_of(parts: Sequence[Part], promise: Promise, pool: joblib.Parallel) -> dict[str, bool | None]:
    """What the plan stands: more traffic, more adapters, a replica lost (None: there is only one), slower GPUs."""
    cases = (
        "rate x1.5",
        "rate x2",
        "adapters x1.5",
        "adapters x2",
        "adapters x1.5, rate x1.5",
        "adapters x2, rate x2",
        "one replica lost",
        "steps slower by the MAPE",
    )
    answers = pool(joblib.delayed(_stands)(case, part, promise) for case in cases for part in parts)
    out: dict[str, bool | None] = {}
    for i, case in enumerate(cases):
        some = answers[i * len(parts) : (i + 1) * len(parts)]
        out[case] = None if None in some else all(some)
    return out


def _stands(case: str, part: Part, promise: Promise) -> bool | None:
    deployment, traffic = part.found.deployment, list(part.traffic)
    factor, relief = 1.0, Relief()
    events: tuple[FleetEvent, ...] = ()
    if "rate" in case:
        factor = float(case.rsplit("x", 1)[1])
    if "adapters" in case:
        times = float(case.split(",", maxsplit=1)[0].rsplit("x", 1)[1])
        traffic = [more_adapters(t, times, i) for i, t in enumerate(traffic)]
    if "MAPE" in case:
        relief = Relief(steps=1.0 + load_profile(deployment.profile).accuracy["mape"])
    if "lost" in case:
        if deployment.replicas == 1:
            return None
        half = float(traffic[0].requests.arrival_s[-1]) / 2
        events = (FleetEvent(half, "fail", 0),)
    return attempt(deployment, traffic, promise, factor=factor, relief=relief, events=events).kept


RELIEFS = {
    "KV": Relief(blocks=2.0),
    "compute": Relief(steps=0.8),
    "loads": Relief(free_loads=True),
    "host cache": Relief(free_stages=True),
}
"""What could bind, and the relief that would show it; slots as many as there are adapters are a fifth."""


def binds_of(
    parts: Sequence[Part], promise: Promise, rates: Sequence[tuple[float, float]], pool: joblib.Parallel
) -> dict[str, float]:
    """Where the first part breaks, 10 % above what it sustains: how many more requests each relief brings within bounds."""
    part, (rate, _) = parts[0], rates[0]
    now = part.traffic[0].rate_rps / part.found.replicas
    factor = 1.1 * rate / now if rate > 0 else 1.0
    slots = Relief(max_loras=max(part.found.deployment.engine.max_loras, len(part.traffic[0].catalogue)))
    reliefs = {"none": Relief(), **RELIEFS, "slots": slots}
    shares = pool(joblib.delayed(_share)(part, promise, factor, relief) for relief in reliefs.values())
    without = shares[0]
    return {name: share - without for name, share in zip(list(reliefs)[1:], shares[1:], strict=True)}


def _share(part: Part, promise: Promise, factor: float, relief: Relief) -> float:
    trial = attempt(part.found.deployment, part.traffic[:1], promise, factor=factor, relief=relief, to_the_end=True)
    return trial.attained


def vllm_command(deployment: Deployment) -> str:
    """The command line that starts one replica; what vLLM has no flag for is not in it (`unlike_vllm`)."""
    e: EngineConfig = deployment.engine
    flags = {
        "max-loras": e.max_loras, "max-cpu-loras": e.host_loras, "max-lora-rank": e.max_lora_rank,
        "max-num-seqs": e.max_num_seqs, "max-num-batched-tokens": e.max_num_batched_tokens,
        "max-model-len": e.max_model_len, "block-size": e.block_size,
        "gpu-memory-utilization": e.gpu_memory_utilization,
    }  # fmt: skip
    if e.long_prefill_token_threshold:
        flags["long-prefill-token-threshold"] = e.long_prefill_token_threshold
    text = f"vllm serve MODEL --enable-lora {' '.join(f'--{key} {value}' for key, value in flags.items())}"
    text += "" if e.enable_prefix_caching else " --no-enable-prefix-caching"
    text += "" if e.enable_chunked_prefill else " --no-enable-chunked-prefill"
    text += " --async-scheduling" if e.async_scheduling else " --no-async-scheduling"
    return text + (" --scheduling-policy priority" if e.scheduling_policy == "priority" else "")


def unlike_vllm(engine: EngineConfig) -> list[str]:
    """Policies of the scenario that vLLM has no flag for."""
    theirs = {
        "scheduling_policy": ("fcfs", "priority"), "lora_eviction_policy": ("lru",), "lora_loading": ("blocking",),
    }  # fmt: skip
    return [f"{key} = {getattr(engine, key)}" for key, known in theirs.items() if getattr(engine, key) not in known]
