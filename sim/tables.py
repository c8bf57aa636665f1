"""The rows a run leaves behind, as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt
import pandas as pd

from sim.state import RequestState
from workloads.adapters import Catalogue


@dataclass(frozen=True, slots=True)
class StepRow:
    """One executed step; times in seconds of the simulated clock."""

    step: int
    start_s: float
    end_s: float
    device_s: float
    host_s: float
    load_s: float
    tokens: int
    prefill_tokens: int
    prefill_requests: int
    decode_requests: int
    running: int
    waiting: int
    distinct_adapters: int
    admitted: int
    preempted: int
    skipped: int
    finished: int
    cached_tokens: int
    stages: int
    activations: int
    evictions: int
    used_blocks: int
    free_blocks: int
    extrapolated: bool


@dataclass(frozen=True, slots=True)
class MoveRow:
    """One change of residency, when it began and ended; `kind` and `slot` (-1: none) as in `sim.adapter_manager.Move`."""

    start_s: float
    end_s: float
    kind: str
    adapter: int
    slot: int


@dataclass(slots=True)
class StepTotals:
    """What all steps of an engine come to, added up in their order.

    `usage_s`: used share of the KV blocks times the step's length; `running`: requests that run after a step.
    """

    steps: int = 0
    extrapolated: int = 0
    stages: int = 0
    running: int = 0
    busy_s: float = 0.0
    load_s: float = 0.0
    usage_s: float = 0.0
    max_usage: float = 0.0

    def add(self, row: StepRow) -> None:
        """One more step."""
        usage = row.used_blocks / max(1, row.used_blocks + row.free_blocks)
        length_s = row.end_s - row.start_s
        self.steps += 1
        self.extrapolated += row.extrapolated
        self.stages += row.stages
        self.running += row.running
        self.busy_s += length_s
        self.load_s += row.load_s
        self.usage_s += usage * length_s
        self.max_usage = max(self.max_usage, usage)

    @classmethod
    def summed(cls, parts: Iterable[StepTotals]) -> StepTotals:
        """Of several engines that were one replica, one after the other."""
        out = cls()
        for part in parts:
            for f in fields(cls):
                mine, theirs = getattr(out, f.name), getattr(part, f.name)
                setattr(out, f.name, max(mine, theirs) if f.name == "max_usage" else mine + theirs)
        return out


@dataclass(slots=True)
class AdapterUse:
    """What one adapter lived through: steps that used it, those that found it in its slot, and its moves."""

    step_uses: int = 0
    hits: int = 0
    stages: int = 0
    activations: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class RunTables:
    """A run's result: one row per request, step, adapter and adapter move, and the clock at the end.

    `totals`: of the steps, an entry a replica; `steps` and `moves` are empty where a run was told to keep no step rows.
    `replicas`: one row per replica of a fleet (`sim.fleet_tables`); None for a single engine.
    """

    requests: pd.DataFrame
    steps: pd.DataFrame
    adapters: pd.DataFrame
    horizon_s: float
    moves: pd.DataFrame = field(default_factory=lambda: row_table([], MoveRow))
    replicas: pd.DataFrame | None = None
    totals: tuple[StepTotals, ...] = ()


STATUSES = ("finished", "running", "waiting")

ASKED = ("arrival_s", "adapter", "prompt_tokens", "output_tokens")
"""Columns of a request that are those of `workloads.requests.RequestTable`."""

_TIMES = ("first_scheduled_s", "first_token_s", "finish_s")
_COUNTS = ("tokens_emitted", "cached_tokens", "preemptions", "skips")


NOT_SENT: Mapping[str, int | float] = {
    "status": STATUSES.index("waiting"), **dict.fromkeys(_TIMES, math.nan), **dict.fromkeys(_COUNTS, 0)
}  # fmt: skip
"""What has become of a request that no engine has got."""


def request_table(states: Iterable[RequestState], running: set[int]) -> pd.DataFrame:
    """One row per request, in arrival order; `running`: the ids of those that run."""
    kept = list(states)
    columns: dict[str, Sequence[object]] = {
        "status": [0 if s.finish_s is not None else 1 if s.request.request_id in running else 2 for s in kept],
        **{name: [getattr(s, name) for s in kept] for name in _TIMES},
        "tokens_emitted": [s.emitted for s in kept],
        **{name: [getattr(s, name) for s in kept] for name in _COUNTS[1:]},
    }
    asked = ("request_id", *ASKED)
    return request_frame({name: [getattr(s.request, name) for s in kept] for name in asked}, columns)


def request_frame(
    asked: Mapping[str, Sequence[object] | npt.NDArray[np.generic]],
    became: Mapping[str, Sequence[object] | npt.NDArray[np.generic]],
) -> pd.DataFrame:
    """The table of requests from columns of what was asked and of what became of it; `status` indexes `STATUSES`."""
    status = pd.Series(np.array(STATUSES, dtype=object)[np.asarray(became["status"], dtype=np.int64)], dtype="str")
    table = {
        "request_id": np.asarray(asked["request_id"], dtype=np.int64),
        "arrival_s": np.asarray(asked["arrival_s"], dtype=np.float64),
        **{k: np.asarray(asked[k], dtype=np.int64) for k in ("adapter", "prompt_tokens", "output_tokens")},
        "status": status,
        **{k: np.asarray(became[k], dtype=np.float64) for k in _TIMES},
        **{k: np.asarray(became[k], dtype=np.int64) for k in _COUNTS},
    }
    return pd.DataFrame(table)


_DTYPES = {"int": np.int64, "float": np.float64, "bool": np.bool_}


def row_table(rows: Sequence[object], kind: type[StepRow | MoveRow]) -> pd.DataFrame:
    """One row per record, a column per field."""
    return row_frame({f.name: [getattr(row, f.name) for row in rows] for f in fields(kind)}, kind)


def row_frame(
    columns: Mapping[str, Sequence[object] | npt.NDArray[np.generic]], kind: type[StepRow | MoveRow]
) -> pd.DataFrame:
    """The table of records of `kind` from their columns."""
    return pd.DataFrame(
        {
            f.name: pd.Series(np.asarray(columns[f.name], dtype=object), dtype="str")
            if f.type == "str"
            else np.asarray(columns[f.name], dtype=_DTYPES[str(f.type)])
            for f in fields(kind)
        }
    )


def adapter_table(catalogue: Catalogue, uses: dict[int, AdapterUse], requests: pd.DataFrame) -> pd.DataFrame:
    """One row per adapter of the catalogue, with its share of requests and its moves."""
    counts = requests.groupby("adapter").agg(
        requests=("request_id", "size"), finished=("finish_s", "count"), tokens_emitted=("tokens_emitted", "sum")
    )
    rows = []
    for adapter in catalogue:
        use = uses.get(adapter.adapter_id, AdapterUse())
        row = {"adapter": adapter.adapter_id, "name": adapter.name, "rank": adapter.rank}
        rows.append(row | {f.name: getattr(use, f.name) for f in fields(AdapterUse)})
    names = ["adapter", "name", "rank", *(f.name for f in fields(AdapterUse))]
    table = pd.DataFrame(rows, columns=names).merge(counts, how="left", left_on="adapter", right_index=True)
    return table.fillna({"requests": 0, "finished": 0, "tokens_emitted": 0}).astype(
        dict.fromkeys(("requests", "finished", "tokens_emitted"), "int64")
    )
