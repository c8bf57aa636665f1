"""`multilora measure`: run a grid of steps and loads on a device and write what they took as a profile."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from backend.base import AdapterShape, EngineLimits, StepBatch
from backend.compositions import Room, decode_grid, prefill_grid, random_steps
from backend.contention import facts as contention_facts
from backend.contention import measure_contention
from backend.errors import BackendError
from backend.fitting import COMPOSITION, accuracy, composition, features_of, load_curve, measured
from backend.gpu_watch import watching
from backend.heat_fit import NO_HEAT, HeatFit, fit_heat
from backend.live import GRAPH_SIZES, LiveBackend
from backend.load_turns import TURNS, LoadTurns
from backend.memory import memory_plan
from backend.predictor import Predictor
from backend.profile import Profile, measured_facts, write_profile
from backend.regression import Engine, fit_predictor
from backend.rounds import DECODE_TURNS, Rounds, measure_rounds, seconds_of

if TYPE_CHECKING:
    from backend.geometry import ModelGeometry

ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS = (8, 16, 32, 64)
ROUNDS = 3
"""How often prompts are executed; decodes come `rounds.DECODE_TURNS` times as often."""


def measuring_limits(device: str) -> EngineLimits:
    """The engine a profile is measured with: slots for every rank, and room for large batches."""
    if device == "cuda":
        return EngineLimits(64, max(RANKS), 256, 8192, 16384, 16, 0.9)
    return EngineLimits(8, max(RANKS), 32, 512, 4096, 16, 0.9)


def device_bytes(device: str) -> int:
    """Memory of the device; the CPU counts as one with 2 GiB, enough for its small geometry. Raises `BackendError`."""
    _check(device)
    return int(torch.cuda.get_device_properties(0).total_memory) if device == "cuda" else 2 << 30


def describe_device(device: str) -> dict[str, object]:
    """What was measured: GPU or CPU, driver, versions, date. Raises `BackendError` where torch sees no such device."""
    _check(device)
    facts: dict[str, object] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        import triton

        facts |= {"gpu": torch.cuda.get_device_name(0), "triton": triton.__version__, "cuda": str(torch.version.cuda)}
        facts["driver"] = _driver()
    else:
        facts["gpu"] = f"none ({platform.machine()} CPU, {torch.get_num_threads()} threads)"
    return facts


def _check(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("device cuda: torch sees no CUDA device here")


def _driver() -> str:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known"


def fill_slots(backend: LiveBackend, limits: EngineLimits) -> Room:
    """Load adapters of every rank into the slots, an equal share each."""
    slots: dict[int, tuple[int, ...]] = {}
    share = limits.max_loras // len(RANKS)
    for i, rank in enumerate(RANKS):
        slots[rank] = tuple(range(i * share, (i + 1) * share))
        for slot in slots[rank]:
            adapter = AdapterShape(slot + 1, rank, ALL_MODULES)
            backend.stage(adapter)
            backend.load(adapter, slot)
            backend.drop(adapter.adapter_id)
    return Room(limits, backend.num_gpu_blocks, slots)


def load_turns(backend: LiveBackend, room: Room, count: int) -> LoadTurns:
    """`count` adapters of every rank to be read and copied while steps are measured."""
    shapes = [AdapterShape(10_000 + 100 * rank + i, rank, ALL_MODULES) for rank in RANKS for i in range(count)]
    return LoadTurns(backend, shapes, {rank: slots[0] for rank, slots in room.slots_of_rank.items()})


def compositions(room: Room, *, small: bool) -> list[tuple[str, StepBatch]]:
    """The steps to measure: a grid, random ones that are fitted too, and random ones that only check the fit."""
    rng = np.random.default_rng(20261123)
    count = 40 if small else 300
    steps = [("grid", batch) for batch in (*decode_grid(room, small), *prefill_grid(room, small))]
    steps += [("random", batch) for batch in random_steps(room, count, rng)]
    return steps + [("held_out", batch) for batch in random_steps(room, count, rng)]


def measure_profile(
    *, geometry: ModelGeometry, device: str, out: Path, quick: bool = False, between: Callable[[], None] | None = None
) -> Profile:
    """Measure `geometry` on `device` ("cuda" or "cpu") and write the profile into the new folder `out`.

    `quick` measures a coarse grid; `between` runs before every timed step. Writes `profile.json`, `steps.parquet`, `loads.parquet`; the folder appears whole.
    Finished rounds lie in the folder `out`.part until then: called again, a measurement that was killed goes on.
    Raises `BackendError` if `out` exists, the device cannot hold the model, or `out`.part is of another measurement.
    """
    if out.exists():
        raise BackendError(f"--out {out}: exists already; name a new folder")
    started = time.perf_counter()
    limits = measuring_limits(device)
    facts = {**describe_device(device), "geometry": geometry.name, "limits": asdict(limits)}
    facts |= {
        "rounds": ROUNDS,
        "decode_turns": DECODE_TURNS,
        "load_turns": TURNS,
        "engine_between": between is not None,
    }
    same = {"quick": quick, **{name: fact for name, fact in facts.items() if name != "date"}}
    rounds = Rounds(out.with_name(f"{out.name}.part"), same)
    gpu_bytes = device_bytes(device)
    blocks = memory_plan(geometry, limits, gpu_bytes).num_gpu_blocks
    blocks = blocks if device == "cuda" else min(blocks, 2048)
    backend = LiveBackend(geometry, limits, blocks, device=device)
    try:
        room = fill_slots(backend, limits)
        ranks = {slot: rank for rank, slots in room.slots_of_rank.items() for slot in slots}
        kinds, batches = zip(*compositions(room, small=quick or device == "cpu"), strict=True)
        turns = load_turns(backend, room, 2 if quick else 4)
        with watching(enabled=device == "cuda") as watch:
            executed = measure_rounds(
                backend, batches, ROUNDS, rounds=rounds, between=between or (lambda: None), loads=turns
            )
        turns.close()
        loads = pd.concat([rounds.loads(number) for number in range(ROUNDS)], ignore_index=True)
        contention = measure_contention(backend, room, ALL_MODULES) if device == "cuda" else None
    finally:
        backend.close()
    graph_sizes = GRAPH_SIZES if device == "cuda" else ()
    table = pd.DataFrame({"kind": kinds}).join(pd.DataFrame([composition(b, ranks) for b in batches]))
    steps, heat = rested(table, executed, graph_sizes)
    facts["heat_explains"] = round(heat.explained, 3)
    if contention is not None:
        facts["contention"] = contention_facts(contention)
    facts |= {**watch.facts, "measuring_s": round(time.perf_counter() - started, 1)}
    profile = profile_from(out.name, gpu_bytes, graph_sizes, steps, loads, facts, heat)
    write_profile(profile, steps, loads, out, executed)
    rounds.remove()
    return profile


def rested(table: pd.DataFrame, executed: pd.DataFrame, graph_sizes: Sequence[int]) -> tuple[pd.DataFrame, HeatFit]:
    """Steps with their seconds on a rested GPU, and what heat did to them (`backend.heat_fit`), told from those that the fit may see.

    `table`: `kind` and what `composition` says of each step; `executed`: what `measure_rounds` returned.
    """
    features, placing = features_of(table), Predictor(tuple(graph_sizes), {})
    tokens, regimes = [f.rows for f in features], [placing.regime(f)[0] for f in features]
    heat = fit_heat(executed, tokens, regimes, (table["kind"] != "held_out").tolist())
    cooled = executed.assign(device_s=executed["device_s"] / heat.factors(executed, tokens, regimes))
    return table.join(seconds_of(cooled)), heat


def refit_profile(kept: Path, out: Path) -> Profile:
    """Fit the steps and loads that lie in the profile folder `kept` again, and write the profile into the new folder `out`.

    Raises `BackendError` if `out` exists or `kept` is not what `measure_profile` wrote.
    """
    if out.exists():
        raise BackendError(f"--out {out}: exists already; name a new folder")
    gpu_bytes, graph_sizes, meta = measured_facts(kept)
    if "limits" not in meta:
        raise BackendError(f"--refit {kept}: made from another engine's logs; make it again with --from-steps")
    # Before heat was fitted, the order of the steps was not kept.
    tables = [kept / f"{name}.parquet" for name in ("steps", "loads", *(["rounds"] if "heat_explains" in meta else []))]
    for table in tables:
        if not table.is_file():
            raise BackendError(f"--refit {kept}: has no {table.name}")
    steps, loads, *rounds = (pd.read_parquet(table) for table in tables)
    if "query_lens" not in steps:
        raise BackendError(f"{tables[0]}: has no column query_lens; measured by an older version, measure it again")
    executed, heat = (rounds[0] if rounds else None), NO_HEAT
    if executed is not None:
        steps, heat = rested(steps[["kind", *COMPOSITION]], executed, graph_sizes)
        meta = {**meta, "heat_explains": round(heat.explained, 3)}
    profile = profile_from(out.name, gpu_bytes, graph_sizes, steps, loads, meta, heat)
    write_profile(profile, steps, loads, out, executed)
    return profile


def profile_from(
    name: str,
    gpu_bytes: int,
    graph_sizes: Sequence[int],
    steps: pd.DataFrame,
    loads: pd.DataFrame,
    meta: Mapping[str, object],
    heat: HeatFit = NO_HEAT,
) -> Profile:
    """Fit a profile to measured tables, of a GPU that `heat` has been taken from; rows of kind `held_out` only check it."""
    fitted = steps[steps["kind"] != "held_out"]
    predictor = heat.on(fit_predictor(measured(fitted), Engine(tuple(graph_sizes), bands=True)))
    return Profile(
        name,
        gpu_bytes,
        predictor,
        load_curve(loads, "stage"),
        load_curve(loads, "load"),
        accuracy(predictor, steps[steps["kind"] == "held_out"]),
        meta,
    )
