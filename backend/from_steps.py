"""A profile from another engine's step logs: planning for the engine one runs, without measuring ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from backend.errors import BackendError
from backend.fitting import accuracy, accuracy_by_regime, load_curve
from backend.geometry import ModelGeometry
from backend.online import KIND, OnlineRuns, facts_of
from backend.profile import LoadCurve, Profile, write_profile
from backend.regression import Engine
from backend.step_logs import read_loads, read_steps, read_table

VLLM_LORA_ROWS = 32
"""Rows that a block of vLLM's LoRA kernels takes by default, whole or not (`block_m` of its shrink)."""

_ENOUGH_RUNS = 2
"""Runs from which on each can be predicted from the others."""

FREE_BYTES_PER_S = 1e15
"""Stands for no cost per byte where moves of one size were measured: nothing says how they depend on it."""


def profile_from_steps(
    logs: Sequence[Path],
    held_out: Sequence[Path],
    engine: Path,
    *,
    geometry: ModelGeometry,
    rank: int,
    gpu_memory_gib: float,
    bandwidth_gb_s: float | None,
    out: Path,
    slot_tile_us: float = 0.0,
    online: Sequence[tuple[Path, int]] = (),
) -> Profile:
    """Fit a profile to `logs` (kinds in `step_logs`), check it on `held_out`, and write it into the new folder `out`.

    `online`: step logs of live runs and their `max_loras`; a grid repeats one step, so what the host takes comes from them. Without
    `held_out` each of them is predicted from the others, and that is the profile's accuracy.

    `engine`: JSON with at least `gpu` and `capture_sizes` (rows that CUDA graphs were captured for; empty: none); its
    `vllm`, `torch`, `date` are kept. `bandwidth_gb_s`: for timing tables of one context and one rank, which do not say what
    a longer context costs: keys are then taken to be read at this rate. `slot_tile_us`: what a slot costs in all LoRA kernels of a
    step for 64 rows (`benchmarks/slot_tiles.py`), so that other `max_loras` than the tables' can be predicted. Raises
    `BackendError`.
    """
    if out.exists():
        raise BackendError(f"--out {out}: exists already; name a new folder")
    facts = _engine_facts(engine)
    fitted, checked = read_steps(logs, rank, "grid"), read_steps(held_out, rank, "held_out")
    if fitted.empty:
        raise BackendError(f"--from-steps {logs[0]}: no steps in these files, only adapter moves")
    if "max_loras" in fitted and len(checked):
        # Step logs do not say it: their engine is taken to be that of the tables.
        checked["max_loras"] = int(fitted["max_loras"].max())
    loads = read_loads([*logs, *held_out], rank, geometry.lora_bytes(rank))
    per_key = None if bandwidth_gb_s is None else geometry.kv_bytes_per_token / bandwidth_gb_s / 1e9
    rows_at_once = VLLM_LORA_ROWS if "vllm" in facts else 1
    known = Engine(tuple(facts.pop("capture_sizes")), per_key, rows_at_once, slot_tile_us / 1e6)
    runs = OnlineRuns(fitted, _read_online(online, rank), known)
    predictor = runs.predictor()
    if len(checked) or len(runs.runs) < _ENOUGH_RUNS:
        judged = checked if len(checked) else fitted
        error, by_regime = accuracy(predictor, judged), accuracy_by_regime(predictor, judged)
    else:
        error, by_regime = runs.accuracy()
    meta = {
        "accuracy_by_regime": by_regime,
        "geometry": geometry.name,
        "rank": rank,
        "from": [p.name for p in logs],
        "online": list(runs.runs),
        "fit": facts_of(known),
        **facts,
    }
    profile = Profile(
        out.name,
        int(gpu_memory_gib * (1 << 30)),
        predictor,
        _moves(loads, "stage"),
        _moves(loads, "load"),
        error,
        meta,
    )
    write_profile(profile, pd.concat([fitted, checked, *runs.runs.values()], ignore_index=True), loads, out)
    return profile


def _read_online(online: Sequence[tuple[Path, int]], rank: int) -> dict[str, pd.DataFrame]:
    runs: dict[str, pd.DataFrame] = {}
    for path, max_loras in online:
        kind, table = read_table(path)
        if kind != "steps" or "t" not in table:
            raise BackendError(f"--online {path}: not a step log with t, total_ms, sample_ms, loads, activations")
        name = path.name.removesuffix("_steps.csv")
        if name in runs:
            raise BackendError(f"--online {path}: a second run of the name {name}")
        runs[name] = read_steps([path], rank, KIND).assign(max_loras=max_loras, run=name)
    return runs


def _engine_facts(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackendError(f"--engine {path}: not a JSON file ({error})") from error
    sizes = data.get("capture_sizes") if isinstance(data, dict) else None
    if not isinstance(sizes, list) or not all(isinstance(s, int) and s > 0 for s in sizes) or "gpu" not in data:
        raise BackendError(f"--engine {path}: needs gpu and capture_sizes, the rows that graphs were captured for")
    kept = {key: data[key] for key in ("gpu", "vllm", "torch", "date", "cudagraph_mode") if key in data}
    return {"capture_sizes": sorted(sizes), **kept}


def _moves(loads: pd.DataFrame, kind: str) -> LoadCurve:
    """The curve of a kind of move; a constant where one size was measured, none where nothing was."""
    chosen = loads[loads["kind"] == kind]
    if chosen.empty:
        raise BackendError(
            f"no {kind} of an adapter in these files: give a table with load_from_disk_ms and activate_ms"
        )
    if len(set(chosen["nbytes"])) == 1:
        return LoadCurve(float(np.median(chosen["elapsed_s"])), FREE_BYTES_PER_S)
    return load_curve(loads, kind)
