"""Azure LLM inference traces 2023 and 2024 (Azure/AzurePublicDataset; Patel et al., ISCA 2024; Stojkovic et al. 2024).

CSV `TIMESTAMP,ContextTokens,GeneratedTokens`; no identities.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from workloads.errors import WorkloadError
from workloads.requests import BASE, RequestTable
from workloads.traces.rows import csv_rows, whole_text
from workloads.workload import Workload

HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


def load(path: Path) -> Workload:
    """Requests for the base model, `arrival_s` from the first row. Rows without prompt or output tokens are left out."""
    rows = csv_rows(path, "an Azure LLM trace")
    line, header = next(rows)
    if header != HEADER:
        raise WorkloadError(f"{path}:{line}: columns are {','.join(header)}, must be {','.join(HEADER)}")
    stamps, prompts, outputs = [], [], []
    for line, row in rows:
        stamps.append(_stamp(row[0], f"{path}:{line}"))
        if len(stamps) > 1 and stamps[-1] < stamps[-2]:
            raise WorkloadError(f"{path}:{line}: TIMESTAMP is before the row above, rows must be in arrival order")
        prompts.append(whole_text(row[1], f"{path}:{line}: ContextTokens"))
        outputs.append(whole_text(row[2], f"{path}:{line}: GeneratedTokens"))
    times = np.array(stamps, dtype="datetime64[ns]")
    arrival_s = (times - times[0]).astype(np.int64) * 1e-9
    prompt, output = np.array(prompts, dtype=np.int64), np.array(outputs, dtype=np.int64)
    kept = (prompt > 0) & (output > 0)
    empty = len(kept) - int(kept.sum())
    if empty == len(kept):
        raise WorkloadError(f"{path}: no row has prompt and output tokens, at least one must")
    notes = (f"{empty} of {len(kept)} rows have no prompt or no output tokens: left out",) if empty else ()
    requests = RequestTable(arrival_s[kept], prompt[kept], output[kept], np.full(int(kept.sum()), BASE, dtype=np.int64))
    return Workload(requests, (), notes)


def _stamp(text: str, where: str) -> np.datetime64:
    """A date-time; a UTC offset (2024) is the same in every row and is left away."""
    try:
        stamp = np.datetime64(text.split("+", maxsplit=1)[0].strip().replace(" ", "T"), "ns")
        missing = bool(np.isnat(stamp))  # numpy reads an empty or NaT stamp without complaint
    except ValueError:
        missing = True
    if missing:
        raise WorkloadError(f"{where}: TIMESTAMP is {text!r}, must be a date-time")
    return stamp
