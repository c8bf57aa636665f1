"""`python -m benchmarks.heat [--profile NAME] [--figure FILE.png]`: what the steps before did to a step, from a profile's repeats.

A profile of `multilora measure` keeps its steps in the order in which they were executed (`rounds.parquet`). Prints, for each kind of
steps and by the heat that they began with (`backend.heat`), by how much steps take longer than on a rested GPU, as all their repeats say, and
how far repeats of one step lie apart as they were and with heat taken from them; `--figure` draws the first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from backend.errors import BackendError
from backend.fitting import features_of
from backend.heat_fit import HeatFit, levels
from backend.profile import load_profile, measured_rounds, measured_steps

EDGES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Of the groups that steps are put into by heat: shares of all steps of a kind."""


def repeats(name: str) -> pd.DataFrame:
    """A row a step: its `regime`, the `level` of heat it began with, the `factor` that the profile says heat had, and its seconds over the mean
    of its repeats with that taken from them (`over`). Raises `BackendError` for a profile that knows nothing of heat.
    """
    profile, steps, rounds = load_profile(name), measured_steps(name), measured_rounds(name)
    predictor = profile.predictor
    if steps is None or rounds is None or not predictor.heat.tau_s:
        raise BackendError(f"profile {name}: has no steps in the order in which they were measured (rounds.parquet)")
    features, executed = features_of(pd.read_parquet(steps)), pd.read_parquet(rounds)
    tokens, regimes = [f.rows for f in features], [predictor.regime(f)[0] for f in features]
    heat = HeatFit(predictor.heat, {regime: r.heat for regime, r in predictor.regimes.items()})
    factor = heat.factors(executed, tokens, regimes)
    rested_s = (executed["device_s"] / factor).groupby(executed["composition"]).transform("mean")
    return executed.assign(
        regime=np.array(regimes)[executed["composition"]],
        level=levels(executed, tokens, predictor.heat.tau_s),
        factor=factor,
        over=executed["device_s"] / rested_s,
    )


def by_level(table: pd.DataFrame) -> pd.DataFrame:
    """Medians of each kind of steps in groups of rising heat."""
    rows = []
    for regime, own in table.groupby("regime"):
        edges = np.unique(own["level"].quantile(list(EDGES))).tolist()
        groups = own.groupby(pd.cut(own["level"], edges, include_lowest=True), observed=True)
        medians = groups[["level", "over", "factor"]].median().assign(steps=groups.size(), regime=regime)
        rows.append(medians.reset_index(drop=True))
    return pd.concat(rows, ignore_index=True)[["regime", "steps", "level", "over", "factor"]]


def spread(table: pd.DataFrame) -> tuple[float, float]:
    """How far repeats of one step lie apart (p10 to p90 over the mean; the median step): as they were, and with heat taken from them."""

    def apart(seconds: pd.Series) -> float:
        of = seconds.groupby(table["composition"])
        return float(((of.quantile(0.9) - of.quantile(0.1)) / of.mean()).median())

    return apart(table["device_s"]), apart(table["device_s"] / table["factor"])


def draw(groups: pd.DataFrame, file: Path) -> None:
    """By how much steps take longer by the heat that they began with."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for regime, own in groups.groupby("regime"):
        (line,) = axis.plot(own["level"], 100 * (own["over"] - 1), "o", label=f"{regime}: measured")
        axis.plot(own["level"], 100 * (own["factor"] - 1), color=line.get_color(), label="fitted")
    axis.set_xlabel("heat when the step began, (tokens / ms)²")
    axis.set_ylabel("GPU time beyond that of a rested GPU (%)")
    axis.legend(fontsize=8, ncols=2)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heat", description=__doc__)
    parser.add_argument("--profile", default="h100-llama-3.1-8b", help="a shipped profile or a profile folder")
    parser.add_argument("--figure", type=Path, help="draw it there")
    args = parser.parse_args(argv)
    try:
        table = repeats(args.profile)
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    groups, curve = by_level(table), load_profile(args.profile).predictor.heat
    print(
        groups.to_string(
            index=False, formatters={"level": "{:.0f}".format, "over": "{:.4f}".format, "factor": "{:.4f}".format}
        )
    )
    print(f"time constant {curve.tau_s:g} s, tells from a level of {curve.spare:.0f} (tokens / ms)² on")
    as_it_was, without = spread(table)
    print(f"repeats of one step lie {as_it_was:.2%} apart (GPU time, median), {without:.2%} with heat taken from them")
    if args.figure:
        draw(groups, args.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
