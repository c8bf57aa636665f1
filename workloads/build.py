"""A scenario's `[workload]` table turned into requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from workloads import synth
from workloads.errors import WorkloadError
from workloads.reader import Reader, draw_lengths
from workloads.requests import RequestTable
from workloads.traces import azure_functions, azure_llm, burstgpt, mooncake, servegen, vtc
from workloads.traces import table as trace_table
from workloads.workload import Workload

SAMPLES = {
    "azure_conv": "azure_conv_sample.csv",
    "servegen_m_large": "servegen_m_large",
    "mooncake_conversation": "mooncake_conversation_sample.jsonl",
    "vtc_arena": "vtc_arena_sample.jsonl",
    "azure_functions_2019": "azure_functions_2019_sample.csv",
    "azure_functions_2021": "azure_functions_2021_sample.csv",
}
"""Shipped slices of real traces: `workload.sample` by name."""

_SOURCE = ("path", "sample", "start_s", "duration_s", "rate_scale")
_CUT = (*_SOURCE, "thin")
KEYS = {
    "synthetic": synth.SYNTHETIC,
    "clients": synth.CLIENTS,
    "table": _CUT,
    "vtc": _CUT,
    "azure_llm": (*_CUT, *synth.IDENTITY),
    "mooncake": (*_CUT, "spread", *synth.IDENTITY),
    "burstgpt": (*_CUT, *synth.IDENTITY),
    "servegen": _SOURCE,
    "azure_functions_2019": (*_CUT, "prompt", "output"),
    "azure_functions_2021": (*_CUT, "prompt", "output"),
}
"""`workload.kind` and the keys that it takes."""

NAMES_ITS_OWN = ("table", "vtc", "servegen", "clients")
"""Kinds whose source says which adapter a request is for; the others draw one of a number of adapters."""

Maker = Callable[[Reader, int | None, np.random.Generator], Workload]


def build_workload(data: Mapping[str, object], *, adapter_count: int | None, seed: int, base_dir: Path) -> Workload:
    """Requests of a `[workload]` table. `adapter_count`: how many adapters to draw from (None: the trace's own).

    Paths are relative to `base_dir`. Raises `WorkloadError` naming the key, or file and line.
    """
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in KEYS:
        raise WorkloadError(f"workload.kind is {kind!r}, must be one of {', '.join(KEYS)}")
    table = Reader(data, "workload", ("kind", *KEYS[kind]), base_dir)
    workload = MAKERS[kind](table, adapter_count, np.random.default_rng(seed))
    if len(workload.requests) == 0:
        raise WorkloadError("workload: no request in the chosen time; lengthen duration_s or raise the rate")
    return workload


def source(table: Reader) -> Path:
    """The file or folder that `path` or `sample` names."""
    if "sample" in table.data:
        name = table.text("sample")
        if name not in SAMPLES or "path" in table.data:
            raise WorkloadError(
                f"{table.where}.sample is {name}, must be one of {', '.join(SAMPLES)}, and without path"
            )
        return Path(str(files("workloads") / "data" / SAMPLES[name]))
    return table.path("path")


def _window(table: Reader, requests: RequestTable, rng: np.random.Generator) -> RequestTable:
    """The requests from `start_s` on, their clock `rate_scale` times as fast, for `duration_s`; `thin` keeps a share."""
    times = (requests.arrival_s - table.number("start_s", 0.0, zero=True)) / table.number("rate_scale", 1.0)
    keep = (times >= 0) & (times < table.number("duration_s", float("inf")))
    share = table.number("thin", 1.0)
    if share > 1:
        raise WorkloadError(f"{table.where}.thin is {share}, must be > 0 and <= 1: the share of requests that is kept")
    if share < 1:
        keep &= rng.random(len(keep)) < share
    return replace(requests.take(keep), arrival_s=times[keep])


def _named(load: Callable[[Path], Workload]) -> Maker:
    """A trace that says which adapter each request is for."""

    def make(table: Reader, count: int | None, rng: np.random.Generator) -> Workload:
        workload = load(source(table))
        found = len(workload.adapter_names)
        if count is not None and count != found:
            raise WorkloadError(f"adapters.count is {count}, but the trace names {found} adapters; leave the key out")
        return replace(workload, requests=_window(table, workload.requests, rng))

    return make


def _drawn(load: Callable[[Reader], Workload]) -> Maker:
    """A trace without identities: its adapters are drawn."""

    def make(table: Reader, count: int | None, rng: np.random.Generator) -> Workload:
        workload = load(table)
        requests = _window(table, workload.requests, rng)
        requests = replace(requests, adapter=synth.draw_adapters(table, count, requests.arrival_s, rng))
        notes = (*workload.notes, "the trace names no adapters: they are drawn independently of it")
        return Workload(requests, synth.names(count or 0), notes)

    return make


def _servegen(table: Reader, count: int | None, rng: np.random.Generator) -> Workload:
    clients = servegen.load(source(table))
    if count is not None and count != len(clients):
        raise WorkloadError(f"adapters.count is {count}, but the trace has {len(clients)} clients; leave the key out")
    start, duration = table.number("start_s", 0.0, zero=True), table.number("duration_s")
    times, prompt, output, adapter, notes = servegen.draw(
        clients, start, duration, table.number("rate_scale", 1.0), rng
    )
    return Workload(RequestTable(times, prompt, output, adapter), tuple(f"client-{c.client}" for c in clients), notes)


def _functions_2019(table: Reader, count: int | None, rng: np.random.Generator) -> Workload:
    counts = azure_functions.load_counts(source(table))
    times, function = azure_functions.draw_arrivals(counts, rng)
    note = "invocations are counted by the minute: they are spread at random within it"
    return _invoked(table, count, rng, (times, function, counts.names), (note,))


def _functions_2021(table: Reader, count: int | None, rng: np.random.Generator) -> Workload:
    return _invoked(table, count, rng, azure_functions.load_invocations(source(table)), ())


def _invoked(
    table: Reader,
    count: int | None,
    rng: np.random.Generator,
    invocations: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], tuple[str, ...]],
    notes: tuple[str, ...],
) -> Workload:
    """Invocations as requests: a function is an adapter, or one of `count` in turn; lengths are drawn."""
    times, function, names = invocations
    adapter, note = azure_functions.fold(function, count)
    ones = np.ones(len(times), dtype=np.int64)
    requests = _window(table, RequestTable(times, ones, ones, adapter), rng)
    prompt, output = (draw_lengths(table, key, len(requests), rng) for key in ("prompt", "output"))
    requests = replace(requests, prompt_tokens=prompt, output_tokens=output)
    return Workload(requests, names if count is None else synth.names(count), (*notes, note))


def _mooncake(table: Reader) -> Workload:
    spread = table.data.get("spread", True)
    if not isinstance(spread, bool):
        raise WorkloadError(f"{table.where}.spread is {spread!r}, must be true or false")
    return mooncake.load(source(table), spread=spread)


def _table(path: Path) -> Workload:
    return Workload(*trace_table.load(path))


MAKERS: Mapping[str, Maker] = {
    "synthetic": synth.synthetic,
    "clients": synth.clients,
    "table": _named(_table),
    "vtc": _named(vtc.load),
    "azure_llm": _drawn(lambda table: azure_llm.load(source(table))),
    "mooncake": _drawn(_mooncake),
    "burstgpt": _drawn(lambda table: burstgpt.load(source(table))),
    "servegen": _servegen,
    "azure_functions_2019": _functions_2019,
    "azure_functions_2021": _functions_2021,
}
