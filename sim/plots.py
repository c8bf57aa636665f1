"""Figures: of a run, and of a workload."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sim.metrics import latencies

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from sim.tables import RunTables
    from workloads.requests import RequestTable

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
"""Okabe and Ito's palette: told apart by colour-blind readers."""


def run_figure(tables: RunTables, caption: str, file: Path) -> None:
    """Queue and batch, KV use and adapter loads over time, and the latency distribution; `caption` says of what."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    s = tables.steps
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    queue, memory, loads, ttft = axes.flat
    engines = [part for _, part in s.groupby("replica")] if "replica" in s else [s]
    for i, part in enumerate(engines):
        label = "" if i == 0 else "_"  # one entry of the legend for all engines
        queue.plot(part["start_s"], part["running"], color=BLUE, label=f"{label}running")
        queue.plot(part["start_s"], part["waiting"], color=ORANGE, linestyle="--", label=f"{label}waiting")
        blocks = (part["used_blocks"] + part["free_blocks"]).clip(lower=1)
        memory.plot(part["start_s"], 100 * part["used_blocks"] / blocks, color=GREEN)
    queue.set(
        xlabel="time (s)",
        ylabel="requests",
        title="Batch and queue" + (", a line per replica" if len(engines) > 1 else ""),
    )
    queue.legend(frameon=False)
    memory.set(xlabel="time (s)", ylabel="KV blocks used (%)", title="KV cache", ylim=(0, 100))
    loads.step(s["start_s"], s["activations"].cumsum(), color=BLUE, label="host → slot", where="post")
    loads.step(s["start_s"], s["stages"].cumsum(), color=ORANGE, linestyle="--", label="disk → host", where="post")
    loads.set(xlabel="time (s)", ylabel="loads so far", title="Adapter loads")
    loads.legend(frameon=False)
    values = np.sort(latencies(tables, censored=True)["ttft"])
    ttft.plot(np.maximum(values, 1e-3), np.arange(1, len(values) + 1) / max(1, len(values)), color=BLUE)
    ttft.set(xlabel="TTFT (ms)", ylabel="share of requests", title="Time to first token (censored)", xscale="log")
    for axis in axes.flat:
        axis.grid(visible=True, alpha=0.3)
    figure.suptitle(caption, fontsize=9)
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """As PNG or SVG by the file's name."""
    from matplotlib import pyplot as plt

    figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def tenant_figure(tenants: pd.DataFrame, caption: str, file: Path) -> None:
    """TTFT of the adapters that wait longest, and each adapter's longest wait against its share of the tokens."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    worst = tenants.head(25)[::-1]
    figure, (bars, cloud) = plt.subplots(1, 2, figsize=(11, 5.5), constrained_layout=True)
    rows = np.arange(len(worst))
    bars.barh(rows, worst["p99_ttft_ms"], color=ORANGE, label="P99", hatch="//", edgecolor="white")
    bars.barh(rows, worst["p50_ttft_ms"], color=BLUE, label="P50")
    bars.set_yticks(rows, [str(name)[:24] for name in worst["name"]], fontsize=7)
    bars.set(xlabel="TTFT (ms)", title="The longest waiting adapters")
    bars.legend(frameon=False)
    for starves, marker, colour, label in ((False, "o", BLUE, "served"), (True, "X", ORANGE, "starves")):
        some = tenants[tenants["starves"] == starves]
        if len(some):
            share = 100 * some["token_share"].clip(lower=1e-6)
            cloud.scatter(share, some["longest_wait_s"].clip(lower=1e-4), marker=marker, color=colour, label=label)
    cloud.set(
        xlabel="share of all tokens (%)", ylabel="longest wait (s)", title="Wait and size", xscale="log", yscale="log"
    )
    cloud.legend(frameon=False)
    for axis in (bars, cloud):
        axis.grid(visible=True, alpha=0.3)
    figure.suptitle(caption, fontsize=9)
    save(figure, file)


def workload_figure(requests: RequestTable, caption: str, file: Path) -> None:
    """Rate over time, gaps, popularity by rank, LRU hit curves in order and shuffled, and the lengths."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from workloads.describe import hit_curves
    from workloads.requests import BASE

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    rate, skew, reuse, tokens = axes.flat
    times, adapter = requests.arrival_s, requests.adapter[requests.adapter != BASE]
    edges = np.linspace(0, max(float(times[-1]), 1e-9), 121)
    rate.step(edges[:-1], np.histogram(times, edges)[0] / np.diff(edges), color=BLUE, where="post")
    rate.set(xlabel="time (s)", ylabel="requests / s", title="Arrivals", ylim=(0, None))
    if len(adapter):
        counts = np.sort(np.bincount(adapter))[::-1]
        counts = counts[counts > 0]
        skew.plot(np.arange(1, len(counts) + 1), counts / counts.sum(), color=BLUE)
        slots = np.unique(np.geomspace(1, max(2, len(counts)), 40).astype(int))
        for curve, style, label in zip(hit_curves(adapter, slots), ("-", "--"), ("in order", "shuffled"), strict=True):
            reuse.plot(slots, 100 * curve, color=BLUE if style == "-" else ORANGE, linestyle=style, label=label)
        reuse.legend(frameon=False)
    skew.set(xlabel="rank of the adapter", ylabel="share of requests", title="Popularity")
    reuse.set(xlabel="LRU slots", ylabel="hits (%)", title="Adapter reuse", ylim=(0, 100))
    if len(adapter):
        skew.set(xscale="log", yscale="log")
        reuse.set(xscale="log")
    for name, column, colour in (("prompt", requests.prompt_tokens, BLUE), ("output", requests.output_tokens, ORANGE)):
        tokens.plot(np.sort(column), np.linspace(0, 1, len(column)), color=colour, label=name)
    tokens.set(xlabel="tokens", ylabel="share of requests", title="Lengths", xscale="log")
    tokens.legend(frameon=False)
    for axis in axes.flat:
        axis.grid(visible=True, alpha=0.3)
    figure.suptitle(caption, fontsize=9)
    save(figure, file)
