"""BurstGPT (Wang et al. 2024, HPMLL/BurstGPT): requests to ChatGPT and GPT-4, no adapters.

CSV `Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type`; `Timestamp` in seconds, a row in time order.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from workloads.errors import WorkloadError
from workloads.requests import BASE, RequestTable
from workloads.traces.rows import csv_rows, seconds, whole_text
from workloads.workload import Workload

HEADER = ["Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type"]
LATER = {"Session ID", "Elapsed time"}
"""Columns that later parts of the trace add; they are not read."""


def load(path: Path) -> Workload:
    """The requests that were answered, `arrival_s` from the first of them; all for the base model."""
    rows = csv_rows(path, "a BurstGPT trace")
    line, header = next(rows)
    if header[: len(HEADER)] != HEADER or not set(header[len(HEADER) :]) <= LATER:
        raise WorkloadError(f"{path}:{line}: columns are {','.join(header)}, must be {','.join(HEADER)}")
    kept: list[tuple[float, int, int]] = []
    models: Counter[str] = Counter()
    before, failed = 0.0, 0
    for line, row in rows:
        now = seconds(row[0], f"{path}:{line}: Timestamp")
        prompt, output, total = (whole_text(row[i], f"{path}:{line}: {HEADER[i]}") for i in (2, 3, 4))
        if now < before:
            raise WorkloadError(f"{path}:{line}: Timestamp is before the row above, rows must be in arrival order")
        if prompt + output != total:
            raise WorkloadError(f"{path}:{line}: Total tokens is {total}, must be the sum {prompt + output}")
        if not row[1]:
            raise WorkloadError(f"{path}:{line}: Model is empty, must name a model")
        before = now
        if output == 0:
            failed += 1
            continue
        if prompt == 0:
            raise WorkloadError(f"{path}:{line}: Request tokens is 0, must be >= 1 where there is a response")
        kept.append((now, prompt, output))
        models[row[1]] += 1
    if not kept:
        raise WorkloadError(f"{path}: none of its {failed} rows has response tokens, at least one must")
    read = failed + len(kept)
    notes = [f"{failed} of {read} requests failed (no response tokens): left out"] if failed else []
    named = ", ".join(f"{name} {count}" for name, count in models.most_common())
    notes.append(f"Model is a chat model, no adapter: all requests are for the base model ({named})")
    arrival = np.array([row[0] for row in kept])
    prompts, outputs = (np.array([row[i] for row in kept], dtype=np.int64) for i in (1, 2))
    adapter = np.full(len(kept), BASE, dtype=np.int64)
    return Workload(RequestTable(arrival - arrival[0], prompts, outputs, adapter), (), tuple(notes))
