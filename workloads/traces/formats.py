"""Which format a trace file has, and how to open it outside a scenario."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from workloads.errors import WorkloadError
from workloads.requests import RequestTable
from workloads.traces import azure_functions, azure_llm, burstgpt, mooncake, servegen, table, vtc
from workloads.workload import Workload

MOST_DRAWN = 5_000_000
"""Requests that are drawn from a ServeGen folder at most."""

NO_LENGTHS = "the trace has no token counts"


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.readline(1 << 20)


def recognise(path: Path) -> str:
    """The name of the format that `path` seems to have, by its suffix and first line. Raises `WorkloadError`."""
    if path.is_dir():
        if any(path.glob("chunk-*-trace.csv")):
            return "servegen"
        raise WorkloadError(f"{path}: a folder without chunk-N-trace.csv; a ServeGen folder or a trace file is wanted")
    if not path.is_file():
        raise WorkloadError(f"{path}: no such file or folder; a trace is wanted")
    if path.suffix == ".parquet":
        return "table"
    line = _first_line(path)
    marks = {
        "arrival_s": "table",
        '"hash_ids"': "mooncake",
        '"result"': "vtc",
        "ContextTokens": "azure_llm",
        "Request tokens": "burstgpt",
        "HashFunction": "azure_functions_2019",
        "end_timestamp": "azure_functions_2021",
    }
    for mark, name in marks.items():
        if mark in line:
            return name
    raise WorkloadError(f"{path}:1: no known trace format begins so; name it with --from: {', '.join(OPENERS)}")


def _functions_2019(path: Path) -> Workload:
    counts = azure_functions.load_counts(path)
    arrival_s, function = azure_functions.draw_arrivals(counts, np.random.default_rng(0))
    ones = np.ones(len(function), dtype=np.int64)
    notes = ("invocations are counted by the minute: they are spread at random within it", NO_LENGTHS)
    return Workload(RequestTable(arrival_s, ones, ones, function + 1), counts.names, notes)


def _functions_2021(path: Path) -> Workload:
    arrival_s, function, names = azure_functions.load_invocations(path)
    ones = np.ones(len(function), dtype=np.int64)
    return Workload(RequestTable(arrival_s, ones, ones, function + 1), names, (NO_LENGTHS,))


def _servegen(path: Path, duration_s: float | None) -> Workload:
    clients = servegen.load(path)
    windows = [window for client in clients for window in client.windows]
    end_s = min(max(window.start_s for window in windows) + servegen.WINDOW_S, duration_s or float("inf"))
    expected = sum(w.rate * max(0.0, min(end_s - w.start_s, servegen.WINDOW_S)) for w in windows)
    if expected > MOST_DRAWN:
        raise WorkloadError(
            f"{path}: {expected:.0f} requests would be drawn in {end_s:g} s; choose less with --duration-s"
        )
    *columns, notes = servegen.draw(clients, 0.0, end_s, 1.0, np.random.default_rng(0))
    drawn = "requests are drawn from each client's rates and histograms"
    return Workload(RequestTable(*columns), tuple(f"client-{c.client}" for c in clients), (drawn, *notes))  # type: ignore[arg-type]


OPENERS: Mapping[str, Callable[[Path], Workload]] = {
    "table": lambda path: Workload(*table.load(path)),
    "azure_llm": azure_llm.load,
    "servegen": lambda path: _servegen(path, None),
    "mooncake": mooncake.load,
    "burstgpt": burstgpt.load,
    "vtc": vtc.load,
    "azure_functions_2019": _functions_2019,
    "azure_functions_2021": _functions_2021,
}
"""Formats by the name that `workload.kind` has for them. Requests of traces without identities are for the base model."""


def open_trace(path: Path, name: str | None = None, duration_s: float | None = None) -> Workload:
    """The requests in `path` (of its first `duration_s`), of format `name` or the one recognised.

    Lengths that a format lacks are 1 token, with the note `NO_LENGTHS`.
    """
    if name is not None and name not in OPENERS:
        raise WorkloadError(f"format {name}: unknown, must be one of {', '.join(OPENERS)}")
    name = name or recognise(path)
    workload = _servegen(path, duration_s) if name == "servegen" else OPENERS[name](path)
    if duration_s is not None:
        inside = int(np.searchsorted(workload.requests.arrival_s, duration_s))
        workload = replace(workload, requests=workload.requests.take(slice(inside)))
    if len(workload.requests) == 0:
        raise WorkloadError(f"{path}: no request in the first {duration_s} s")
    return workload
