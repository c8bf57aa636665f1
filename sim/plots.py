"""Figures: of a run, of its tenants, and of a workload."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sim.metrics import latencies
from sim.panels import BLUE, GREEN, ORANGE, Panel, sheet

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from sim.tables import RunTables
    from workloads.requests import RequestTable

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
SPANS = 300
"""Points of a line over a run: each is the peak of as long a span of time."""

WORST_TENANTS = 25


def run_figure(tables: RunTables, caption: str, *files: Path) -> None:
    """Queue and batch, KV use and adapter loads over time, and the latency distribution; `caption` says of what."""
    sheet(run_panels(tables), caption, files, fixed=True)


def tenant_figure(tenants: pd.DataFrame, caption: str, *files: Path) -> None:
    """TTFT of the adapters that wait longest, and each adapter's longest wait against its share of the cost."""
    sheet(tenant_panels(tenants), caption, files)


def run_panels(tables: RunTables) -> list[Panel]:
    """The panels of a run: batch and queue, KV cache, adapter loads, TTFT; the last alone where no step rows were kept."""
    ttft = Panel("Time to first token, all requests", partial(_ttft, tables))
    if tables.steps.empty:
        return [ttft]
    several = ", a line per replica" if tables.replicas is not None else ""
    return [
        Panel(f"Batch and queue (peaks){several}", partial(_queue, tables)),
        Panel(f"KV cache in use (peaks){several}", partial(_memory, tables)),
        Panel("Adapter loads", partial(_loads, tables)),
        ttft,
    ]


def tenant_panels(tenants: pd.DataFrame) -> list[Panel]:
    """The panels of the tenants: the longest waiting ones, and, where the cost is known, wait against cost."""
    worst = Panel(
        f"TTFT of the {min(len(tenants), WORST_TENANTS)} slowest adapters", partial(_worst, tenants), tall=1.4
    )
    cloud = Panel("Longest wait against share of cost", partial(_cloud, tenants), tall=1.4)
    return [worst, cloud] if tenants["cost_share"].notna().any() else [worst]


def _engines(steps: pd.DataFrame) -> list[pd.DataFrame]:
    return [part for _, part in steps.groupby("replica")] if "replica" in steps else [steps]


def _peaks(steps: pd.DataFrame, values: pd.Series[float]) -> tuple[FloatArray, FloatArray]:
    """The highest value in each of `SPANS` spans of time, at the span's beginning; 0 where the engine was idle."""
    edges = np.linspace(steps["start_s"].min(), steps["end_s"].max(), SPANS + 1)
    span = np.clip(np.searchsorted(edges, steps["start_s"], side="right") - 1, 0, SPANS - 1)
    highest = values.groupby(span).max().reindex(range(SPANS))
    ended = steps["end_s"].groupby(span).max().reindex(range(SPANS)).ffill().to_numpy()
    idle = highest.isna().to_numpy() & (ended <= edges[:-1])
    return edges[:-1], np.where(idle, 0.0, highest.ffill().to_numpy())


def _queue(tables: RunTables, axis: Axes) -> None:
    for i, part in enumerate(_engines(tables.steps)):
        label = "" if i == 0 else "_"  # one entry of the legend for all engines
        axis.plot(*_peaks(part, part["running"]), color=BLUE, label=f"{label}running")
        axis.plot(*_peaks(part, part["waiting"]), color=ORANGE, linestyle="--", label=f"{label}waiting")
    axis.set(xlabel="time (s)", ylabel="requests", ylim=(0, None))
    axis.legend(loc="upper left", fontsize=8)


def _memory(tables: RunTables, axis: Axes) -> None:
    for part in _engines(tables.steps):
        blocks = (part["used_blocks"] + part["free_blocks"]).clip(lower=1)
        axis.plot(*_peaks(part, 100 * part["used_blocks"] / blocks), color=GREEN)
    axis.set(xlabel="time (s)", ylabel="KV blocks used (%)", ylim=(0, 100))


def _loads(tables: RunTables, axis: Axes) -> None:
    s = tables.steps
    for column, colour, style, label in (
        ("activations", BLUE, "-", "host → slot"), ("stages", ORANGE, "--", "disk → host"),
    ):  # fmt: skip
        axis.step(s["start_s"], s[column].cumsum(), color=colour, linestyle=style, label=label, where="post")
    axis.set(xlabel="time (s)", ylabel="loads so far", ylim=(0, None))
    axis.legend(loc="upper left", fontsize=8)


def _ttft(tables: RunTables, axis: Axes) -> None:
    values = np.sort(latencies(tables, censored=True)["ttft"])
    shares = 100 * np.arange(1, len(values) + 1) / max(1, len(values))
    axis.plot(np.maximum(values, 1e-3), shares, color=BLUE)
    axis.set(xlabel="TTFT (ms)", ylabel="requests that fast (%)", xscale="log", ylim=(0, 101))


def _worst(tenants: pd.DataFrame, axis: Axes) -> None:
    worst = tenants.head(WORST_TENANTS)[::-1]
    rows = np.arange(len(worst))
    axis.barh(rows, worst["p99_ttft_ms"], color=ORANGE, label="P99", hatch="//", edgecolor="white")
    axis.barh(rows, worst["p50_ttft_ms"], color=BLUE, label="P50")
    names = [f"{str(n)[:24]}{' (starves)' if s else ''}" for n, s in zip(worst["name"], worst["starves"], strict=True)]
    axis.set_yticks(rows, names, fontsize=7)
    axis.set(xlabel="TTFT (ms)")
    axis.legend(loc="lower right", fontsize=8)


def _cloud(tenants: pd.DataFrame, axis: Axes) -> None:
    for starves, marker, colour, label in ((False, "o", BLUE, "served"), (True, "X", ORANGE, "starves")):
        some = tenants[tenants["starves"] == starves]
        if len(some):
            share = 100 * some["cost_share"].clip(lower=1e-6)
            wait = some["longest_wait_s"].clip(lower=1e-3)
            axis.scatter(share, wait, marker=marker, color=colour, label=label, edgecolor="black", linewidth=0.4)
    axis.set(xlabel="share of the engine's seconds (%)", ylabel="longest wait (s)", xscale="log", yscale="log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(lambda value, _: f"{value:g}")
        scale.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.legend(fontsize=8)


def workload_figure(requests: RequestTable, caption: str, file: Path) -> None:
    """Rate over time and the lengths; where adapters are named, popularity by rank, and LRU hits in order and shuffled."""
    from workloads.requests import BASE

    adapter = requests.adapter[requests.adapter != BASE]
    panels = [Panel("Arrivals", partial(_arrivals, requests)), Panel("Lengths", partial(_lengths, requests))]
    if len(adapter):
        panels += [Panel("Popularity", partial(_popularity, adapter)), Panel("Adapter reuse", partial(_reuse, adapter))]
    sheet(panels, caption, [file])


def _arrivals(requests: RequestTable, axis: Axes) -> None:
    times = requests.arrival_s
    edges = np.linspace(0, max(float(times[-1]), 1e-9), 121)
    axis.step(edges[:-1], np.histogram(times, edges)[0] / np.diff(edges), color=BLUE, where="post")
    axis.set(xlabel="time (s)", ylabel="requests / s", ylim=(0, None))


def _lengths(requests: RequestTable, axis: Axes) -> None:
    for name, column, colour, style in (
        ("prompt", requests.prompt_tokens, BLUE, "-"), ("output", requests.output_tokens, ORANGE, "--"),
    ):  # fmt: skip
        axis.plot(np.sort(column), np.linspace(0, 100, len(column)), color=colour, linestyle=style, label=name)
    axis.set(xlabel="tokens", ylabel="requests that short (%)", xscale="log", ylim=(0, 101))
    axis.legend(fontsize=8)


def _popularity(adapter: IntArray, axis: Axes) -> None:
    counts = np.sort(np.bincount(adapter))[::-1]
    counts = counts[counts > 0]
    axis.plot(np.arange(1, len(counts) + 1), 100 * counts / counts.sum(), color=BLUE)
    axis.set(xlabel="rank of the adapter", ylabel="requests (%)", xscale="log", yscale="log")


def _reuse(adapter: IntArray, axis: Axes) -> None:
    from workloads.describe import hit_curves

    slots = np.unique(np.geomspace(1, max(2, len(np.unique(adapter))), 40).astype(int))
    looks = (("in order", BLUE, "-"), ("shuffled", ORANGE, "--"))
    for curve, (label, colour, style) in zip(hit_curves(adapter, slots), looks, strict=True):
        axis.plot(slots, 100 * curve, color=colour, linestyle=style, label=label)
    axis.set(xlabel="LRU slots", ylabel="hits (%)", ylim=(0, 100), xscale="log")
    axis.legend(fontsize=8)
