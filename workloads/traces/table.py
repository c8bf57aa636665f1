"""The generic trace table: `arrival_s, prompt_tokens, output_tokens, adapter` (+ `priority`) as CSV, JSONL or Parquet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from workloads.errors import WorkloadError
from workloads.requests import BASE, RequestTable

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens", "adapter")
OPTIONAL = ("priority",)


def _read(path: Path) -> tuple[pd.DataFrame, int]:
    """The table, and the line its first row stands on."""
    if not path.is_file():
        raise WorkloadError(f"{path}: no such file; workload.path must name a trace table")
    if path.suffix not in (".csv", ".jsonl", ".parquet"):
        raise WorkloadError(f"{path}: a trace table must be .csv, .jsonl or .parquet")
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype={"adapter": str}), 2
        if path.suffix == ".jsonl":
            return pd.read_json(path, lines=True, dtype={"adapter": str}), 1
        return pd.read_parquet(path), 0
    except (ValueError, OSError) as error:
        raise WorkloadError(f"{path}: cannot be read as a table ({error})") from error


def load(path: Path) -> tuple[RequestTable, tuple[str, ...]]:
    """The requests and the adapters' names in order of first appearance; an empty adapter is the base model."""
    table, first = _read(path)
    missing = [name for name in REQUIRED if name not in table]
    unknown = [name for name in table if name not in REQUIRED + OPTIONAL]
    if missing or unknown:
        known = ", ".join(REQUIRED + OPTIONAL)
        raise WorkloadError(f"{path}:1: columns missing: {missing}, unknown: {unknown}; a trace table has {known}")
    columns = {}
    for name in ("arrival_s", "prompt_tokens", "output_tokens", *(n for n in OPTIONAL if n in table)):
        values = pd.to_numeric(table[name], errors="coerce")
        least = 0 if name == "arrival_s" else -(2**31) if name == "priority" else 1
        bad = np.nonzero((values.isna() | (values < least)).to_numpy())[0]
        if len(bad):
            row = int(bad[0])
            raise WorkloadError(f"{path}:{row + first}: {name} is {table[name].iloc[row]}, must be a number >= {least}")
        columns[name] = values.to_numpy(dtype=np.float64 if name == "arrival_s" else np.int64)
    back = np.nonzero(np.diff(columns["arrival_s"]) < 0)[0]
    if len(back):
        raise WorkloadError(
            f"{path}:{int(back[0]) + 1 + first}: arrival_s is before the row above, rows must be in order"
        )
    names = table["adapter"].fillna("").astype(str)
    codes, uniques = pd.factorize(names.where(names != "", None))
    priority = columns.get("priority", np.zeros(len(table), dtype=np.int64))
    requests = RequestTable(
        columns["arrival_s"],
        columns["prompt_tokens"],
        columns["output_tokens"],
        codes.astype(np.int64) + 1 + BASE,
        priority,
    )
    return requests, tuple(str(u) for u in uniques)
