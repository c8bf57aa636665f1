"""A measured run of another engine, simulated again: the same requests on a profile, beside what was measured.

`NAME_requests.csv`: `arrival_s`, `prompt_tokens`, `output_tokens`, `adapter_id` (0: none), `ttft_ms`, `tpot_ms`, `e2e_ms`, and
`finish_s`; `NAME_steps.csv` (`backend.step_logs`) for queue, adapters a step and loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from backend.csv_tables import check_column, read_csv
from backend.geometry import load_geometry
from backend.host_draw import HostDraw
from backend.profile import Profile
from backend.replay import ReplayBackend
from backend.scattered import ScatteredReplay
from sim.config import EngineConfig
from sim.engine import simulate
from sim.errors import ScenarioError
from sim.metrics import latencies
from sim.run import limits_of
from sim.tables import RunTables
from workloads.adapters import TARGET_MODULES, Adapter, Catalogue
from workloads.requests import RequestTable

_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "adapter_id", "ttft_ms", "tpot_ms", "e2e_ms", "finish_s")
_ALWAYS, _WHOLE = ("arrival_s",), ("prompt_tokens", "output_tokens", "adapter_id")
"""Columns that no row may leave empty, and those that are whole numbers, too."""


_TAIL = 0.025
"""Share of the simulated runs that lies below an interval, and above."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A measured run: its requests, and its steps where they were logged."""

    name: str
    requests: pd.DataFrame
    steps: pd.DataFrame | None


def read_trace(requests: Path, steps: Path | None) -> Trace:
    """Read and check a run's tables. Raises `ScenarioError` or `BackendError` naming file and column, or line."""
    table = _read(requests, _COLUMNS).sort_values("arrival_s").reset_index(drop=True)
    log = None if steps is None else _read(steps, ("t", "total_ms", "waiting", "distinct_adapters", "activations"))
    return Trace(requests.name.removesuffix(".csv").removesuffix("_requests"), table, log)


def _read(path: Path, needed: Sequence[str]) -> pd.DataFrame:
    table = read_csv(path, ScenarioError)
    for column in needed:
        if column not in table.columns:
            raise ScenarioError(f"{path}: has no column {column}; needs {', '.join(needed)}")
        # A run of one token has no TPOT, a request that was not finished no end: both are empty then.
        check_column(path, table, column, whole=column in _WHOLE, optional=column not in (*_ALWAYS, *_WHOLE))
    if table.empty:
        raise ScenarioError(f"{path}: has no rows")
    return table


def replayed(
    trace: Trace, profile: Profile, config: EngineConfig, num_gpu_blocks: int, rank: int, host: HostDraw | None = None
) -> RunTables:
    """Simulate the trace's requests; all its adapters were registered, in the order of their ids, before it began."""
    ids = sorted(set(trace.requests["adapter_id"].astype(int)) - {0})
    number = {0: 0, **{adapter: i for i, adapter in enumerate(ids, 1)}}
    catalogue = Catalogue(tuple(Adapter(i, str(a), rank, TARGET_MODULES) for a, i in number.items() if i))
    requests = RequestTable(
        trace.requests["arrival_s"].to_numpy(dtype=float),
        trace.requests["prompt_tokens"].to_numpy(dtype=int),
        trace.requests["output_tokens"].to_numpy(dtype=int),
        np.array([number[a] for a in trace.requests["adapter_id"].astype(int)], dtype=np.int64),
    )
    geometry = load_geometry(str(profile.meta["geometry"]))
    fixed = (profile, geometry, limits_of(config), num_gpu_blocks)
    backend = ReplayBackend(*fixed) if host is None else ScatteredReplay(*fixed, host)
    return simulate(requests, catalogue, config, backend, registered=tuple(number[a] for a in ids))


def compared(trace: Trace, runs: Sequence[RunTables]) -> pd.DataFrame:
    """What was measured beside what was simulated, the median of `runs`: `metric`, `measured`, `simulated`, `error` (relative), and
    `low`, `high`, between which 95 % of the runs lie (of several).
    """
    measured, simulated = _measured(trace), [_simulated(tables) for tables in runs]
    rows = []
    for key, value in measured.items():
        if key in simulated[0]:
            low, median, high = np.quantile([one[key] for one in simulated], (_TAIL, 0.5, 1.0 - _TAIL))
            rows.append((key, value, median, median / value - 1.0 if value else np.nan, low, high))
    table = pd.DataFrame(rows, columns=["metric", "measured", "simulated", "error", "low", "high"])
    return table if len(runs) > 1 else table.drop(columns=["low", "high"])


def _measured(trace: Trace) -> dict[str, float]:
    done = trace.requests[trace.requests["finish_s"].notna()]
    values = {key: done[f"{key}_ms"].dropna().to_numpy() for key in ("ttft", "tpot", "e2e")}
    out = {"output_throughput": float(done["output_tokens"].sum() / done["finish_s"].max()), **_statistics(values)}
    if trace.steps is not None:
        steps = trace.steps
        out |= {
            "mean_waiting": float(steps["waiting"].mean()),
            "mean_distinct_adapters": float(steps["distinct_adapters"].mean()),
            "activations": float(steps["activations"].sum()),
            "steps": float(len(steps)),
            "mean_step_ms": float(steps["total_ms"].mean()),
        }
    return out


def _simulated(tables: RunTables) -> dict[str, float]:
    values = latencies(tables, censored=False)
    finished = tables.requests[tables.requests["status"] == "finished"]
    steps = tables.steps
    return {
        "output_throughput": float(finished["tokens_emitted"].sum() / finished["finish_s"].max()),
        **_statistics({"ttft": values["ttft"], "tpot": values["tpot"], "e2e": values["e2el"]}),
        "mean_waiting": float(steps["waiting"].mean()),
        "mean_distinct_adapters": float(steps["distinct_adapters"].mean()),
        "activations": float(tables.adapters["activations"].sum()),
        "steps": float(len(steps)),
        "mean_step_ms": float((steps["end_s"] - steps["start_s"]).mean() * 1e3),
    }


def _statistics(values: Mapping[str, np.ndarray[tuple[int], np.dtype[np.float64]]]) -> dict[str, float]:
    out = {}
    for key, column in values.items():
        out[f"mean_{key}_ms"] = float(column.mean())
        for p in (50, 90, 99):
            out[f"p{p}_{key}_ms"] = float(np.percentile(column, p))
    return out
