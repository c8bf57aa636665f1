"""Where a step's GPU time goes, kernel by kernel: the part `kernels` of `benchmarks.step`.

Kernels of a stream overlap (programmatic dependent launch), so that their durations add up to more than the step. A kernel
is charged what it moves the step's end by: its end minus the latest end before it. Tracing makes the host slower: the first kernel
of a graph is charged the wait for its launch, longer than it is untraced (`start of the graph`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from benchmarks.step import Bench

REPEATS = 7
DECODES = (1, 8, 16, 32, 64, 128, 256)
PROMPT_TOKENS = (2048, 8192)

PARTS = (
    ("shrink", r"shrink|settle"),
    ("expand", r"expand"),
    ("attention", r"_attention|_merge_splits|_rope_and_cache"),
    ("norm and SwiGLU", r"_add_rms_norm|_silu_mul"),
    ("start of the graph", r"segment_map|compare_scalar"),
    ("base products", r"linear_|nvjet|gemm|cutlass|splitK"),
)
"""Parts of a step and their kernels' names, first match first; up to 128 rows the base products contain the expands."""


def part_of(kernel: str) -> str:
    """The part of the step that a kernel is, by its name."""
    return next((part for part, names in PARTS if re.search(names, kernel)), "other")


def charged(events: Sequence[tuple[str, float, float]]) -> list[tuple[str, float]]:
    """(name, microseconds by which it moved the end) of each of `events` (name, start, end), in the order of their starts."""
    latest, moved = None, []
    for name, start, end in sorted(events, key=lambda event: event[1]):
        moved.append((name, max(0.0, end - (start if latest is None else latest))))
        latest = end if latest is None else max(latest, end)
    return moved


def _traced(bench: Bench, step: Any) -> pd.DataFrame:
    """A step's kernels (and copies): launches, and the median over repeats of what they are charged."""
    from torch.profiler import ProfilerActivity, profile

    from backend.compositions import again

    for _ in range(3):
        bench.backend.execute(again(step))
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        for _ in range(REPEATS):
            bench.backend.execute(again(step))
    found = [e for e in traced.profiler.kineto_results.events() if e.device_type().name == "CUDA"]
    events = sorted((e.start_ns() / 1e3, (e.start_ns() + e.duration_ns()) / 1e3, e.name()) for e in found)
    each = len(events) // REPEATS
    rows = []
    for repeat in range(REPEATS):
        mine = events[repeat * each : (repeat + 1) * each]
        table = pd.DataFrame(charged([(name, start, end) for start, end, name in mine]), columns=["kernel", "us"])
        rows.append(table.groupby("kernel", as_index=False).agg(launches=("us", "size"), us=("us", "sum")))
    return pd.concat(rows).groupby("kernel", as_index=False).median()


def kernels(bench: Bench) -> pd.DataFrame:
    """A row a kernel of decode steps (context 490) and steps of one prompt, with and without adapters."""
    cases = [
        (size, 0, adapters, bench.batch([1] * size, [490] * size, adapters))
        for size in DECODES
        for adapters in (0, 1, 32)
        if adapters <= size
    ]
    cases += [(1, tokens, n, bench.batch([tokens], [0], n)) for tokens in PROMPT_TOKENS for n in (0, 1)]
    tables = []
    for requests, tokens, adapters, step in cases:
        table = _traced(bench, step)
        tables.append(table.assign(B=requests, prompt_tokens=tokens, D=adapters))
    whole = pd.concat(tables)
    return whole[["B", "prompt_tokens", "D", "kernel", "launches", "us"]].sort_values(
        ["prompt_tokens", "B", "D", "us"], ascending=[True, True, True, False]
    )


def show_kernels(table: pd.DataFrame) -> None:
    """Print milliseconds of each part of a step, and what an adapter adds to it."""
    table = table.assign(part=table["kernel"].map(part_of))
    parts = table.pivot_table(
        index=["prompt_tokens", "B", "D"], columns="part", values="us", aggfunc="sum", fill_value=0
    )
    parts = parts / 1e3
    parts["all but the start"] = parts.drop(columns="start of the graph", errors="ignore").sum(axis=1)
    print("milliseconds of GPU time by part of the step:")
    print(parts.round(3).to_string())
    added = parts - parts.groupby(level=["prompt_tokens", "B"]).transform("first")
    print("what adapters add:")
    print(added[added.index.get_level_values("D") > 0].round(3).to_string())
