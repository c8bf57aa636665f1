"""The rows a run leaves behind, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

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

    `replicas`: one row per replica of a fleet (`sim.fleet_tables`); None for a single engine.
    """

    requests: pd.DataFrame
    steps: pd.DataFrame
    adapters: pd.DataFrame
    horizon_s: float
    moves: pd.DataFrame = field(default_factory=lambda: row_table([], MoveRow))
    replicas: pd.DataFrame | None = None


def request_table(states: Iterable[RequestState], running: set[int]) -> pd.DataFrame:
    """One row per request, in arrival order."""
    rows = []
    for s in states:
        r = s.request
        status = "finished" if s.finish_s is not None else "running" if r.request_id in running else "waiting"
        rows.append(
            (
                r.request_id, r.arrival_s, r.adapter, r.prompt_tokens, r.output_tokens, status,
                s.first_scheduled_s, s.first_token_s, s.finish_s, s.emitted, s.cached_tokens, s.preemptions, s.skips,
            )
        )  # fmt: skip
    names = (
        "request_id arrival_s adapter prompt_tokens output_tokens status first_scheduled_s first_token_s finish_s"
        " tokens_emitted cached_tokens preemptions skips"
    ).split()
    table = pd.DataFrame(rows, columns=names)
    return table.astype(dict.fromkeys(("first_scheduled_s", "first_token_s", "finish_s"), "float64"))


def row_table(rows: Sequence[object], kind: type[StepRow | MoveRow]) -> pd.DataFrame:
    """One row per record, a column per field."""
    names = [f.name for f in fields(kind)]
    return pd.DataFrame({name: [getattr(row, name) for row in rows] for name in names})


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
