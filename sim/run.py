"""Run a scenario: from a file to tables, summary and a run directory."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from backend.base import Backend, EngineLimits
from backend.factory import open_backend
from backend.geometry import load_geometry
from sim import run_dir
from sim.catalogue import catalogue_of, drawn_from, pinned_ids
from sim.compiled import Rows
from sim.config import EngineConfig
from sim.engine import OnStep, simulate
from sim.errors import ScenarioError
from sim.fleet import Fleet
from sim.fleet_tables import fleet_tables
from sim.metrics import summarise
from sim.scenario import Scenario, load_scenario
from sim.tables import RunTables
from workloads.adapters import Catalogue
from workloads.build import build_workload
from workloads.workload import Workload


@dataclass(frozen=True)
class RunResult:
    """A finished run: its summary, what to know of it, and where it lies."""

    summary: dict[str, object]
    notes: tuple[str, ...]
    out: Path

    @cached_property
    def tables(self) -> RunTables:
        """Its tables, read from where it lies when they are asked for."""
        return run_dir.read_tables(self.out)


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
    step_rows: bool | None = None,
    deterministic: bool = False,
    verify: int | None = None,
) -> RunResult:
    """Simulate `scenario` (a file, a shipped name, or a `Scenario`) and write its run directory.

    `backend`, `profile`, `duration_s` (of arrivals), `step_rows`, `deterministic` and `verify` override the scenario. Raises `ScenarioError`, `WorkloadError`
    or `BackendError` for bad input; then no run directory is left.
    """
    if not isinstance(scenario, Scenario):
        scenario = load_scenario(str(scenario))
    if duration_s is not None and not 0 < duration_s < float("inf"):
        raise ScenarioError(f"--duration-s is {duration_s}, must be finite and > 0")
    if verify is not None and verify < 0:
        raise ScenarioError(f"--verify is {verify}, must be how many steps lie between checked ones, or 0 for none")
    workload_table = scenario.workload if duration_s is None else {**scenario.workload, "duration_s": duration_s}
    scenario = replace(
        scenario,
        backend=backend or scenario.backend,
        profile=profile or scenario.profile,
        workload=workload_table,
        step_rows=scenario.step_rows if step_rows is None else step_rows,
        deterministic=deterministic or scenario.deterministic,
        verify=scenario.verify if verify is None else verify,
    )
    target = run_dir.choose(scenario.name, out)
    with run_dir.RunFiles(target) as files:
        tables, summary, notes = execute(scenario, progress=sys.stderr.isatty(), on_rows=files.rows)
        error = f", profile MAPE {summary['profile_mape']:.1%}" if "profile_mape" in summary else ""
        kept = "" if scenario.step_rows else ", no step rows kept"
        caption = f"{scenario.name}, {summary['backend']}{error}, seed {scenario.seed}{kept}"
        files.finish(scenario, tables, summary, caption)
    return RunResult(summary, notes, target)


def execute(
    scenario: Scenario, *, progress: bool = False, on_rows: Rows | None = None
) -> tuple[RunTables, dict[str, object], tuple[str, ...]]:
    """Simulate `scenario` without writing anything: its tables, its summary, and what to know of its workload.

    `on_rows` takes the rows of steps and moves as they come; they are not in the tables then.
    """
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
        tables, blocks, executed, verified = play(scenario, workload, catalogue, pinned, advance, on_rows)
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
        **({"verified": verified} if verified else {}),
    }
    return tables, summary, workload.notes


Played = tuple[RunTables, int, int, dict[str, object]]
"""Tables, KV blocks of an engine, steps that a device executed, and what was compared of them (`backend.verify`)."""


def open_engine(scenario: Scenario) -> Backend:
    """A backend as the scenario says."""
    return open_backend(
        scenario.backend,
        geometry=load_geometry(scenario.geometry),
        limits=limits_of(scenario.engine),
        profile=scenario.profile,
        gpu_bytes=None if scenario.gpu_memory_gib is None else int(scenario.gpu_memory_gib * (1 << 30)),
        seed=scenario.seed,
        deterministic=scenario.deterministic,
        verify=scenario.verify,
    )


def _one_engine(
    scenario: Scenario,
    workload: Workload,
    catalogue: Catalogue,
    pinned: tuple[int, ...],
    advance: OnStep,
    on_rows: Rows | None,
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
            step_rows=scenario.step_rows,
            on_rows=on_rows,
            fast_forward=scenario.fast_forward,
        )
        verified = opened.report() if scenario.verify else {}  # type: ignore[attr-defined]
        return tables, opened.capacity().num_gpu_blocks, getattr(opened, "steps_executed", 0), verified
    finally:
        opened.close()


def _fleet(
    scenario: Scenario,
    workload: Workload,
    catalogue: Catalogue,
    pinned: tuple[int, ...],
    advance: OnStep,
    on_rows: Rows | None,
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
        step_rows=scenario.step_rows,
        fast_forward=scenario.fast_forward,
    )

    def watch(fleet: Fleet) -> bool:
        advance(fleet.env.now, sum(ticket.state.finish_s is not None for ticket in fleet.tickets))
        return False

    fleet.run(scenario.horizon_s, watch, every=4096)
    tables = fleet_tables(fleet)
    if on_rows is not None:  # whose rows are sorted over all replicas
        on_rows(tables.steps, tables.moves)
        tables = replace(tables, steps=tables.steps.iloc[:0], moves=tables.moves.iloc[:0])
    return tables, open_engine(scenario).capacity().num_gpu_blocks, 0, {}


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
