"""Azure LLM inference traces 2023/2024: `TIMESTAMP,ContextTokens,GeneratedTokens`, no identities."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt

from workloads.errors import WorkloadError

HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


def load(path: Path) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(arrival_s from the first row, prompt tokens, output tokens). Errors name file and line."""
    if not path.is_file():
        raise WorkloadError(f"{path}: no such file; workload.path must name an Azure LLM trace")
    with path.open(newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if header != HEADER:
            raise WorkloadError(f"{path}:1: columns are {','.join(header)}, must be {','.join(HEADER)}")
        stamps, prompts, outputs = [], [], []
        for line, row in enumerate(rows, start=2):
            if len(row) != len(HEADER):
                raise WorkloadError(f"{path}:{line}: {len(row)} fields, must be {len(HEADER)}")
            try:
                stamps.append(np.datetime64(row[0].split("+")[0].strip().replace(" ", "T"), "ns"))
                prompts.append(int(row[1]))
                outputs.append(int(row[2]))
            except ValueError as error:
                raise WorkloadError(f"{path}:{line}: {error}; want a date-time and two token counts") from error
            if np.isnat(stamps[-1]):  # numpy reads an empty or NaT stamp without complaint
                raise WorkloadError(f"{path}:{line}: TIMESTAMP is {row[0]!r}, must be a date-time")
            if len(stamps) > 1 and stamps[-1] < stamps[-2]:
                raise WorkloadError(f"{path}:{line}: TIMESTAMP is before the row above, rows must be in arrival order")
            if prompts[-1] < 1 or outputs[-1] < 1:
                raise WorkloadError(f"{path}:{line}: token counts must be >= 1")
    times = np.array(stamps, dtype="datetime64[ns]")
    arrival = (times - times[0]).astype(np.int64) * 1e-9 if len(times) else np.zeros(0)
    return arrival, np.array(prompts, dtype=np.int64), np.array(outputs, dtype=np.int64)
