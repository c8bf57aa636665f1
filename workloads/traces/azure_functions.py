"""Azure Functions traces (Azure/AzurePublicDataset): who is invoked when; a function stands in for an adapter. No tokens.

2019 (Shahrad et al., USENIX ATC 2020): invocations per function and minute. 2021 (Zhang et al., SOSP 2021): each invocation.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from workloads.errors import WorkloadError
from workloads.requests import IntArray
from workloads.traces.rows import csv_rows, seconds, whole_text

IDS = ("HashOwner", "HashApp", "HashFunction")
INVOCATIONS = ["app", "func", "end_timestamp", "duration"]
_MINUTE = re.compile(r"(?:minute_)?(\d{1,9})", re.ASCII)
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Counts:
    """`counts` int64[functions, minutes]: how often each of `names` is invoked; column 0 is `first_minute` of the day."""

    names: tuple[str, ...]
    counts: IntArray
    first_minute: int


def _first_minute(names: list[str], where: str) -> int:
    """The first of the minute columns, which must follow on one another."""
    minutes = [int(match[1]) if (match := _MINUTE.fullmatch(name)) else -1 for name in names]
    first = max([0, *minutes[:1]])
    wrong = [name for i, name in enumerate(names) if minutes[i] != first + i]
    if wrong or not names:
        what = f"column {wrong[0]!r}" if wrong else "no minute columns"
        raise WorkloadError(f"{where}: {what}, must be consecutive minutes (1, 2, … or minute_1, …) after the ids")
    return first


def load_counts(path: Path) -> Counts:
    """The 2019 layout. A function is named by its HashFunction, or owner/app/function where that is not unique."""
    rows = csv_rows(path, "an Azure Functions 2019 trace")
    line, header = next(rows)
    head = next((i for i, name in enumerate(header) if name not in (*IDS, "Trigger")), len(header))
    if any(name not in header[:head] for name in IDS) or len(set(header[:head])) < head:
        raise WorkloadError(f"{path}:{line}: id columns are {header[:head]}, must be {', '.join(IDS)} (and Trigger)")
    first_minute, at = _first_minute(header[head:], f"{path}:{line}"), [header.index(name) for name in IDS]
    seen: dict[tuple[str, ...], int] = {}
    counts = []
    for line, row in rows:
        ids = tuple(row[i] for i in at)
        if not all(ids):
            raise WorkloadError(f"{path}:{line}: {IDS[ids.index('')]} is empty, must be an id")
        if seen.setdefault(ids, line) != line:
            raise WorkloadError(f"{path}:{line}: the same function as in line {seen[ids]}, must be one row each")
        cells, digits = row[head:], "".join(row[head:])
        # One look at the row: a day has 60 million cells.
        if not (all(cells) and digits.isascii() and digits.isdigit() and max(map(len, cells)) < 10):
            for name, cell in zip(header[head:], cells, strict=True):
                whole_text(cell, f"{path}:{line}: column {name}")
        counts.append(np.array(list(map(int, cells)), dtype=np.int64))
    often = Counter(ids[-1] for ids in seen)
    names = tuple(ids[-1] if often[ids[-1]] == 1 else "/".join(ids) for ids in seen)
    return Counts(names, np.stack(counts), first_minute)


def load_invocations(path: Path) -> tuple[FloatArray, IntArray, tuple[str, ...]]:
    """The 2021 layout: (arrival_s float64[n] from the first, function int64[n] from 0 as they arrive first, app/func names)."""
    rows = csv_rows(path, "an Azure Functions 2021 trace")
    line, header = next(rows)
    if header != INVOCATIONS:
        raise WorkloadError(f"{path}:{line}: columns are {','.join(header)}, must be {','.join(INVOCATIONS)}")
    found: list[tuple[float, str]] = []
    for line, row in rows:
        if not (row[0] and row[1]):
            raise WorkloadError(f"{path}:{line}: {'func' if row[0] else 'app'} is empty, must be an id")
        end, duration = (seconds(row[i], f"{path}:{line}: {INVOCATIONS[i]}") for i in (2, 3))
        found.append((end - duration, f"{row[0]}/{row[1]}"))  # a func is unique only within its app
    found.sort(key=lambda pair: pair[0])
    number = {name: i for i, name in enumerate(dict.fromkeys(name for _, name in found))}
    arrival = np.array([time for time, _ in found])
    return arrival - arrival[0], np.array([number[name] for _, name in found], dtype=np.int64), tuple(number)


def fold(functions: IntArray, adapters: int | None) -> tuple[IntArray, str]:
    """(adapter int64[n] from 1, note) of invoked `functions` int64[n] from 0; None: an adapter for each function."""
    invoked = len(np.unique(functions))
    if adapters is None:
        return functions + 1, f"each of {invoked} invoked functions is an adapter of its own"
    if isinstance(adapters, bool) or adapters < 1:
        raise WorkloadError(f"functions can be folded onto 1 adapter or more, not {adapters}")
    note = f"{invoked} invoked functions folded onto {adapters} adapters: function i on adapter i mod {adapters} + 1"
    return functions % adapters + 1, f"{note}, as AlpaServe and dLoRA do"


def draw_arrivals(
    counts: Counts, rng: np.random.Generator, start_minute: int = 0, minutes: int | None = None
) -> tuple[FloatArray, IntArray]:
    """(arrival_s float64[n], function int64[n] from 0), in order: each minute's invocations at random within it.

    `minutes` of them (None: all) from column `start_minute` on, whose beginning is arrival 0.
    """
    width = counts.counts.shape[1]
    stop = width if minutes is None else start_minute + minutes
    if not 0 <= start_minute < stop <= width:
        raise WorkloadError(f"minutes {start_minute} to {stop} are asked for, must be some within 0 to {width}")
    each = counts.counts[:, start_minute:stop].T.ravel()
    cell = np.repeat(np.arange(len(each)), each)
    minute, function = np.divmod(cell, len(counts.names))
    # The sum may round up to the next minute.
    arrival = np.minimum(60 * (minute + rng.random(len(cell))), np.nextafter(60.0 * (minute + 1), 0))
    order = np.argsort(arrival, kind="stable")
    return arrival[order], function[order]
