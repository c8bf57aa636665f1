"""What another engine took: its step logs and timing tables as the table of measured steps a profile is fitted to.

Four kinds of CSV, told apart by their columns (times in ms):

- a step log `NAME_steps.csv`: a row a step with `total_ms` (the whole step), `sample_ms` (its GPU part), `loads`, `load_ms`,
  `activations`, `act_ms`, and where known `t` (s, its start) and `exec_ms` (the launches); beside it `NAME_sched.jsonl.gz`, a line a
  step `[step, [[request, tokens], ...]]`, and `NAME_requests.csv` with `req`, `prompt_tokens`, `adapter_id` (0: none);
- both tables may have `max_loras`, of the engine they were measured on;
- a decode table: `B` requests over `D` adapters, keys from `ctx_first` to `ctx_last`, `median_ms`, `sample_ms`;
- a prefill table: `tokens` in `n_prompts` prompts over `D` adapters, `step_ms`, `sample_ms`;
- a load table: `load_from_disk_ms` (disk to host, 0: was there), `activate_ms` (host to slot, 0: was there).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd

from backend.base import NO_SLOT, StepBatch
from backend.csv_tables import check_column, read_csv
from backend.errors import BackendError
from backend.fitting import composition

_KINDS: dict[str, tuple[str, ...]] = {
    "steps": ("total_ms", "sample_ms", "loads", "activations"),
    "decode": ("B", "D", "ctx_first", "ctx_last", "median_ms", "sample_ms"),
    "prefill": ("tokens", "n_prompts", "D", "step_ms", "sample_ms"),
    "loads": ("load_from_disk_ms", "activate_ms"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "steps": (),
    "decode": ("p10_ms", "p90_ms", "exec_ms", "max_loras"),
    "prefill": ("exec_ms", "max_loras"),
    "loads": (),
}
_COUNTS, _MOST = ("B", "tokens", "n_prompts"), 10**6
"""Columns that count what a step has, from 1 to below so many."""

_NEVER_ZERO = ("median_ms", "step_ms")
"""Columns that errors are relative to."""

_WHOLE = (*_COUNTS, "D", "max_loras", "loads", "activations")
_WARM_UP = 1
"""First repetitions of a prefill cell that are left out."""


def read_table(path: Path) -> tuple[str, pd.DataFrame]:
    """The kind of a CSV (`steps`, `decode`, `prefill` or `loads`) and its rows. Raises `BackendError` for any other."""
    table = read_csv(path)
    for kind, needed in _KINDS.items():
        if set(needed) <= set(table.columns):
            optional = [column for column in _OPTIONAL[kind] if column in table.columns]
            for column in (*needed, *optional):
                least, below = (1, _MOST) if column in _COUNTS else (0, 2**31)
                above = 0 if column in _NEVER_ZERO else -1
                check_column(path, table, column, whole=column in _WHOLE, least=least, above=above, below=below)
            return kind, table
    known = "; ".join(f"{kind}: {', '.join(needed)}" for kind, needed in _KINDS.items())
    raise BackendError(f"{path}: none of the kinds of table that are known by their columns ({known})")


def read_steps(paths: Sequence[Path], rank: int, kind: str) -> pd.DataFrame:
    """All measured steps of `paths` (load tables left out) as rows of `kind`; every adapter has `rank`."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        table_kind, table = read_table(path)
        if table_kind == "steps":
            rows += _from_log(path, table, rank)
        elif table_kind == "decode":
            rows += [_from_decode(row, rank) for row in table.to_dict("records")]
        elif table_kind == "prefill":
            rows += _from_prefill(table, rank)
    return pd.DataFrame([{"kind": kind, **row} for row in rows])


def read_loads(paths: Sequence[Path], rank: int, nbytes: int) -> pd.DataFrame:
    """Adapter moves of all load tables: `kind` (`stage`: disk to host, `load`: host to slot), `rank`, `nbytes`, `elapsed_s`."""
    rows = []
    for path in paths:
        table_kind, table = read_table(path)
        if table_kind != "loads":
            continue
        for kind, column in (("stage", "load_from_disk_ms"), ("load", "activate_ms")):
            rows += [(kind, rank, nbytes, ms / 1e3) for ms in table[column] if ms > 0]
    return pd.DataFrame(rows, columns=["kind", "rank", "nbytes", "elapsed_s"])


def _row(
    batch: StepBatch, rank: int, total_ms: float, device_ms: float, launch_ms: float, spread: tuple[float, float]
) -> dict[str, Any]:
    ranks = {slot: rank for slot in batch.slots if slot != NO_SLOT}
    total, device = total_ms / 1e3, min(device_ms, total_ms) / 1e3
    times = {"device_s": device, "host_s": total - device, "launch_s": launch_ms / 1e3, "elapsed_s": total}
    return {**composition(batch, ranks), **times, "p10_s": spread[0] / 1e3, "p90_s": spread[1] / 1e3}


def _spread_slots(requests: int, adapters: int) -> tuple[int, ...]:
    return tuple(i % adapters if adapters else NO_SLOT for i in range(requests))


def _from_decode(row: dict[Any, Any], rank: int) -> dict[str, Any]:
    requests, median = int(row["B"]), float(row["median_ms"])
    context = round((row["ctx_first"] + row["ctx_last"]) / 2)
    slots = _spread_slots(requests, int(row["D"]))
    batch = StepBatch((1,) * requests, (context,) * requests, slots, (True,) * requests)
    spread = (float(row.get("p10_ms", median)), float(row.get("p90_ms", median)))
    timed = _row(batch, rank, median, float(row["sample_ms"]), float(row.get("exec_ms", 0.0)), spread)
    return {**timed, "max_loras": int(row.get("max_loras", 0))}


def _from_prefill(table: pd.DataFrame, rank: int) -> list[dict[str, Any]]:
    rows = []
    for _, cell in table.groupby(["tokens", "n_prompts", "D"], sort=False):
        tokens, count, adapters = (int(cell[name].iloc[0]) for name in ("tokens", "n_prompts", "D"))
        kept = cell.iloc[_WARM_UP:] if len(cell) > _WARM_UP else cell
        batch = StepBatch((tokens // count,) * count, (0,) * count, _spread_slots(count, adapters), (True,) * count)
        low, median, high = kept["step_ms"].quantile([0.1, 0.5, 0.9])
        launch = float(kept["exec_ms"].median()) if "exec_ms" in kept else 0.0
        timed = _row(batch, rank, median, kept["sample_ms"].median(), launch, (low, high))
        rows.append({**timed, "max_loras": int(kept["max_loras"].iloc[0]) if "max_loras" in kept else 0})
    return rows


def _from_log(path: Path, table: pd.DataFrame, rank: int) -> list[dict[str, Any]]:
    """The steps of a log in which no adapter moved."""
    if not path.name.endswith("_steps.csv"):
        raise BackendError(
            f"{path}: a step log must be named NAME_steps.csv, beside NAME_sched.jsonl.gz and NAME_requests.csv"
        )
    stem = path.name.removesuffix("_steps.csv")
    prompts, slots = _requests(path.with_name(f"{stem}_requests.csv"))
    plan = path.with_name(f"{stem}_sched.jsonl.gz")
    rows, ended_s = [], float("nan")
    for line, batch, after_prompts in _batches(plan, path, table, prompts, slots):
        total, begun_s = float(line["total_ms"]), float(line.get("t", "nan"))
        # Where no request of the step had begun, the engine may have been idle before it.
        between_s = begun_s - ended_s if any(batch.context_lens) else float("nan")
        ended_s = begun_s + total / 1e3
        if not line["loads"] and not line["activations"]:
            row = _row(batch, rank, total, line["sample_ms"], float(line.get("exec_ms", 0.0)), (total, total))
            at = {"t_s": 0.0 if isnan(begun_s) else begun_s, "between_s": between_s}
            rows.append({**row, **at, "after_prompts": after_prompts})
    return rows


def _batches(
    plan: Path, path: Path, table: pd.DataFrame, prompts: dict[int, int], slots: dict[int, int]
) -> Iterator[tuple[dict[Any, Any], StepBatch, bool]]:
    """Each step that computes anything: its line, its batch, and whether the one before computed prompts."""
    lines, computed = table.to_dict("records"), dict.fromkeys(prompts, 0)
    after_prompts = False
    for step, parts in _schedule(plan):
        if step >= len(lines):
            raise BackendError(f"{plan}: step {step} is not in {path.name}, which has {len(lines)} steps")
        unknown = [request for request, _ in parts if request not in prompts]
        if unknown:
            raise BackendError(
                f"{plan}: step {step} names request {unknown[0]}, which {path.name.replace('_steps', '_requests')} lacks"
            )
        if not parts:
            continue
        query = tuple(tokens for _, tokens in parts)
        context = tuple(computed[request] for request, _ in parts)
        for request, tokens in parts:
            computed[request] += tokens
        samples = tuple(computed[request] >= prompts[request] for request, _ in parts)
        yield (
            lines[step],
            StepBatch(query, context, tuple(slots[request] for request, _ in parts), samples),
            after_prompts,
        )
        after_prompts = max(query) > 1


def _requests(path: Path) -> tuple[dict[int, int], dict[int, int]]:
    """Prompt tokens and slot of each request."""
    if not path.is_file():
        raise BackendError(f"{path}: missing; a step log needs its requests beside it")
    table = read_csv(path)
    for column in ("req", "prompt_tokens", "adapter_id"):
        if column not in table.columns:
            raise BackendError(f"{path}: has no column {column}; needs req, prompt_tokens, adapter_id")
        check_column(path, table, column, whole=True)
    adapters = table["adapter_id"].astype(int) - 1
    names = table["req"].astype(int)
    return dict(zip(names, table["prompt_tokens"].astype(int), strict=True)), dict(zip(names, adapters, strict=True))


def _schedule(path: Path) -> list[tuple[int, list[tuple[int, int]]]]:
    """Steps in order: number, and (request, tokens) of each that was scheduled."""
    if not path.is_file():
        raise BackendError(f"{path}: missing; a step log needs its schedule beside it")
    steps = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                step, parts = json.loads(line)
                steps.append((int(step), [(int(request), int(tokens)) for request, tokens in parts]))
            except (ValueError, TypeError) as error:
                raise BackendError(f"{path}:{number}: must be [step, [[request, tokens], ...]] ({error})") from error
    return steps
