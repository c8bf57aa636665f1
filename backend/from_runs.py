"""A profile of an engine of which no step was logged: costs of its parts, from micro-measurements and from whole runs.

The parts are those of vLLM 0.8.5 with adapters; each multiplies something that a step has (`COSTS`). Whole runs are fitted by
simulating them (`sim.published_fit`); closed batches, here, are single steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from backend.errors import BackendError
from backend.predictor import GRID_ROWS, HOST_TERMS, TERMS, WIDE_ROWS, FloatArray, Predictor, Regime

COSTS = {
    "base_s": "a step",
    "row_s": "a row of it, padded to a captured size",
    "request_s": "a request",
    "key_s": "a cached key that a decode reads",
    "lora_s": "a step with adapters",
    "adapter_s": "an adapter in a step of fewer than 128 rows",
    "wide_adapter_s": "an adapter in a larger one: other tiles (`predictor.WIDE_ROWS`)",
    "prompt_row_s": "a row of a prompt, in a step with adapters",
    "rank_s": "an adapter, for each 16 of `max_lora_rank` beyond the first: every slot is padded to it",
    "idle_slot_s": "a slot without an adapter of the step: its blocks start and end",
    "slot_tile_s": "each 64 rows of the step, for each slot: the LoRA kernels' grid covers all rows for each",
    "eager_s": "a step beyond the captured sizes",
    "skipped_s": "a waiting request that the scheduler walks over",
}
"""Seconds of each, and what they are paid for."""

CAPTURED = (1, 2, 4, *range(8, 513, 8))
"""Rows that vLLM 0.8.5 captures CUDA graphs for."""

SLOT_RANK = 16
"""Ranks that a LoRA kernel multiplies at least: smaller ones are padded."""

_BUDGET_TOKENS = 2048
"""`max_num_batched_tokens` of the closed batches."""

_SHORT_SLOTS = 32
"""Servers of so few slots fill them long before their memory: requests wait for slots."""

_FEW_STEPS = 150
"""Published step intervals of fewer steps are left out."""


def counted(text: str, where: str) -> list[tuple[float, int]]:
    """`value:count;…` as pairs. Raises `BackendError` naming `where`."""
    try:
        pairs = [part.split(":") for part in str(text).split(";")]
        return [(float(value), int(count)) for value, count in pairs]
    except ValueError as error:
        raise BackendError(f"{where} is {text!r}, must be value:count;value:count;…") from error


def predictor_of(costs: Mapping[str, float], max_lora_rank: int) -> Predictor:
    """The costs as a predictor of steps of an engine with `max_lora_rank`."""
    terms = dict.fromkeys(TERMS, 0.0)
    narrow = costs["adapter_s"] + costs["rank_s"] * ranks_beyond(max_lora_rank)
    terms |= {
        "kv_tokens": costs["key_s"], "prefill_keys": costs["key_s"], "requests": costs["request_s"],
        "active_adapters": narrow, "wide_adapters": costs["wide_adapter_s"] - costs["adapter_s"],
        "prompt_rows": costs["prompt_row_s"], "idle_slots": costs["idle_slot_s"], "slot_tiles": costs["slot_tile_s"],
    }  # fmt: skip

    def regime(base_s: float) -> Regime:
        device = (base_s, base_s + 1e6 * costs["row_s"], costs["lora_s"], *terms.values())
        host = (0.0,) * (HOST_TERMS - 1) + (costs["skipped_s"],)
        return Regime((0.0, 1e6), (0.0,), device, host, {}, {})

    captured = regime(costs["base_s"])
    eager = regime(costs["base_s"] + costs["eager_s"])
    return Predictor(CAPTURED, {"decode": captured, "mixed": captured, "eager": eager})


@dataclass(frozen=True, slots=True)
class Steps:
    """What costs are paid for, of many steps: float64[steps] each; `keys`: that decodes read, `adapters`: distinct ones."""

    rows: FloatArray
    requests: FloatArray
    decodes: FloatArray
    keys: FloatArray
    adapters: FloatArray


def multipliers(steps: Steps, max_loras: int, max_lora_rank: int) -> FloatArray:
    """What each of `COSTS` but the last is multiplied with, float64[steps, costs - 1]."""
    sizes = np.array(CAPTURED)
    captured = steps.rows <= sizes[-1]
    padded = sizes[np.minimum(np.searchsorted(sizes, steps.rows), len(sizes) - 1)]
    size = np.where(captured, padded, steps.rows)
    adapted = steps.adapters > 0
    wide = size >= WIDE_ROWS
    columns = (
        np.ones(len(size)), size, steps.requests, steps.keys, adapted, np.where(wide, 0, steps.adapters),
        np.where(wide, steps.adapters, 0), np.where(adapted, steps.rows - steps.decodes, 0),
        steps.adapters * ranks_beyond(max_lora_rank), np.where(adapted, max_loras - steps.adapters, 0),
        np.where(adapted, max_loras * np.ceil(size / GRID_ROWS), 0), ~captured,
    )  # fmt: skip
    return np.stack([np.asarray(column, dtype=float) for column in columns], axis=1)


def ranks_beyond(max_lora_rank: int) -> float:
    """How often `rank_s` is paid for an adapter."""
    return max(0.0, max_lora_rank / SLOT_RANK - 1.0)


def closed_batches(folder: Path, model: str) -> list[tuple[Steps, int, int, float]]:
    """Steps of closed batches as published (`compute_steps.csv`, `compute.csv`): one step, `max_loras`, `max_lora_rank`, seconds.

    Decodes of a full batch by distinct adapters; prompts that fill the budget. In closed batches with prompts, which go in
    waves, the median interval is that of decodes alone, and p99 that of steps with prompts.
    """
    steps, batches = _tables(folder, model)
    lengths = batches.set_index("repo_path")["mean_input_tokens"]
    found = []
    for row in steps[steps["steps"] >= _FEW_STEPS].to_dict("records"):
        distinct, slots = int(row["unique_adapters_in_batch"]), int(row["max_loras"])
        if row["run_distinct_adapters"] > 0 and distinct == 0:
            continue  # the engine waited for a client
        full = 1 if str(row["phase"]).startswith("preload") else row["max_num_seqs"]
        if np.isnan(full):
            continue
        if row["request_output_tokens"] == 1:
            prompts = _BUDGET_TOKENS / lengths[row["repo_path"]]
            step = _step(0, 0, _BUDGET_TOKENS, prompts, distinct)
        else:
            step = _step(full, row["request_output_tokens"] / 2, 0, 0, distinct)
        found.append((step, slots, int(row["max_lora_rank"]), float(row["step_median_ms"]) / 1e3))
    waves = batches["source"].str.contains("find_max_batch") & (batches["request_output_tokens"] >= 200)
    for row in batches[waves].to_dict("records"):
        running, prompt, slots = row["srv_running_mean"], row["mean_input_tokens"], int(row["max_loras"])
        distinct = slots * -np.expm1(-running / slots)
        context = prompt + row["request_output_tokens"] / 2
        for tokens, column in ((0, "itl_median_ms"), (_BUDGET_TOKENS - running, "itl_p99_ms")):
            step = _step(running, context, tokens, tokens / prompt, distinct)
            found.append((step, slots, int(row["max_lora_rank"]), float(row[column]) / 1e3))
    if not found:
        raise BackendError(f"{folder}: no closed batches of {model} in compute_steps.csv and compute.csv")
    return found


def first_use_s(folder: Path, model: str) -> float:
    """Seconds between two lone requests of which the second's adapter is new: its tokenizer is loaded before the engine sees it."""
    steps, _ = _tables(folder, model)
    idle = steps[(steps["unique_adapters_in_batch"] == 0) & (steps["run_distinct_adapters"] > 0)]
    return float(np.average(idle["step_mean_ms"], weights=idle["steps"]) / 1e3)


def load_s(folder: Path, model: str) -> float:
    """Seconds from host memory to a slot: mean over the ranks that were published (`loading.csv`)."""
    table = _read(folder / "loading.csv", ("model", "measurement", "activation_mean_ms"))
    rows = table[(table["model"] == model) & (table["measurement"] == "cpu_to_gpu_activation")]
    return float(rows["activation_mean_ms"].mean() / 1e3)


def skipped_s(folder: Path) -> float:
    """Seconds that the scheduler takes for a waiting request it walks over (`scheduler_runs.csv`, where slots are short)."""
    from scipy.optimize import nnls

    needed = ("max_loras", "n_adapters", "running_mean", "waiting_mean", "scheduler_per_step_ms")
    table = _read(folder / "scheduler_runs.csv", needed)
    short = table[(table["max_loras"] < table["n_adapters"]) & (table["max_loras"] <= _SHORT_SLOTS)]
    took = short["scheduler_per_step_ms"].to_numpy() / 1e3
    weight = 1.0 / np.maximum(took, 1e-4)
    columns = np.column_stack([np.ones(len(short)), short["running_mean"], short["waiting_mean"]])
    scale = columns.max(axis=0)
    (*_, each), _ = nnls(columns / scale * weight[:, None], took * weight)
    return float(each / scale[2])


def _tables(folder: Path, model: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    steps = _read(folder / "compute_steps.csv", ("model", "phase", "steps", "step_median_ms", "repo_path"))
    batches = _read(folder / "compute.csv", ("model", "source", "mean_input_tokens", "srv_running_mean", "repo_path"))
    batches = batches[batches["engine"].str.contains("0.8.5", regex=False) & (batches["status"] == "ok")]
    return steps[steps["model"] == model], batches[batches["model"] == model]


def _read(path: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except FileNotFoundError as error:
        raise BackendError(f"{path}: no such file") from error
    if missing := [name for name in needed if name not in table.columns]:
        raise BackendError(f"{path}: has no column {missing[0]}; needs {', '.join(needed)}")
    return table


def _step(decodes: float, context: float, tokens: float, prompts: float, adapters: float) -> Steps:
    """One step of `decodes`, each with `context` keys, and of `prompts` with `tokens` rows together."""
    values = (decodes + tokens, decodes + prompts, decodes, decodes * (context + 1), adapters)
    return Steps(*(np.array([float(value)]) for value in values))


def seconds_of(costs: Mapping[str, float], batches: Sequence[tuple[Steps, int, int, float]]) -> FloatArray:
    """What the costs give each of the `closed_batches`, float64[batches]."""
    price = np.array([costs[name] for name in COSTS if name != "skipped_s"])
    return np.array([float(multipliers(steps, slots, rank)[0] @ price) for steps, slots, rank, _ in batches])
