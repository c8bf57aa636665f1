"""`python -m benchmarks.real_runs --data DIR`: sweeps over `max_loras` beside those of real vLLM servers.

Simulates the `digital_twin` runs of DIR/runs_public.csv with Llama-3.1-8B, 128 and 384 adapters of rank 8 and 16, twice: on a
shipped profile (`simulated_`), which is another version on another GPU, and on what steps took on those servers
(`own_steps_`: fitted to published closed-batch measurements of the same build, DIR/compute*.csv, never to the runs). The
simulated window is shorter than the real hour; both end at its end, requests unfinished then do not count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import joblib
import numpy as np
import pandas as pd

from backend.errors import BackendError
from backend.geometry import load_geometry
from backend.memory import EXTRA_VOCAB_ROWS_0_8, GIB, memory_plan
from backend.profile import LoadCurve, Profile, load_profile
from backend.replay import ReplayBackend
from benchmarks.real_steps import MeasuredSteps, load_s, measured_steps
from sim.catalogue import catalogue_of
from sim.engine import simulate
from sim.errors import ScenarioError
from sim.metrics import summarise
from sim.run import execute, limits_of
from sim.scenario import Scenario, from_tables
from workloads.build import build_workload

if TYPE_CHECKING:
    from backend.predictor import Predictor

GROUP = "rank_16_rates_0.1_0.05_0.025"
RATES = (0.1, 0.05, 0.025)
"""Requests per second of an adapter, a third of the adapters each."""

GPU_MEMORY_GIB = 63.43


def real_runs(data: Path) -> pd.DataFrame:
    """The runs to compare with, one row each, by adapters and slots."""
    runs = pd.read_csv(data / "runs_public.csv")
    ours = runs["model"].str.contains("llama-3.1") & (runs["run_set"] == "digital_twin") & (runs["status"] == "ok")
    chosen = runs[ours & (runs["workload_group"] == GROUP) & runs["n_adapters"].isin([128, 384])]
    columns = ["n_adapters", "max_loras", "output_throughput_tok_s", "ttft_mean_ms", "srv_running_mean", "preemptions"]
    return chosen[columns].sort_values(["n_adapters", "max_loras"]).reset_index(drop=True)


def trace(data: Path, adapters: int, window_s: float, seed: int = 0) -> pd.DataFrame:
    """Requests as the real clients sent them: a Poisson process for each adapter, lengths drawn from the published ones."""
    rng = np.random.default_rng(seed)
    lengths = pd.read_csv(data / "lengths_reconstructed.csv")
    parts = []
    for adapter in range(adapters):
        count = rng.poisson(RATES[adapter % 3] * window_s)
        parts.append(pd.DataFrame({"arrival_s": rng.uniform(0, window_s, count), "adapter": f"a{adapter}"}))
    table = pd.concat(parts).sort_values("arrival_s").reset_index(drop=True)
    drawn = lengths.iloc[rng.integers(0, len(lengths), len(table))]
    table["prompt_tokens"] = drawn["llama31_input_tokens"].to_numpy()
    table["output_tokens"] = drawn["llama31_output_tokens"].to_numpy()
    return table


def scenario(folder: Path, adapters: int, max_loras: int, profile: str, window_s: float) -> Scenario:
    """One run; `folder` holds its trace. Engine arguments are the real servers'."""
    engine = {
        "max_loras": max_loras,
        "max_cpu_loras": adapters,
        "max_lora_rank": 16,
        "max_num_seqs": 2048,
        "max_num_batched_tokens": 2048,
        "max_model_len": 4096,
    }
    tables: dict[str, object] = {
        "model": {"geometry": "llama-3.1-8b"},
        "engine": engine,
        "adapters": {"ranks": [8, 16]},
        "workload": {"kind": "table", "path": f"requests_{adapters}.csv"},
        "backend": {"kind": "profile", "profile": profile, "gpu_memory_gib": GPU_MEMORY_GIB},
        "run": {"horizon_s": window_s},
    }
    return from_tables(tables, f"{adapters} adapters", folder)


def on_own_steps(run: Scenario, steps: MeasuredSteps, load: LoadCurve) -> dict[str, object]:
    """Its summary where steps and loads take what they took on those servers; memory as vLLM 0.8.5 divided it."""
    geometry, limits, gpu_bytes = load_geometry(run.geometry), limits_of(run.engine), int(GPU_MEMORY_GIB * GIB)
    workload = build_workload(run.workload, adapter_count=None, seed=run.seed, base_dir=run.base_dir)
    blocks = memory_plan(geometry, limits, gpu_bytes, extra_vocab_rows=EXTRA_VOCAB_ROWS_0_8).num_gpu_blocks
    profile = Profile("own", gpu_bytes, cast("Predictor", steps), LoadCurve(0.0, 1e15), load, {}, {})
    backend = ReplayBackend(profile, geometry, limits, blocks)
    tables = simulate(
        workload.requests, catalogue_of(run, workload, geometry), run.engine, backend, horizon_s=run.horizon_s
    )
    return {**summarise(tables), "mean_running": float(tables.steps["running"].mean())}


def compare(run: dict[str, Any], folder: Path, profile: str, window_s: float, data: Path) -> dict[str, object]:
    """A row: the real run, and both simulations of it."""
    simulated = scenario(folder, run["n_adapters"], run["max_loras"], profile, window_s)
    summary = execute(simulated)[1]
    own = on_own_steps(simulated, measured_steps(data), LoadCurve(load_s(data), 1e15))
    return {
        "n_adapters": run["n_adapters"],
        "max_loras": run["max_loras"],
        "real_output_tok_s": run["output_throughput_tok_s"],
        "simulated_output_tok_s": summary["output_throughput"],
        "own_steps_output_tok_s": own["output_throughput"],
        "real_ttft_s": run["ttft_mean_ms"] / 1e3,
        "simulated_ttft_s": float(str(summary["mean_ttft_ms"])) / 1e3,
        "own_steps_ttft_s": float(str(own["mean_ttft_ms"])) / 1e3,
        "real_running": run["srv_running_mean"],
        "own_steps_running": own["mean_running"],
        "real_preemptions": run["preemptions"],
        "own_steps_preemptions": own["preemptions"],
        "simulated_kv_blocks": summary["num_gpu_blocks"],
    }


def preloaded(name: str, folder: Path) -> str:
    """The profile with free staging, as a folder: the real servers had every adapter in host memory before they began."""
    profile = replace(load_profile(name), stage=LoadCurve(0.0, 1e15))
    target = folder / "profile"
    target.mkdir()
    profile.write(target)
    return str(target)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_runs", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with runs_public.csv and lengths_reconstructed.csv"
    )
    parser.add_argument("--profile", default="vllm-0.24-h100-llama-3.1-8b")
    parser.add_argument(
        "--window-s", type=float, default=600.0, help="seconds of arrivals (default 600; the real runs: 3600)"
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=[128, 384], help="only runs with so many adapters")
    parser.add_argument("--max-loras", type=int, nargs="+", help="only runs with so many slots")
    parser.add_argument("--jobs", type=int, default=-1, help="processes (default: one a core)")
    parser.add_argument("--out", type=Path, help="CSV to write")
    args = parser.parse_args(argv)
    try:
        real = real_runs(args.data)
        real = real[
            real["n_adapters"].isin(args.adapters) & real["max_loras"].isin(args.max_loras or real["max_loras"])
        ]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            profile = preloaded(args.profile, folder)
            for adapters in sorted(set(real["n_adapters"])):
                trace(args.data, adapters, args.window_s).to_csv(folder / f"requests_{adapters}.csv", index=False)
            jobs = [
                joblib.delayed(compare)(run, folder, profile, args.window_s, args.data)
                for run in real.to_dict("records")
            ]
            rows = joblib.Parallel(n_jobs=args.jobs)(jobs)
    except (BackendError, ScenarioError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = pd.DataFrame(rows)
    print(table.round(2).to_string(index=False))
    if args.out:
        table.to_csv(args.out, index=False, float_format="%.5g")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
