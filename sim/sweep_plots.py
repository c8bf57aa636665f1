"""The figures of a sweep: lines over one setting, heat maps over two."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from sim.panels import BLUE, GREEN, ORANGE, Panel, sheet
from sim.verdict import THROUGHPUT, TPOT, TTFT, swept_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

FloatArray = npt.NDArray[np.float64]

LOADS = "loads_per_request"
MEASURES = {
    THROUGHPUT: "output tokens / s",
    TTFT: "P99 TTFT (ms)",
    TPOT: "P99 TPOT (ms)",
    "num_gpu_blocks": "KV blocks",
    "adapter_hit_rate": "adapter hit rate",
    LOADS: "host → slot loads a request",
}
STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))
MOST_NUMBERS = 80
"""Cells of a heat map up to which each has its number."""

COLOURS = (BLUE, ORANGE, GREEN, "#000000", "#CC79A7", "#56B4E9")


def sweep_caption(results: pd.DataFrame, name: str, keys: Sequence[str] = ()) -> str:
    """Of what the figures are: scenario, the settings that all runs share, backend, the profile's error, seeds."""
    shared = [f"{key} = {results[key].iloc[0]}" for key in keys if len(results[key].unique()) == 1]
    served = results[results["status"] == "ok"].iloc[0]
    error = f" (MAPE {served['profile_mape']:.1%} on held-out steps)" if "profile_mape" in results else ""
    outside = float(results["extrapolated_share"].max()) if "extrapolated_share" in results else 0.0
    error += f", up to {outside:.1%} of the steps outside what it measured" if error and outside >= 0.0005 else ""
    seeds = sorted(results["seed"].unique())
    shown = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}: mean and range"
    return ", ".join([name, *shared, f"{served['backend']}{error}", shown])


def sweep_panels(results: pd.DataFrame, keys: Sequence[str]) -> dict[str, list[Panel]]:
    """`lines` over the swept key for each value of the second, and `heat_maps` if both are numbers; of measures that some run has."""
    key = swept_key(keys, results) or next((k for k in keys if len(results[k].unique()) > 1), keys[0])
    results = results.assign(**{LOADS: results["adapter_activations"] / results["requests"].clip(lower=1)})
    others = [other for other in keys if other != key and len(results[other].unique()) > 1]
    there = {measure: label for measure, label in MEASURES.items() if results[measure].notna().any()}
    panels = {"lines": [Panel(label, partial(_lines, results, key, others[:1], m)) for m, label in there.items()]}
    numbers = all(pd.api.types.is_numeric_dtype(results[k]) for k in (key, *others[:1]))
    if others and numbers:
        panels["heat_maps"] = [
            Panel(label, partial(_heat_map, results, key, others[0], m), grid=False) for m, label in there.items()
        ]
    return panels


def sweep_figures(results: pd.DataFrame, keys: Sequence[str], caption: str, folder: Path) -> list[Path]:
    """Write `sweep_panels` as PNG and SVG into `folder`."""
    files = []
    for name, panels in sweep_panels(results, keys).items():
        made = [folder / f"{name}.png", folder / f"{name}.svg"]
        sheet(panels, caption, made, columns=3)
        files += made
    return files


def _lines(results: pd.DataFrame, key: str, others: list[str], measure: str, axis: Axes) -> None:
    values = list(results[key].unique())
    numeric = pd.api.types.is_numeric_dtype(results[key])
    for i, (value, group) in enumerate(results.groupby(others[0], sort=False) if others else [(None, results)]):
        line, marker = STYLES[i % len(STYLES)]
        colour = COLOURS[i % len(COLOURS)]
        by_key = group.groupby(key, sort=numeric)[measure]
        # What is no number has no order: points beside each other, and no line between them.
        x = by_key.mean().index if numeric else [values.index(v) for v in by_key.mean().index]
        axis.plot(x, by_key.mean(), line if numeric else "", marker=marker, label=str(value), color=colour)
        axis.fill_between(x, by_key.min(), by_key.max(), color=colour, alpha=0.15 if numeric else 0.0)
    axis.set(xlabel=_label(key, results), ylabel=MEASURES[measure])
    if not numeric:
        axis.set_xticks(range(len(values)), [str(v) for v in values])
        axis.margins(x=0.3)
    _scale(axis, results, key, measure)
    if others:
        axis.legend(title=others[0], fontsize=7, title_fontsize=7)


def _label(key: str, results: pd.DataFrame) -> str:
    return f"{key} (×: refused)" if (results["status"] != "ok").any() else key


def _scale(axis: Axes, results: pd.DataFrame, key: str, measure: str) -> None:
    """Logarithmic where values span a decade, or settings a factor of four; settings that were refused are marked."""
    keys = results[key]
    if pd.api.types.is_numeric_dtype(keys):
        if keys.min() > 0 and keys.max() >= 4 * keys.min():
            axis.set_xscale("log", base=2)
        refused = set(keys) - set(keys[results["status"] == "ok"])
        ticks = sorted(keys.unique())
        axis.set_xticks(ticks, [f"{v:g}\n×" if v in refused else f"{v:g}" for v in ticks], fontsize=7)
        axis.minorticks_off()
    if _wide(results[measure].to_numpy(float), measure):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def _wide(values: FloatArray, measure: str) -> bool:
    """Whether values are for a logarithmic scale: they span a decade."""
    low, high = np.nanmin(values), np.nanmax(values)
    return measure != LOADS and bool(low > 0 and high >= 10 * low)


def _heat_map(results: pd.DataFrame, key: str, other: str, measure: str, axis: Axes) -> None:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import NullFormatter

    table = results.pivot_table(index=other, columns=key, values=measure, dropna=False).sort_index()
    low, high = np.nanmin(table.to_numpy()), np.nanmax(table.to_numpy())
    norm = LogNorm(low, high) if _wide(table.to_numpy(float), measure) else Normalize(low, high)
    image = axis.imshow(np.ma.masked_invalid(table), origin="lower", aspect="auto", cmap="cividis", norm=norm)
    _numbers(axis, table.to_numpy(float), norm)
    axis.set_xticks(range(len(table.columns)), [f"{v:g}" for v in table.columns])
    axis.set_yticks(range(len(table.index)), [f"{v:g}" for v in table.index])
    axis.set(xlabel=_label(key, results), ylabel=other)
    bar = axis.figure.colorbar(image, ax=axis, format=lambda value, _: f"{value:g}")
    bar.minorformatter = NullFormatter()


def _numbers(axis: Axes, values: FloatArray, norm: Normalize) -> None:
    """Each cell's value, dark on light and light on dark; a cross where nothing was served."""
    if values.size > MOST_NUMBERS:
        return
    light = np.ma.filled(np.ma.asarray(norm(values)), 0.0) > 0.55
    for (row, column), value in np.ndenumerate(values):
        text = "×" if np.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value / 1000:.3g}k"
        shade = "black" if light[row, column] or np.isnan(value) else "white"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=shade)
