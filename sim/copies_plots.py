"""The figure of `multilora copies`: cost against the number of fine-tunes, for each arm and rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sim.plots import BLUE, GREEN, ORANGE, save

STYLES = {
    "deltas": ("base + N deltas", BLUE, "-", "o"),
    "dedicated": ("N copies, GPUs of their own", ORANGE, "--", "s"),
    "time_shared": ("N copies that take turns", GREEN, "-.", "^"),
}
MOST_PANELS = 4


def copies_figure(data: Mapping[str, Any], file: Path) -> None:
    """A panel a rate (the first four) from what `copies.json` holds; PNG or SVG by the file's name."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    factors = sorted({c["factor"] for c in data["cells"]})[:MOST_PANELS]
    figure, axes = plt.subplots(
        1,
        len(factors),
        figsize=(max(6.0, 4.6 * len(factors)), 4.4),
        constrained_layout=True,
        squeeze=False,
        sharey=True,
    )
    for axis, factor in zip(axes.flat, factors, strict=True):
        row = sorted((c for c in data["cells"] if c["factor"] == factor), key=lambda c: c["tenants"])
        for arm, (label, colour, line, marker) in STYLES.items():
            there = [(c["tenants"], c["arms"][arm]["cost"]) for c in row if c["arms"][arm] is not None]
            if there:
                axis.plot(*zip(*there, strict=True), line, marker=marker, color=colour, label=label)
        axis.set(xlabel="fine-tunes", title=f"{row[0]['rate_rps']:.3g} req/s in all", xscale="log", yscale="log")
        ticks = [c["tenants"] for c in row]
        axis.set_xticks(ticks, [str(n) for n in ticks], fontsize=7)
        axis.minorticks_off()
        axis.grid(visible=True, alpha=0.3)
    axes[0, 0].set_ylabel(data["unit"])
    axes[0, 0].legend(frameon=False)
    figure.suptitle(f"least cost that keeps {data['promise']}", fontsize=9)
    save(figure, file)
