"""The same traffic in another format: the project's own table (`workloads.traces.table`), or what a load generator reads.

The formats of load generators, and where their rules come from, are in `workloads.replay`.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from workloads.errors import WorkloadError
from workloads.replay import inference_perf, json_line, mooncake, sglang, vllm
from workloads.requests import BASE, NO_PREFIX
from workloads.workload import Workload

_CHUNK = 1 << 16
_SUFFIXES = (".csv", ".jsonl", ".parquet")


def _chunks(workload: Workload) -> Iterator[dict[str, list[float] | list[int] | list[str]]]:
    """Columns of the generic table, so many rows at a time; optional ones only where they say something."""
    r = workload.requests
    names = ("", *workload.adapter_names)
    shared = (r.prefix_id != NO_PREFIX).any()
    for start in range(0, len(r), _CHUNK):
        part = r.take(slice(start, start + _CHUNK))
        columns: dict[str, list[float] | list[int] | list[str]] = {
            "arrival_s": part.arrival_s.tolist(),
            "prompt_tokens": part.prompt_tokens.tolist(),
            "output_tokens": part.output_tokens.tolist(),
            "adapter": [names[i] for i in part.adapter],
        }
        if r.priority.any():
            columns["priority"] = part.priority.tolist()
        if shared and r.tree is not None:
            columns["prefix_path"] = [" ".join(f"{end}:{node}" for end, node in request.prefix) for request in part]
        elif shared:
            columns["prefix_id"] = ["" if i == NO_PREFIX else str(i) for i in part.prefix_id.tolist()]
            columns["prefix_tokens"] = part.prefix_tokens.tolist()
        yield columns


def _table(workload: Workload, out: Path, partial: Path) -> tuple[str, ...]:
    if out.suffix not in _SUFFIXES:
        raise WorkloadError(f"{out}: a trace table must be .csv, .jsonl or .parquet")
    used = np.unique(workload.requests.adapter)
    names = [workload.adapter_names[i - 1] for i in used if i != BASE]
    if "" in names or len(set(names)) < len(names):
        raise WorkloadError(f"{out}: a trace table knows adapters by name, their names must differ and not be empty")
    if out.suffix == ".parquet":
        _parquet(workload, partial)
    elif out.suffix == ".csv":
        with partial.open("w", encoding="utf-8", newline="") as file:
            # Whether a lone carriage return in a name is quoted depends on the version of Python: so are all names.
            writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
            for i, columns in enumerate(_chunks(workload)):
                if i == 0:
                    file.write(",".join(columns) + "\n")
                writer.writerows(zip(*columns.values(), strict=True))
    else:
        with partial.open("w", encoding="utf-8") as file:
            for columns in _chunks(workload):
                for row in zip(*columns.values(), strict=True):
                    file.write(json_line(dict(zip(columns, row, strict=True))))
    unused = len(workload.adapter_names) - len(names)
    return (f"adapters without a request: {unused}; the table does not name them",) if unused else ()


def _parquet(workload: Workload, partial: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for columns in _chunks(workload):
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(partial, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


TARGETS: Mapping[str, Callable[[Workload, Path, Path], tuple[str, ...]]] = {
    "table": _table,
    "vllm": vllm,
    "sglang": sglang,
    "mooncake": mooncake,
    "inference-perf": inference_perf,
}
"""Formats by name: each writes the workload to its third argument, which will become its second, and returns notes."""


def convert(workload: Workload, to: str, out: Path) -> tuple[str, ...]:
    """Write `workload` to `out` in the format `to`; notes say what it cannot hold. Nothing is left if that fails.

    Raises `WorkloadError` for an unknown format, an `out` that exists or cannot be written, or a workload that the
    format cannot hold at all.
    """
    if to not in TARGETS:
        raise WorkloadError(f"format {to}: unknown, must be one of {', '.join(TARGETS)}")
    if os.path.lexists(out):
        raise WorkloadError(f"{out} exists; give another name")
    if not out.parent.is_dir():
        raise WorkloadError(f"{out}: there is no folder {out.parent}")
    if not len(workload.requests):
        raise WorkloadError(f"{out}: the workload has no requests, there is nothing to write")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        notes = TARGETS[to](workload, out, partial)
        partial.rename(out)
    except (OSError, UnicodeEncodeError, OverflowError) as error:
        raise WorkloadError(f"{out}: cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return notes
