"""Published runs of other people's servers, simulated again: the columns of `runs_public.csv` in, what its clients saw out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from backend.base import EngineLimits
from backend.errors import BackendError
from backend.from_runs import NEEDED as RUN_COLUMNS
from backend.from_runs import counted, itl_of, predictor_of, step_costs
from backend.geometry import ModelGeometry, load_geometry
from backend.memory import EXTRA_VOCAB_ROWS_0_8, GIB, memory_plan
from backend.profile import LoadCurve, Profile
from backend.replay import ReplayBackend
from sim.config import EngineConfig
from sim.engine import simulate
from sim.errors import ScenarioError
from sim.run import limits_of
from sim.tables import RunTables
from workloads.adapters import TARGET_MODULES, Adapter, Catalogue
from workloads.requests import RequestTable

MODELS = {"llama-3.1-8b-instruct": ("llama-3.1-8b", "llama31"), "qwen-2.5-7b-instruct": ("qwen2.5-7b", "qwen25")}
"""A published model -> shipped geometry, and the prefix of its columns in the table of lengths."""

GPU_BYTES = int(63.43 * GIB)
"""Capacity of their GPU, from out-of-memory messages; used where a row has no `gpu_total_gib`."""

FREE = LoadCurve(0.0, 1e15)
"""All adapters lay in host memory before."""

MEMORY_FAILURES = frozenset({"kv_too_small_for_max_model_len", "no_memory_for_kv", "cuda_oom"})

NEEDED = (
    "run_id", "model", "engine", "max_loras", "n_adapters", "max_lora_rank", "adapter_ranks", "adapter_rates", "status", "failure",
    "max_num_seqs", "max_num_batched_tokens", "max_model_len", "gpu_memory_utilization", "block_size", "window_s",
)  # fmt: skip


def read_runs(file: Path) -> pd.DataFrame:
    """The rows of vLLM 0.8.5 in `file`, of models that a geometry is shipped for. Raises `ScenarioError`."""
    try:
        runs = pd.read_csv(file)
    except FileNotFoundError as error:
        raise ScenarioError(f"{file}: no such file") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{file}: not a CSV table ({str(error).strip()})") from error
    for column in NEEDED:
        if column not in runs.columns:
            raise ScenarioError(f"{file}: has no column {column}; needs {', '.join(NEEDED)}")
    return runs[runs["engine"].str.contains("0.8.5", regex=False) & runs["model"].isin(MODELS)].reset_index(drop=True)


def geometry_of(run: Mapping[Any, Any]) -> ModelGeometry:
    """The geometry of a row's model."""
    return load_geometry(MODELS[str(run["model"])][0])


def kv_blocks(run: Mapping[Any, Any]) -> int:
    """KV blocks that the row's server has by the memory model; 0 where it should refuse to start."""
    limits = EngineLimits(
        int(str(run["max_loras"])), int(str(run["max_lora_rank"])), _whole(run, "max_num_seqs"),
        _whole(run, "max_num_batched_tokens"), _whole(run, "max_model_len"), _whole(run, "block_size"),
        float(str(run["gpu_memory_utilization"])),
    )  # fmt: skip
    try:
        return memory_plan(geometry_of(run), limits, GPU_BYTES, extra_vocab_rows=EXTRA_VOCAB_ROWS_0_8).num_gpu_blocks
    except BackendError:
        return 0


def _whole(run: Mapping[Any, Any], key: str) -> int:
    return int(float(str(run[key])))


def boundary(runs: pd.DataFrame) -> pd.DataFrame:
    """Starts by what they did and what the memory model says: `failed` for memory or `started`; accidents are left out."""
    memory = runs["failure"].isin(MEMORY_FAILURES)
    judged = runs[memory | (runs["status"] == "ok")]
    predicted = [kv_blocks(run) == 0 for run in judged.to_dict("records")]
    table = pd.DataFrame({"did": np.where(memory[judged.index], "failed", "started"),
                          "predicted": np.where(predicted, "failed", "started")})  # fmt: skip
    return table.value_counts().rename("runs").reset_index().sort_values(["did", "predicted"]).reset_index(drop=True)


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of a run and its adapters' ranks, made anew from a seed."""

    requests: RequestTable
    ranks: tuple[int, ...]


def load_of(run: Mapping[Any, Any], lengths: pd.DataFrame, window_s: float, seed: int) -> Load:
    """A Poisson process for each adapter, lengths drawn from the table; which rank meets which rate is not known."""
    rng = np.random.default_rng(seed)
    rates = _spread(str(run["adapter_rates"]), "adapter_rates")
    ranks = _spread(str(run["adapter_ranks"]), "adapter_ranks").astype(int)
    counts = rng.poisson(rng.permutation(rates) * window_s)
    adapter = np.repeat(np.arange(1, len(counts) + 1), counts)
    arrival = rng.uniform(0, window_s, len(adapter))
    order = np.argsort(arrival, kind="stable")
    drawn = lengths.iloc[rng.integers(0, len(lengths), len(adapter))]
    prefix = MODELS[str(run["model"])][1]
    prompts, outputs = (drawn[f"{prefix}_{kind}_tokens"].to_numpy(dtype=np.int64) for kind in ("input", "output"))
    return Load(RequestTable(arrival[order], prompts, outputs, adapter[order].astype(np.int64)), tuple(ranks.tolist()))


def _spread(text: str, where: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A value for each adapter."""
    pairs = counted(text, where)
    return np.repeat([value for value, _ in pairs], [count for _, count in pairs])


def run_again(run: Mapping[Any, Any], profile: Profile, lengths: pd.DataFrame, window_s: float, seed: int) -> RunTables:
    """Simulate the row's server until `window_s`, as its clients ended it; all adapters lay in host memory before."""
    load = load_of(run, lengths, window_s, seed)
    catalogue = Catalogue(tuple(Adapter(i, str(i), rank, TARGET_MODULES) for i, rank in enumerate(load.ranks, 1)))
    config = EngineConfig(
        max_loras=_whole(run, "max_loras"), max_cpu_loras=max(len(load.ranks), _whole(run, "max_loras")),
        max_lora_rank=_whole(run, "max_lora_rank"), max_num_seqs=_whole(run, "max_num_seqs"),
        max_num_batched_tokens=_whole(run, "max_num_batched_tokens"), max_model_len=4096,
        block_size=_whole(run, "block_size"), enable_prefix_caching=False, lora_order="set",
        scheduler_reserve_full_isl=False,
    )  # fmt: skip
    backend = ReplayBackend(profile, geometry_of(run), limits_of(config), kv_blocks(run))
    registered = tuple(range(1, len(load.ranks) + 1))
    return simulate(load.requests, catalogue, config, backend, registered=registered, horizon_s=window_s)


def seen_by_clients(tables: RunTables) -> dict[str, float]:
    """A run as its clients count it: of requests finished inside the window."""
    done = tables.requests[tables.requests["status"] == "finished"]
    ttft = (done["first_token_s"] - done["arrival_s"]).to_numpy() * 1e3
    decoding = (done["finish_s"] - done["first_token_s"]).sum() * 1e3
    return {
        "output_throughput_tok_s": float(done["tokens_emitted"].sum() / tables.horizon_s),
        "itl_mean_ms": float(decoding / (done["tokens_emitted"] - 1).sum()),
        "ttft_mean_ms": float(ttft.mean()),
        "ttft_median_ms": float(np.median(ttft)),
        "ttft_p99_ms": float(np.percentile(ttft, 99)),
    }


PREDICTED = ("output_throughput_tok_s", "itl_mean_ms", "ttft_mean_ms", "ttft_median_ms", "ttft_p99_ms")
LOAD_S = {"llama-3.1-8b-instruct": 0.0075, "qwen-2.5-7b-instruct": 0.0033}
"""Seconds from host memory to a slot as published beside the runs (`loading.csv`)."""

TRAINING_SHARE = 10
"""One in so many clean rows of a model, in file order, says what steps cost; the others are predicted."""


def clean(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows whose client delivered the load (`client_flag` clean). Raises `ScenarioError` for columns that are not there."""
    if missing := [name for name in (*RUN_COLUMNS, "client_flag", *PREDICTED) if name not in runs.columns]:
        raise ScenarioError(f"--runs: no column {missing[0]}, which predicting them needs")
    return runs[(runs["status"] == "ok") & (runs["client_flag"] == "clean")].reset_index(drop=True)


def training(rows: pd.DataFrame) -> pd.DataFrame:
    """One in `TRAINING_SHARE` rows of each model, in file order."""
    return rows[rows.groupby("model").cumcount() % TRAINING_SHARE == 0]


def unseen(rows: pd.DataFrame, costs: Mapping[str, Any]) -> pd.DataFrame:
    """The rows that did not make the costs."""
    made = {run for known in costs.values() for run in known["runs"]}
    return rows[~rows["run_id"].isin(made)]


def costs_of(training: pd.DataFrame) -> dict[str, dict[str, object]]:
    """What a step costs, by model, from its training rows alone, and their ids: the content of `published_costs.json`."""
    return {
        str(model): {"costs": step_costs(rows), "runs": rows["run_id"].tolist()}
        for model, rows in training.groupby("model")
    }


def shipped_costs() -> dict[str, Any]:
    """`costs_of` as shipped, made by `python -m benchmarks.published_runs`."""
    return dict(json.loads((files("sim") / "published_costs.json").read_text()))


def profiles_of(costs: Mapping[str, Any]) -> dict[str, Profile]:
    """A profile a model. They know nothing of context lengths, and are for these runs alone."""
    made = {}
    for model, known in costs.items():
        geometry, load = MODELS[model][0], LoadCurve(LOAD_S[model], 1e15)
        meta = {"geometry": geometry, "vllm": "0.8.5", "costs": known["costs"]}
        name = f"vllm-0.8.5-{geometry}"
        made[model] = Profile(name, GPU_BYTES, predictor_of(known["costs"]), FREE, load, {}, meta)
    return made


def itl_errors(rows: pd.DataFrame, costs: Mapping[str, Any]) -> pd.DataFrame:
    """Mean ITL of clean rows that did not make the costs, from the batch that their servers had, a line a model."""
    lines = []
    for model, own in unseen(rows, costs).groupby("model"):
        predicted, measured = itl_of(own, costs[str(model)]["costs"]), own["itl_mean_ms"].to_numpy(float)
        finite = np.isfinite(predicted)
        error = np.full(len(own), 2.0)
        error[finite] = 2 * np.abs(predicted - measured)[finite] / (predicted + measured)[finite]
        lines.append({"model": model, "runs": len(own), "smape": error.mean(), "p90": float(np.quantile(error, 0.9))})
    return pd.DataFrame(lines)


def predict(
    run: Mapping[Any, Any], profile: Profile, lengths: pd.DataFrame, window_s: float, seed: int
) -> dict[str, object]:
    """What the row's clients saw, as `measured_*` and `predicted_*`."""
    seen = seen_by_clients(run_again(run, profile, lengths, window_s, seed))
    kept = ("run_id", "model", "max_loras", "n_adapters", "max_lora_rank", "workload_group", "offered_rps")
    row: dict[str, object] = {key: run[key] for key in kept if key in run}
    for name in PREDICTED:
        row |= {f"measured_{name}": run[name], f"predicted_{name}": seen[name]}
    return {**row, "seed": seed, "window_s": window_s}


def read_lengths(file: Path) -> pd.DataFrame:
    """Prompt and output lengths to draw from, a pair of columns a model. Raises `ScenarioError`."""
    needed = [f"{prefix}_{kind}_tokens" for _, prefix in MODELS.values() for kind in ("input", "output")]
    try:
        table = pd.read_csv(file)
    except FileNotFoundError as error:
        raise ScenarioError(f"{file}: no such file") from error
    if missing := [name for name in needed if name not in table.columns]:
        raise ScenarioError(f"{file}: has no column {missing[0]}; needs {', '.join(needed)}")
    return table


def predictions(
    runs: pd.DataFrame, lengths: pd.DataFrame, *, every: int, seeds: int, window_s: float | None, jobs: int = -1
) -> pd.DataFrame:
    """`predict` of every `every`-th clean row that did not make the shipped costs, on all cores."""
    costs = shipped_costs()
    chosen = unseen(clean(runs), costs).iloc[::every].to_dict("records")
    if not chosen:
        raise ScenarioError("--runs: no clean row of vLLM 0.8.5 that did not make the costs")
    profiles = profiles_of(costs)
    rows = Parallel(n_jobs=jobs)(
        delayed(predict)(run, profiles[str(run["model"])], lengths, window_s or float(str(run["window_s"])), seed)
        for run in chosen
        for seed in range(seeds)
    )
    return pd.DataFrame(rows)


def smape(table: pd.DataFrame) -> pd.DataFrame:
    """Of each metric: mean and p90 of 2|p − m| / (p + m), and the median of p / m − 1."""
    rows = []
    for name in PREDICTED:
        measured, predicted = table[f"measured_{name}"], table[f"predicted_{name}"]
        error = 2 * (predicted - measured).abs() / (predicted + measured)
        bias = float((predicted / measured - 1).median())
        rows.append(
            {"metric": name, "runs": len(table), "smape": error.mean(), "p90": error.quantile(0.9), "bias": bias}
        )
    return pd.DataFrame(rows)
