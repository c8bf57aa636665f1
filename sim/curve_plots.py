"""The figures of a cost curve: step time with its parts and measured points, and the price of N adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sim.curve import FloatArray, shape
from sim.plots import BLUE, GREEN, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = (("base_ms", "base model", "#bbbbbb", ""), ("attention_ms", "attention", GREEN, "//"),
         ("lora_ms", "LoRA", ORANGE, ".."), ("host_ms", "host", "#56B4E9", "\\\\"))  # fmt: skip
MOST_PANELS = 6


def curve_figure(
    table: pd.DataFrame, points: Mapping[tuple[str, int, int], pd.DataFrame], caption: str, file: Path
) -> None:
    """A panel of step time and one of GPU seconds per million tokens for each profile, batch and rank (the first six).

    `points`: measured ones by (profile, batch, rank). PNG or SVG by the file's name.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups = list(table.groupby(["profile", "batch", "rank"], sort=False))[:MOST_PANELS]
    figure, axes = plt.subplots(2, len(groups), figsize=(4.5 * len(groups), 8), constrained_layout=True, squeeze=False)
    for column, (_, group) in enumerate(groups):
        profile, batch, rank = str(group["profile"].iloc[0]), int(group["batch"].iloc[0]), int(group["rank"].iloc[0])
        _step_panel(axes[0, column], group, points.get((profile, batch, rank)))
        axes[0, column].set_title(f"{profile}\n{batch} requests, rank {rank}", fontsize=9)
        _price_panel(axes[1, column], group)
    figure.suptitle(caption, fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _step_panel(axis: Axes, group: pd.DataFrame, points: pd.DataFrame | None) -> None:
    x = group["adapters"].to_numpy(float)
    bottom = np.zeros(len(x))
    for name, label, colour, hatch in PARTS:
        top = bottom + group[name].to_numpy()
        axis.fill_between(
            x, bottom, top, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label, alpha=0.8
        )
        bottom = top
    axis.plot(x, group["step_ms"], color=BLUE, label="step")
    if group["padded_step_ms"].notna().any():
        axis.plot(x, group["padded_step_ms"], color=BLUE, linestyle=":", label="padded to max_lora_rank")
    if group["floor_ms"].notna().any():
        axis.plot(x, group["floor_ms"], color="black", linestyle="--", label="byte floor")
    if points is not None and len(points):
        axis.plot(points["adapters"], points["step_ms"], "o", color="black", markersize=4, label="measured")
    if len(x) >= 3:
        s = shape(x, group["step_ms"].to_numpy())
        text = (
            f"step {s.step_ms:.2f} ms, flat to {s.knee:g},\nthen {1e3 * s.slope_ms:.0f} µs an adapter (±{s.error:.1%})"
        )
        axis.text(0.02, 0.98, text, transform=axis.transAxes, va="top", fontsize=7)
    axis.set(xlabel="distinct adapters in the batch", ylabel="decode step (ms)", ylim=(0, None))
    _powers(axis, x)
    axis.legend(fontsize=6, framealpha=0.9, loc="lower right")
    axis.grid(visible=True, alpha=0.3)


def _price_panel(axis: Axes, group: pd.DataFrame) -> None:
    x = group["adapters"].to_numpy(float)
    usd = group["usd_per_mtok"].notna().any()
    own, copies = ("usd_per_mtok", "copies_usd_per_mtok") if usd else ("gpu_s_per_mtok", "copies_gpu_s_per_mtok")
    axis.plot(x, group[own], color=BLUE, marker="o", label="base + N deltas on one GPU")
    axis.plot(x, group[copies], color=ORANGE, marker="s", linestyle="--", label="N full copies, a GPU each")
    axis.set(
        xlabel="distinct adapters", ylabel=f"{'USD' if usd else 'GPU seconds'} per million output tokens", yscale="log"
    )
    _powers(axis, x)
    axis.legend(fontsize=7, frameon=False)
    axis.grid(visible=True, alpha=0.3)


def _powers(axis: Axes, x: FloatArray) -> None:
    """Zero, and powers of two beside it."""
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_xticks(x, [f"{v:g}" for v in x], fontsize=7)
    axis.set_xlim(-0.3, 1.15 * max(1.0, x[-1]))
