"""Predicted runs beside measured ones: errors, how often the truth lies in the interval, and the decisions read from their grids."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

PREDICTED = ("output_throughput_tok_s", "itl_mean_ms", "ttft_mean_ms", "ttft_median_ms", "ttft_p99_ms")
"""What clients of a run saw: `measured_` and `predicted_` columns of a table of predictions, one row a run and seed."""

NEAR = 0.98
"""Where throughput is as good as equal, waiting decides (`sim.verdict`)."""

KNEE_MS = 1000.0
"""Mean TTFT beyond which a server counts as overrun: ten times that of one in steady state."""

_GRID = ("model", "workload_group")


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """A row a run: means over its seeds."""
    keys = [name for name in table.columns if not name.startswith(("predicted_", "slower_")) and name != "seed"]
    return (
        table.groupby(keys, sort=False, dropna=False)[[f"predicted_{name}" for name in PREDICTED]].mean().reset_index()
    )


def smape(table: pd.DataFrame) -> pd.DataFrame:
    """Of each metric: mean, median and p90 of 2|p − m| / (p + m), and the median of p / m − 1; means over seeds."""
    runs = over_seeds(table)
    rows = []
    for name in PREDICTED:
        measured, predicted = runs[f"measured_{name}"], runs[f"predicted_{name}"]
        error = 2 * (predicted - measured).abs() / (predicted + measured)
        rows.append(
            {
                "metric": name,
                "runs": len(runs),
                "smape": error.mean(),
                "median": error.median(),
                "p90": error.quantile(0.9),
                "bias": float((predicted / measured - 1).median()),
            }
        )
    return pd.DataFrame(rows)


def coverage(table: pd.DataFrame) -> pd.DataFrame:
    """How often a measured value lies in the 95 % interval that the seeds of its run give, and how wide that is (median, of the value).

    Student's t of so few seeds, in the logarithm; seeds draw lengths and ends anew, nothing else of a real run. `_with_costs`: and steps
    may take longer or less long by what the fit does not know (`Known.spread`), as far as `slower_` shows what that does (the delta
    method: errors of both kinds are independent, and small ones act alike in both directions).
    """
    from scipy.stats import norm, t

    seeds = int(table.groupby("run_id")["seed"].nunique().min())
    rows = []
    for name in PREDICTED:
        if seeds < 2:
            break
        logs = np.log(table.assign(value=table[f"predicted_{name}"]).groupby("run_id")["value"].apply(list).tolist())
        half = t.ppf(0.975, seeds - 1) * logs.std(axis=1, ddof=1) * np.sqrt(1 + 1 / seeds)
        measured = np.log(table.groupby("run_id")[f"measured_{name}"].first().to_numpy())
        apart = np.abs(measured - logs.mean(axis=1))
        row = {"metric": name, "runs": len(logs), "seeds": seeds, "inside": (apart <= half).mean(), "half_width": float(np.median(np.expm1(half)))}  # fmt: skip
        if f"slower_{name}" in table:
            first = table[table[f"slower_{name}"].notna()].groupby("run_id").first()
            shift = np.log(first[f"slower_{name}"].to_numpy() / first[f"predicted_{name}"].to_numpy())
            whole = np.hypot(half, norm.ppf(0.975) * shift)
            row |= {"inside_with_costs": (apart <= whole).mean(), "half_width_with_costs": float(np.median(np.expm1(whole)))}  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)


def decisions(table: pd.DataFrame) -> pd.DataFrame:
    """How far predicted decisions lie from measured ones, in steps of their grids: `grids`, share `exact` and `within_one`.

    `optimum max_loras`: for each load, the best throughput, and of those near it the lowest mean TTFT. `TTFT knee`: for each
    `max_loras`, the most adapters whose mean TTFT is under `KNEE_MS`.
    """
    runs = over_seeds(table)
    found = {
        "optimum max_loras": _steps_apart(runs, "n_adapters", "max_loras", _optimum),
        "TTFT knee": _steps_apart(runs, "max_loras", "n_adapters", _knee),
    }
    return pd.DataFrame(
        [
            {
                "decision": name,
                "grids": len(steps),
                "exact": np.mean([step == 0 for step in steps]) if steps else np.nan,
                "within_one": np.mean([step <= 1 for step in steps]) if steps else np.nan,
            }
            for name, steps in found.items()
        ]
    )


def _steps_apart(runs: pd.DataFrame, kept: str, along: str, choose: Callable[[pd.DataFrame, str], int]) -> list[int]:
    apart = []
    for _, grid in runs.groupby([*_GRID, kept, "max_lora_rank"], sort=False):
        line = grid.sort_values(along).drop_duplicates(along).reset_index(drop=True)
        if len(line) > 1:
            apart.append(abs(choose(line, "predicted") - choose(line, "measured")))
    return apart


def _optimum(line: pd.DataFrame, kind: str) -> int:
    rate = line[f"{kind}_output_throughput_tok_s"]
    near = line[rate >= NEAR * rate.max()]
    return int(near[f"{kind}_ttft_mean_ms"].idxmin())


def _knee(line: pd.DataFrame, kind: str) -> int:
    calm = np.flatnonzero(line[f"{kind}_ttft_mean_ms"] < KNEE_MS)
    return int(calm[-1]) if len(calm) else -1
