"""The figure of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sim.metrics import latencies

if TYPE_CHECKING:
    from sim.tables import RunTables

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
    queue.plot(s["start_s"], s["running"], color=BLUE, label="running")
    queue.plot(s["start_s"], s["waiting"], color=ORANGE, linestyle="--", label="waiting")
    queue.set(xlabel="time (s)", ylabel="requests", title="Batch and queue")
    queue.legend(frameon=False)
    memory.plot(s["start_s"], 100 * s["used_blocks"] / (s["used_blocks"] + s["free_blocks"]).clip(lower=1), color=GREEN)
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
    figure.savefig(file, dpi=120)
    plt.close(figure)
