"""The figures of a sweep: lines over one setting, heat maps over two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from sim.plots import BLUE, GREEN, ORANGE
from sim.verdict import THROUGHPUT, TPOT, TTFT, swept_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

FloatArray = npt.NDArray[np.float64]

MEASURES = {
    THROUGHPUT: "output tokens / s",
    TTFT: "P99 TTFT (ms)",
    TPOT: "P99 TPOT (ms)",
    "num_gpu_blocks": "KV blocks",
    "adapter_hit_rate": "adapter hit rate",
}
STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))
MOST_NUMBERS = 80
"""Cells of a heat map up to which each has its number."""

COLOURS = (BLUE, ORANGE, GREEN, "#000000", "#CC79A7", "#56B4E9")


def sweep_caption(results: pd.DataFrame, name: str) -> str:
    """Of what the figures are: scenario, backend, the profile's error, seeds."""
    served = results[results["status"] == "ok"].iloc[0]
    error = f", profile MAPE {served['profile_mape']:.1%} on held-out steps" if "profile_mape" in results else ""
    return (
        f"{name}, {served['backend']}{error}, seed {', '.join(str(seed) for seed in sorted(results['seed'].unique()))}"
    )


def sweep_figures(results: pd.DataFrame, keys: Sequence[str], caption: str, folder: Path) -> list[Path]:
    """Lines over the swept key for each value of the second, and heat maps if both are numbers. PNG and SVG files."""
    key = swept_key(keys, results)
    if key is None:
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    served = results[results["status"] == "ok"]
    others = [other for other in keys if other != key and len(results[other].unique()) > 1]
    files = _save(_lines(served, key, others[:1], caption), folder / "lines")
    if others and pd.api.types.is_numeric_dtype(results[others[0]]):
        files += _save(_heat_maps(served, key, others[0], caption), folder / "heat_maps")
    return files


def _save(figure: object, stem: Path) -> list[Path]:
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    for file in files:
        figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    return files


def _lines(served: pd.DataFrame, key: str, others: list[str], caption: str) -> object:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    groups = list(served.groupby(others[0], sort=False)) if others else [(None, served)]
    for axis, (measure, label) in zip(axes.flat, MEASURES.items(), strict=False):
        for i, (value, group) in enumerate(groups):
            line, marker = STYLES[i % len(STYLES)]
            by_key = group.groupby(key)[measure]
            mean = by_key.mean()
            axis.plot(mean.index, mean, line, marker=marker, color=COLOURS[i % len(COLOURS)], label=str(value))
            axis.fill_between(mean.index, by_key.min(), by_key.max(), color=COLOURS[i % len(COLOURS)], alpha=0.15)
        axis.set(xlabel=key, ylabel=label)
        _scale(axis, served, key, measure)
        axis.grid(visible=True, alpha=0.3)
    legend = axes.flat[-1]
    legend.axis("off")
    if others:
        handles, labels = axes.flat[0].get_legend_handles_labels()
        legend.legend(handles, labels, title=others[0], frameon=False, loc="center")
    figure.suptitle(caption, fontsize=9)
    return figure


def _scale(axis: object, served: pd.DataFrame, key: str, measure: str) -> None:
    """Logarithmic where values span a decade, or settings a factor of four."""
    values, keys = served[measure].dropna(), served[key]
    if keys.min() > 0 and keys.max() >= 4 * keys.min():
        axis.set_xscale("log", base=2)  # type: ignore[attr-defined]
        axis.set_xticks(sorted(keys.unique()), [f"{v:g}" for v in sorted(keys.unique())], fontsize=7)  # type: ignore[attr-defined]
    if len(values) and values.min() > 0 and values.max() >= 10 * values.min():
        axis.set_yscale("log")  # type: ignore[attr-defined]


def _heat_maps(served: pd.DataFrame, key: str, other: str, caption: str) -> object:
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm, Normalize

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    for axis, (measure, label) in zip(axes.flat, MEASURES.items(), strict=False):
        table = served.pivot_table(index=other, columns=key, values=measure).sort_index()
        low, high = np.nanmin(table.to_numpy()), np.nanmax(table.to_numpy())
        norm = LogNorm(low, high) if low > 0 and high >= 10 * low else Normalize(low, high)
        image = axis.imshow(table, origin="lower", aspect="auto", cmap="cividis", norm=norm)
        _numbers(axis, table.to_numpy(float), norm)
        axis.set_xticks(range(len(table.columns)), [f"{v:g}" for v in table.columns])
        axis.set_yticks(range(len(table.index)), [f"{v:g}" for v in table.index])
        axis.set(xlabel=key, ylabel=other, title=label)
        figure.colorbar(image, ax=axis)
    axes.flat[-1].axis("off")
    figure.suptitle(caption, fontsize=9)
    return figure


def _numbers(axis: Axes, values: FloatArray, norm: Normalize) -> None:
    """Each cell's value, dark on light and light on dark."""
    if values.size > MOST_NUMBERS:
        return
    light = np.ma.filled(np.ma.asarray(norm(values)), 0.0) > 0.55
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            text = f"{value:.3g}" if abs(value) < 1000 else f"{value / 1000:.3g}k"
            shade = "black" if light[row, column] else "white"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=shade)
