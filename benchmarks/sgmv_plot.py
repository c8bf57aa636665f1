"""Time over byte floor: four linears of a layer, rank by rank, against rows; the best peer beside it where given."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

MIXES = {"distinct": ("o", "-"), "uniform": ("s", "--"), "identical": ("^", ":"), "seg4": ("D", "-.")}
KEYS = ["layer", "T", "distribution", "n_adapters", "rank"]


def _layer_sums(table: pd.DataFrame) -> pd.DataFrame:
    return table.groupby(["rank", "distribution", "T"], as_index=False)[["median_us", "floor_us"]].sum()


def draw(ours: pd.DataFrame, peers: Path | None, out: Path) -> None:
    """Write the figure to `out`: one panel a rank."""
    best = None
    if peers is not None:
        table = pd.read_csv(peers / "kernels.csv")
        table = table[table["impl"] != "base_gemm"]
        best = _layer_sums(
            table.groupby(KEYS, as_index=False).agg(median_us=("median_us", "min"), floor_us=("floor_us", "first"))
        )
    sums = _layer_sums(ours)
    ranks = sorted(sums["rank"].unique())
    figure, axes = plt.subplots(1, len(ranks), figsize=(4.2 * len(ranks), 4.2), sharey=True, layout="constrained")
    for axis, rank in zip(axes, ranks, strict=True):
        for mix, (marker, line) in MIXES.items():
            for data, colour, name in ((sums, "#0072b2", "multilora-sim"), (best, "#d55e00", "best peer")):
                if data is None:
                    continue
                part = data[(data["rank"] == rank) & (data["distribution"] == mix)].sort_values("T")
                axis.plot(part["T"], part["median_us"] / part["floor_us"], marker=marker, ls=line, color=colour,
                          ms=4, label=f"{name}, {mix}")  # fmt: skip
        axis.axhline(1.0, color="0.4", lw=0.8)
        axis.set(xscale="log", yscale="log", xlabel="rows (tokens)", title=f"rank {rank}")
    axes[0].set_ylabel("time / byte floor")
    axes[0].legend(fontsize=6.5, frameon=False)
    figure.suptitle("LoRA part of one Llama-3.1-8B layer (four fused linears), H100, lower is better", fontsize=10)
    figure.savefig(out, dpi=150)
    plt.close(figure)
