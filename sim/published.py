"""Published runs of other people's servers, simulated again: the columns of `runs_public.csv` in, what its clients saw out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from backend.base import EngineLimits
from backend.csv_tables import check_column, read_csv
from backend.errors import BackendError
from backend.from_runs import predictor_of
from backend.geometry import ModelGeometry, load_geometry
from backend.memory import EXTRA_VOCAB_ROWS_0_8, GIB, memory_plan
from backend.profile import LoadCurve, Profile
from backend.replay import ReplayBackend
from sim.config import EngineConfig
from sim.engine import simulate
from sim.errors import ScenarioError
from sim.front_end import FloatArray, FrontEnd, Passage, SetsSeen, merged_tokens, passage, sets_seen
from sim.published_grids import PREDICTED
from sim.published_load import MODELS, Load, load_of
from sim.run import limits_of
from sim.tables import RunTables
from workloads.adapters import TARGET_MODULES, Adapter, Catalogue
from workloads.requests import RequestTable

GPU_BYTES = int(63.43 * GIB)
"""Capacity of their GPU, from out-of-memory messages; used where a row has no `gpu_total_gib`."""

FREE = LoadCurve(0.0, 1e15)
"""All adapters lay in host memory before."""

MEMORY_FAILURES = frozenset({"kv_too_small_for_max_model_len", "no_memory_for_kv", "cuda_oom"})

NEEDED = (
    "run_id", "model", "engine", "max_loras", "n_adapters", "max_lora_rank", "adapter_ranks", "adapter_rates", "status", "failure",
    "max_num_seqs", "max_num_batched_tokens", "max_model_len", "gpu_memory_utilization", "block_size", "window_s",
)  # fmt: skip

WHOLE = (
    "max_loras",
    "n_adapters",
    "max_lora_rank",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "block_size",
)
OPTIONAL = ("seed", "pool_mean_input_tokens", "pool_mean_output_tokens", "gpu_total_gib", *PREDICTED)
"""Columns that may be empty or missing, but are numbers where they are not."""


def read_runs(file: Path) -> pd.DataFrame:
    """The rows of vLLM 0.8.5 in `file`, of models that a geometry is shipped for. Raises `ScenarioError`, for a cell `BackendError`."""
    runs = read_csv(file, ScenarioError)
    for column in NEEDED:
        if column not in runs.columns:
            raise ScenarioError(f"{file}: has no column {column}; needs {', '.join(NEEDED)}")
    engine = runs["engine"].astype(str).str.contains("0.8.5", regex=False)
    kept = runs[engine & runs["model"].isin(MODELS)].copy()
    for column in WHOLE:
        check_column(file, kept, column, whole=True, least=1)
    check_column(file, kept, "gpu_memory_utilization", above=0, below=1.001)
    check_column(file, kept, "window_s", above=0, below=10**7)
    for column in (name for name in OPTIONAL if name in kept.columns):
        check_column(file, kept, column, whole=column == "seed", below=2**32, optional=True)
    return kept.reset_index(drop=True)


def geometry_of(run: Mapping[Any, Any]) -> ModelGeometry:
    """The geometry of a row's model."""
    return load_geometry(MODELS[str(run["model"])][0])


def gpu_bytes(run: Mapping[Any, Any]) -> int:
    """Capacity of the row's GPU."""
    known = float(run.get("gpu_total_gib", np.nan) or np.nan)
    return int(known * GIB) if known > 0 else GPU_BYTES


def kv_blocks(run: Mapping[Any, Any]) -> int:
    """KV blocks that the row's server has by the memory model; 0 where it should refuse to start."""
    limits = EngineLimits(
        _whole(run, "max_loras"), _whole(run, "max_lora_rank"), _whole(run, "max_num_seqs"),
        _whole(run, "max_num_batched_tokens"), _whole(run, "max_model_len"), _whole(run, "block_size"),
        float(str(run["gpu_memory_utilization"])),
    )  # fmt: skip
    try:
        return memory_plan(
            geometry_of(run), limits, gpu_bytes(run), extra_vocab_rows=EXTRA_VOCAB_ROWS_0_8
        ).num_gpu_blocks
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
class Known:
    """What is known of a model's servers: costs of a step's parts (`from_runs.COSTS`), of the front end, and of other things.

    `ends_per_token`: see `published_load.load_of`; `load_s`: from host memory to a slot; `runs`: ids of those that made it; `spread`: how
    far the steps of one run lie from what the others say of it, as the standard deviation of a logarithm.
    """

    costs: Mapping[str, float]
    front_end: FrontEnd
    ends_per_token: float
    load_s: float
    runs: tuple[str, ...]
    spread: float = 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Known:
        """Read what `to_json` wrote."""
        front = FrontEnd(**data["front_end"])
        return cls(
            data["costs"], front, data["ends_per_token"], data["load_s"], tuple(data["runs"]), data.get("spread", 0.0)
        )

    def to_json(self) -> dict[str, object]:
        """Plain data for `published_costs.json`."""
        return asdict(self)

    def slower(self) -> Known:
        """Servers whose steps all take longer by `spread`."""
        return replace(self, costs={name: cost * exp(self.spread) for name, cost in self.costs.items()})


def profile_of(known: Known, run: Mapping[Any, Any]) -> Profile:
    """A profile for the row's engine; all its adapters lay in host memory before."""
    geometry = MODELS[str(run["model"])][0]
    meta = {"geometry": geometry, "vllm": "0.8.5", "costs": dict(known.costs)}
    predictor = predictor_of(known.costs, _whole(run, "max_lora_rank"))
    return Profile(f"vllm-0.8.5-{geometry}", gpu_bytes(run), predictor, FREE, LoadCurve(known.load_s, 1e15), {}, meta)


def run_again(run: Mapping[Any, Any], known: Known, load: Load, engine_s: FloatArray, window_s: float) -> RunTables:
    """Simulate the row's engine until `window_s`, as its clients ended it; its requests reach it at `engine_s`."""
    catalogue = Catalogue(tuple(Adapter(i, str(i), rank, TARGET_MODULES) for i, rank in enumerate(load.ranks, 1)))
    config = EngineConfig(
        max_loras=_whole(run, "max_loras"), max_cpu_loras=max(len(load.ranks), _whole(run, "max_loras")),
        max_lora_rank=_whole(run, "max_lora_rank"), max_num_seqs=_whole(run, "max_num_seqs"),
        max_num_batched_tokens=_whole(run, "max_num_batched_tokens"), max_model_len=4096,
        block_size=_whole(run, "block_size"), enable_prefix_caching=False, lora_order="set",
        scheduler_reserve_full_isl=False,
    )  # fmt: skip
    asked = load.requests
    requests = RequestTable(engine_s, asked.prompt_tokens, asked.output_tokens, asked.adapter)
    backend = ReplayBackend(profile_of(known, run), geometry_of(run), limits_of(config), kv_blocks(run))
    registered = tuple(range(1, len(load.ranks) + 1))
    return simulate(requests, catalogue, config, backend, registered=registered, horizon_s=window_s)


@dataclass(frozen=True, slots=True)
class Again:
    """A run made again: what its clients sent, how it passed the front end, and what the engine did."""

    load: Load
    passage: Passage
    tables: RunTables


def made_again(
    run: Mapping[Any, Any], known: Known, lengths: pd.DataFrame, window_s: float, seed: int, *, passes: int = 2
) -> Again:
    """The run twice: once to see which sets of adapters its metrics collect, then with what reading them costs."""
    load = load_of(run, lengths, window_s, seed, known.ends_per_token)
    seen = SetsSeen.none()
    for number in range(passes):
        way = passage(load.requests.arrival_s, load.requests.adapter, known.front_end, seen, window_s)
        tables = run_again(run, known, load, way.engine_s, window_s)
        if number < passes - 1:
            seen = sets_seen(tables.requests, tables.steps)
    return Again(load, way, tables)


def seen_by_clients(again: Again, front: FrontEnd) -> dict[str, float]:
    """A run as its clients count it: of requests finished inside the window; a first token passes the front end on its way out."""
    requests, steps = again.tables.requests, again.tables.steps
    done = (requests["status"] == "finished").to_numpy()
    first, finish = (requests[name].to_numpy()[done] for name in ("first_token_s", "finish_s"))
    tokens = requests["tokens_emitted"].to_numpy()[done]
    # A new request's token is the last of its step that the front end writes.
    step = np.minimum(np.searchsorted(steps["end_s"], first), len(steps) - 1)
    written = (steps["decode_requests"] + steps["prefill_requests"]).to_numpy()[step] * front.token_s
    # Whoever was still in front of the engine at the end is in no table.
    sent = again.load.requests.arrival_s[requests["request_id"].to_numpy()[done]]
    ttft = (again.passage.out(first + written) - sent) * 1e3
    # Tokens that wait together for the front end come in one chunk, and count as one.
    single = 1.0 - merged_tokens(again.passage, steps) / max(1, steps["decode_requests"].sum())
    return {
        "output_throughput_tok_s": float(tokens.sum() / again.tables.horizon_s),
        "itl_mean_ms": float((finish - first).sum() * 1e3 / ((tokens - 1).sum() * single)),
        "ttft_mean_ms": float(ttft.mean()),
        "ttft_median_ms": float(np.median(ttft)),
        "ttft_p99_ms": float(np.percentile(ttft, 99)),
    }


TRAINING_SHARE = 10
"""One in so many clean rows of a model, in file order, says what steps cost; the others are predicted."""


def clean(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows whose client delivered the load (`client_flag` clean). Raises `ScenarioError` for columns that are not there."""
    if missing := [name for name in ("client_flag", "workload_group", *PREDICTED) if name not in runs.columns]:
        raise ScenarioError(f"--runs: no column {missing[0]}, which predicting them needs")
    return runs[(runs["status"] == "ok") & (runs["client_flag"] == "clean")].reset_index(drop=True)


def training(rows: pd.DataFrame) -> pd.DataFrame:
    """One in `TRAINING_SHARE` rows of each model, in file order."""
    return rows[rows.groupby("model").cumcount() % TRAINING_SHARE == 0]


def unseen(rows: pd.DataFrame, known: Mapping[str, Known]) -> pd.DataFrame:
    """The rows that did not make what is known."""
    made = {run for model in known.values() for run in model.runs}
    return rows[~rows["run_id"].isin(made)]


def shipped() -> dict[str, Known]:
    """What is known by model, as shipped: `python -m benchmarks.published_runs --fit` makes it."""
    data = json.loads((files("sim") / "published_costs.json").read_text())
    return {model: Known.from_json(known) for model, known in data.items()}


def predict(
    run: Mapping[Any, Any], known: Known, lengths: pd.DataFrame, window_s: float, seed: int, *, slower: bool = False
) -> dict[str, object]:
    """What the row's clients saw, as `measured_*` and `predicted_*`; `slower`: and as `slower_*`, from steps longer by what is not known."""
    seen = seen_by_clients(made_again(run, known, lengths, window_s, seed), known.front_end)
    kept = ("run_id", "model", "max_loras", "n_adapters", "max_lora_rank", "workload_group", "offered_rps")
    row: dict[str, object] = {key: run[key] for key in kept if key in run}
    for name in PREDICTED:
        row |= {f"measured_{name}": run[name], f"predicted_{name}": seen[name]}
    if slower:
        again = made_again(run, known.slower(), lengths, window_s, seed)
        row |= {f"slower_{name}": value for name, value in seen_by_clients(again, known.front_end).items()}
    return {**row, "seed": seed, "window_s": window_s}


def predictions(
    runs: pd.DataFrame, lengths: pd.DataFrame, *, every: int, seeds: int, window_s: float | None, jobs: int = -1
) -> pd.DataFrame:
    """`predict` of every `every`-th clean row that did not make what is shipped, on all cores; of several seeds, the first is `slower`, too."""
    known = shipped()
    chosen = unseen(clean(runs), known).iloc[::every].to_dict("records")
    if not chosen:
        raise ScenarioError("--runs: no clean row of vLLM 0.8.5 that did not make the costs")
    rows = Parallel(n_jobs=jobs)(
        delayed(predict)(
            run,
            known[str(run["model"])],
            lengths,
            window_s or float(str(run["window_s"])),
            seed,
            slower=seeds > 1 and seed == 0,
        )  # fmt: skip
        for run in chosen
        for seed in range(seeds)
    )
    return pd.DataFrame(rows)
