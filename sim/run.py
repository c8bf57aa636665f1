"""Run a scenario: from a file to tables, summary and a run directory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from backend.base import Backend, EngineLimits
from backend.factory import open_backend
from backend.geometry import load_geometry
from sim import run_dir
from sim.catalogue import catalogue_of, drawn_from, pinned_ids
from sim.config import EngineConfig
from sim.engine import simulate
from sim.errors import ScenarioError
from sim.fleet import Fleet
from sim.fleet_tables import fleet_tables
from sim.metrics import summarise
from sim.scenario import Scenario, load_scenario
from sim.tables import RunTables
from workloads.adapters import Catalogue
from workloads.build import build_workload
from workloads.workload import Workload

OnStep = Callable[[float, int], None]


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run: its tables, its summary, what to know of it, and where it lies."""

    tables: RunTables
    summary: dict[str, object]
    notes: tuple[str, ...]
    out: Path


def limits_of(config: EngineConfig) -> EngineLimits:
    """The part of the engine's configuration that a backend must know."""
    return EngineLimits(
        config.max_loras,
        config.max_lora_rank,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.max_model_len,
        config.block_size,
        config.gpu_memory_utilization,
    )


def run_scenario(
    scenario: Scenario | str | Path,
    *,
    backend: str | None = None,
    profile: str | None = None,
    out: Path | None = None,
    duration_s: float | None = None,
) -> RunResult:
    """Simulate `scenario` (a file, a shipped name, or a `Scenario`) and write its run directory.

    `backend`, `profile` and `duration_s` (of arrivals) override the scenario. Raises `ScenarioError`, `WorkloadError`
    or `BackendError` for bad input; then no run directory is left.
    """
    if not isinstance(scenario, Scenario):
        scenario = load_scenario(str(scenario))
    if duration_s is not None and not 0 < duration_s < float("inf"):
        raise ScenarioError(f"--duration-s is {duration_s}, must be finite and > 0")
    workload_table = scenario.workload if duration_s is None else {**scenario.workload, "duration_s": duration_s}
    scenario = replace(
        scenario, backend=backend or scenario.backend, profile=profile or scenario.profile, workload=workload_table
    )
    target = run_dir.choose(scenario.name, out)
    tables, summary, notes = execute(scenario, progress=sys.stderr.isatty())
    error = f", profile MAPE {summary['profile_mape']:.1%}" if "profile_mape" in summary else ""
    caption = f"{scenario.name}, {summary['backend']}{error}, seed {scenario.seed}"
    run_dir.write(target, scenario, tables, summary, caption)
    return RunResult(tables, summary, notes, target)


def execute(scenario: Scenario, *, progress: bool = False) -> tuple[RunTables, dict[str, object], tuple[str, ...]]:
    """Simulate `scenario` without writing anything: its tables, its summary, and what to know of its workload."""
    geometry = load_geometry(scenario.geometry)
    workload = build_workload(
        scenario.workload, adapter_count=drawn_from(scenario), seed=scenario.seed, base_dir=scenario.base_dir
    )
    catalogue = catalogue_of(scenario, workload, geometry)
    pinned = pinned_ids(scenario, catalogue)
    with tqdm(total=len(workload.requests), unit="req", disable=not progress, delay=2) as bar:

        def advance(_: float, finished: int) -> None:
            if finished >= 0:
                bar.update(finished - bar.n)

        play = _one_engine if scenario.fleet.single else _fleet
        tables, blocks, executed = play(scenario, workload, catalogue, pinned, advance)
    sizes = [geometry.lora_bytes(adapter.rank, adapter.target_modules) for adapter in catalogue]
    tables.adapters.insert(3, "nbytes", sizes)
    summary: dict[str, object] = {
        "scenario": scenario.name,
        "backend": scenario.backend if scenario.backend != "profile" else f"profile {scenario.profile}",
        "seed": scenario.seed,
        "num_gpu_blocks": blocks,
        "steps_executed_on_device": executed,
        **summarise(tables),
        **fleet_facts(scenario, tables),
        **profile_facts(scenario),
    }
    return tables, summary, workload.notes


Played = tuple[RunTables, int, int]
"""Tables, KV blocks of an engine, and steps that a device executed."""


def open_engine(scenario: Scenario) -> Backend:
    """A backend as the scenario says."""
    return open_backend(
        scenario.backend,
        geometry=load_geometry(scenario.geometry),
        limits=limits_of(scenario.engine),
        profile=scenario.profile,
        gpu_bytes=None if scenario.gpu_memory_gib is None else int(scenario.gpu_memory_gib * (1 << 30)),
        seed=scenario.seed,
    )


def _one_engine(
    scenario: Scenario, workload: Workload, catalogue: Catalogue, pinned: tuple[int, ...], advance: OnStep
) -> Played:
    opened = open_engine(scenario)
    try:
        tables = simulate(
            workload.requests,
            catalogue,
            scenario.engine,
            opened,
            pinned=pinned,
            check=scenario.check,
            horizon_s=scenario.horizon_s,
            on_step=advance,
        )
        return tables, opened.capacity().num_gpu_blocks, getattr(opened, "steps_executed", 0)
    finally:
        opened.close()


def _fleet(
    scenario: Scenario, workload: Workload, catalogue: Catalogue, pinned: tuple[int, ...], advance: OnStep
) -> Played:
    if scenario.backend != "profile":
        raise ScenarioError(f"fleet: needs backend.kind profile, is {scenario.backend}: one machine is not a fleet")
    fleet = Fleet(
        workload.requests,
        catalogue,
        scenario.engine,
        lambda: open_engine(scenario),
        scenario.fleet,
        pinned=pinned,
        check=scenario.check,
        seed=scenario.seed,
    )

    def watch(fleet: Fleet) -> bool:
        advance(fleet.env.now, sum(ticket.state.finish_s is not None for ticket in fleet.tickets))
        return False

    fleet.run(scenario.horizon_s, watch, every=4096)
    return fleet_tables(fleet), open_engine(scenario).capacity().num_gpu_blocks, 0


def fleet_facts(scenario: Scenario, tables: RunTables) -> dict[str, object]:
    """What a fleet amounts to beyond its requests; `cost_usd` where a price is given."""
    price = None if scenario.profile is None else scenario.cost.of(scenario.profile)
    if tables.replicas is None:
        return {} if price is None else {"cost_usd": price * tables.horizon_s / 3600}
    hours = float(tables.replicas["paid_s"].sum()) / 3600
    facts: dict[str, object] = {
        "router": scenario.fleet.router,
        "placement": scenario.fleet.placement,
        "replicas": len(tables.replicas),
        "replica_hours": hours,
        "requeues": int(tables.requests["requeues"].sum()),
        "lost_tokens": int(tables.requests["lost_tokens"].sum()),
    }
    return facts if price is None else {**facts, "cost_usd": price * hours}


def profile_facts(scenario: Scenario) -> dict[str, object]:
    """How good the profile behind the answer is."""
    if scenario.backend != "profile" or scenario.profile is None:
        return {}
    from backend.profile import load_profile

    loaded = load_profile(scenario.profile)
    engine = f"vLLM {loaded.meta['vllm']} on " if "vllm" in loaded.meta else ""
    return {
        "profile_gpu": f"{engine}{loaded.meta.get('gpu')}",
        **{f"profile_{k}": v for k, v in loaded.accuracy.items()},
    }
