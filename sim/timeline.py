"""A run as a Chrome trace, which Perfetto opens: a lane per GPU slot, loads, steps, and counters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sim.tables import RunTables

PROCESS = 1
STEPS, LOADS, FIRST_SLOT = 1, 2, 10
"""Thread ids of the lanes."""

Event = dict[str, object]


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _names(max_loras: int, title: str) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": PROCESS, "args": {"name": title}}
    lanes = {STEPS: "steps", LOADS: "adapter loads", **{FIRST_SLOT + s: f"slot {s}" for s in range(max_loras)}}
    for thread, name in lanes.items():
        yield {"ph": "M", "name": "thread_name", "pid": PROCESS, "tid": thread, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": PROCESS, "tid": thread, "args": {"sort_index": thread}}


def _span(thread: int, name: str, start_s: float, end_s: float, args: Event) -> Event:
    start = _us(start_s)
    length = max(0.0, round(_us(end_s) - start, 3))
    return {"ph": "X", "pid": PROCESS, "tid": thread, "name": name, "ts": start, "dur": length, "args": args}


def _steps(tables: RunTables) -> Iterator[Event]:
    for step in tables.steps.to_dict("records"):
        kind = "decode" if not step["prefill_requests"] else "prefill" if not step["decode_requests"] else "mixed"
        keys = ("tokens", "prefill_tokens", "distinct_adapters", "admitted", "preempted", "skipped", "load_s")
        yield _span(STEPS, kind, step["start_s"], step["end_s"], {str(key): step[key] for key in keys})
        start = _us(step["start_s"])
        for name, values in (
            ("requests", {"running": step["running"], "waiting": step["waiting"]}),
            ("KV blocks used", {"used": step["used_blocks"]}),
        ):
            yield {"ph": "C", "pid": PROCESS, "name": name, "ts": start, "args": values}


def _moves(tables: RunTables, names: dict[int, str]) -> Iterator[Event]:
    living: dict[int, tuple[str, float]] = {}
    for move in tables.moves.to_dict("records"):
        name, slot = names[move["adapter"]], move["slot"]
        if move["kind"] in ("stage", "load"):
            yield _span(LOADS, f"{move['kind']} {name}", move["start_s"], move["end_s"], {"slot": slot})
        if move["kind"] == "load":
            living[slot] = (name, move["start_s"])
        elif move["kind"] == "evict" and slot in living:
            who, since = living.pop(slot)
            yield _span(FIRST_SLOT + slot, who, since, move["start_s"], {})
    for slot, (who, since) in living.items():
        yield _span(FIRST_SLOT + slot, who, since, max(since, tables.horizon_s), {})


def timeline(tables: RunTables, max_loras: int, title: str) -> Event:
    """The trace as plain data: timestamps and lengths in microseconds of the simulated clock."""
    names = dict(zip(tables.adapters["adapter"], tables.adapters["name"], strict=True))
    events: list[Event] = []
    for i, (name, engine) in enumerate(_engines(tables, title)):
        lanes = [*_names(max_loras, name), *_steps(engine), *_moves(engine, names)]
        events += [event | {"pid": PROCESS + i} for event in lanes]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _engines(tables: RunTables, title: str) -> Iterator[tuple[str, RunTables]]:
    """Each engine's own steps and moves, and what its process is called."""
    if tables.replicas is None:
        yield title, tables
        return
    for index in tables.replicas["replica"]:
        steps, moves = (frame[frame["replica"] == index] for frame in (tables.steps, tables.moves))
        yield f"replica {index}: {title}", replace(tables, steps=steps, moves=moves)
