"""The figure of `multilora copies`: cost against the number of fine-tunes, for each arm and rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sim.panels import BLUE, GREEN, ORANGE, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = {
    "deltas": ("base + N deltas", BLUE, "-", "o"),
    "dedicated": ("N copies, GPUs of their own", ORANGE, "--", "s"),
    "time_shared": ("N copies that share GPUs", GREEN, "-.", "^"),
}
MOST_PANELS = 4


def copies_panels(data: Mapping[str, Any]) -> list[Panel]:
    """A panel a rate (the first four) from what `copies.json` holds."""
    panels = []
    for factor in sorted({c["factor"] for c in data["cells"]})[:MOST_PANELS]:
        row = sorted((c for c in data["cells"] if c["factor"] == factor), key=lambda c: c["tenants"])
        panels.append(Panel(f"{row[0]['rate_rps']:.3g} req/s in all", partial(_draw, row, data["unit"])))
    return panels


def _draw(row: Sequence[Mapping[str, Any]], unit: str, axis: Axes) -> None:
    for arm, (label, colour, line, marker) in STYLES.items():
        there = [(c["tenants"], c["arms"][arm]["cost"]) for c in row if c["arms"][arm] is not None]
        if there:
            axis.plot(*zip(*there, strict=True), line, marker=marker, color=colour, label=label)
    axis.set(xlabel="fine-tunes", ylabel=unit, xscale="log", yscale="log")
    ticks = [c["tenants"] for c in row]
    axis.set_xticks(ticks, [str(n) for n in ticks], fontsize=7)
    axis.xaxis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.legend(fontsize=8)
