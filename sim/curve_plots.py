"""The figures of a cost curve: step time with its parts and measured points, and the price of N adapters."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sim.curve import FloatArray, described
from sim.panels import BLUE, GREEN, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = (
    ("base_ms", "base model, read once", "#cccccc", ""),
    ("attention_ms", "attention", GREEN, "//"),
    ("lora_ms", "LoRA", ORANGE, ".."),
    ("shrink_ms", "LoRA shrink", ORANGE, ".."),
    ("expand_ms", "LoRA expand", "#F0E442", "oo"),
    ("host_ms", "host", "#004B75", "\\\\"),
)
LINES = (
    ("padded_step_ms", "padded to max_lora_rank", BLUE, ":"),
    ("floor_ms", "byte floor", "black", "--"),
    ("loop_step_ms", "loop, a matmul pair per adapter", "#CC79A7", (0, (5, 1, 1, 1, 1, 1))),
    ("copies_ms", "N full copies, one after the other", "#D55E00", "-."),
)
PRICES = (
    ("", "base + N deltas on one GPU", BLUE, "-", "o"),
    ("copies_", "N full copies, a GPU each", ORANGE, "--", "s"),
    ("loop_", "base + loop over adapters", "#CC79A7", "-.", "^"),
)
MOST_PANELS = 6


def curve_figure(
    table: pd.DataFrame, points: Mapping[tuple[str, int, int], pd.DataFrame], caption: str, file: Path
) -> None:
    """A panel of step time and one of GPU seconds per million tokens for each profile, batch and rank (the first six).

    `points`: measured ones by (profile, batch, rank). What a row of `table` does not have is not drawn. PNG or SVG by the
    file's name.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    every = list(table.groupby(["profile", "batch", "rank"], sort=False))
    groups = every[:MOST_PANELS]
    caption += f"; {len(every) - MOST_PANELS} more curves in curve.parquet" if len(every) > MOST_PANELS else ""
    figure, axes = plt.subplots(
        2, len(groups), figsize=(4.8 * len(groups), 8.5), constrained_layout=True, squeeze=False, sharey="row"
    )
    # What costs many times the step leaves the frame: on its scale nothing else could be read.
    top = 1.4 * float(table["step_ms"].max())
    for column, (_, group) in enumerate(groups):
        profile, batch, rank = str(group["profile"].iloc[0]), int(group["batch"].iloc[0]), int(group["rank"].iloc[0])
        measured = points.get((profile, batch, rank))
        _step_panel(axes[0, column], group, measured, top)
        said = described(group, measured).replace(" (fit", "\n(fit")
        axes[0, column].set_title(f"{profile}\n{batch} requests, rank {rank}\n{said}", fontsize=9)
        _price_panel(axes[1, column], group)
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 + len(groups), fontsize=8)
    figure.suptitle(textwrap.fill(caption, 60 * len(groups)), fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _there(group: pd.DataFrame, column: str) -> bool:
    return column in group and bool(group[column].notna().any())


def _step_panel(axis: Axes, group: pd.DataFrame, points: pd.DataFrame | None, top: float) -> None:
    x = group["adapters"].to_numpy(float)
    bottom = np.zeros(len(x))
    for name, label, colour, hatch in PARTS:
        if _there(group, name):
            above = bottom + group[name].to_numpy()
            axis.fill_between(
                x, bottom, above, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label, alpha=0.8
            )
            bottom = above
    axis.plot(x, group["step_ms"], color=BLUE, label="step", linewidth=2)
    for name, label, colour, style in LINES:
        if _there(group, name):
            axis.plot(x, group[name], color=colour, linestyle=style, label=label)
    outside = group.loc[group["extrapolated"].astype(bool), "adapters"]
    if len(outside):
        axis.axvspan(float(outside.min()), 2 * x[-1], color="black", alpha=0.07, label="outside what was measured")
    if points is not None and len(points):
        axis.plot(points["adapters"], points["step_ms"], "o", color="black", markersize=4, label="measured")
    axis.set(xlabel="distinct adapters in the batch", ylabel="decode step (ms)", ylim=(0, top))
    _powers(axis, x)
    axis.grid(visible=True, alpha=0.3)


def _price_panel(axis: Axes, group: pd.DataFrame) -> None:
    x = group["adapters"].to_numpy(float)
    usd = _there(group, "usd_per_mtok")
    for prefix, label, colour, style, marker in PRICES:
        column = f"{prefix}{'usd' if usd else 'gpu_s'}_per_mtok"
        if _there(group, column):
            axis.plot(x, group[column], color=colour, marker=marker, linestyle=style, markersize=4, label=label)
    axis.set(
        xlabel="distinct adapters in the batch",
        ylabel=f"{'USD' if usd else 'GPU seconds'} per million output tokens",
        yscale="log",
    )
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.tick_params(axis="y", which="both", labelsize=8)
    _powers(axis, x)
    axis.legend(fontsize=8, frameon=False)
    axis.grid(visible=True, alpha=0.3)


def _powers(axis: Axes, x: FloatArray) -> None:
    """Zero, and powers of two beside it."""
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_xticks(x, [f"{v:g}" for v in x], fontsize=7)
    axis.set_xlim(-0.3, 1.15 * max(1.0, x[-1]))
