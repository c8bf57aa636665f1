"""Cost curves from measured parts (`multilora curve --live`): whole steps, their parts apart, and the loop over adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from backend.profile import measured_parts, shipped_profiles
from sim.curve import copy_shares, prices
from sim.errors import ScenarioError

NUMBERS = (
    "batch", "rank", "adapters", "context", "step_ms", "device_ms", "host_ms", "attention_ms", "shrink_ms", "expand_ms",
    "padded_step_ms", "loop_ms", "floor_bytes", "copy_gb_per_s",
)  # fmt: skip
TEXTS = ("geometry", "gpu", "date", "torch")


def load_points(name_or_path: str) -> pd.DataFrame:
    """The table that `curve --live` wrote: a Parquet file, or that of a shipped profile. Raises `ScenarioError`."""
    file = measured_parts(name_or_path) or Path(name_or_path)
    if not file.is_file():
        known = ", ".join(name for name in shipped_profiles() if measured_parts(name)) or "none has any"
        raise ScenarioError(
            f"--points {name_or_path}: no such file, and no shipped profile with measured parts ({known})"
        )
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise ScenarioError(f"--points {file}: not a Parquet file ({error})") from error
    missing = [name for name in (*NUMBERS, *TEXTS) if name not in table]
    if missing or table.empty:
        raise ScenarioError(
            f"--points {file}: {f'has no column {missing[0]}' if missing else 'is empty'}; `multilora curve --live` writes such"
        )
    return table


def points_curve(points: pd.DataFrame, name: str, *, gpu_hour_usd: float | None = None) -> pd.DataFrame:
    """The rows of `sim.curve.curve` for measured points; `profile` is `name`.

    Instead of `lora_ms` there are `shrink_ms` and `expand_ms`, each timed alone like `attention_ms`; `base_ms`: the
    base-only step on the device without its attention. Parts overlap in a step, so they may add up to more than `step_ms`.
    `loop_step_ms`: the base-only step plus the loop. `floor_ms`: at the copy bandwidth measured beside.
    """
    base = {row["batch"]: row for row in _records(points[points["adapters"] == 0])}
    rows: list[dict[str, object]] = []
    for (batch, rank), group in points[points["adapters"] > 0].groupby(["batch", "rank"], sort=False):
        alone = base[batch]
        padded = alone["step_ms"] if group["padded_step_ms"].notna().any() else None
        zero = {**alone, "rank": rank, "shrink_ms": 0.0, "expand_ms": 0.0, "loop_ms": 0.0, "padded_step_ms": padded}
        rows += [_row(point, base, name, gpu_hour_usd) for point in (zero, *_records(group.sort_values("adapters")))]
    return pd.DataFrame(rows)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in record.items()} for record in frame.to_dict("records")]


def _row(
    point: dict[str, Any], base: dict[int, dict[str, Any]], name: str, gpu_hour_usd: float | None
) -> dict[str, object]:
    alone = base[point["batch"]]
    as_measured = (
        "batch",
        "rank",
        "adapters",
        "context",
        "step_ms",
        "attention_ms",
        "shrink_ms",
        "expand_ms",
        "host_ms",
    )
    row: dict[str, object] = {
        "profile": name,
        **{key: point[key] for key in as_measured},
        "base_ms": max(0.0, alone["device_ms"] - alone["attention_ms"]),
        "padded_step_ms": point["padded_step_ms"],
        "loop_step_ms": alone["step_ms"] + point["loop_ms"],
        "copies_ms": sum(
            count * base[size]["step_ms"] for count, size in copy_shares(point["batch"], point["adapters"])
        ),
        "floor_ms": point["floor_bytes"] / point["copy_gb_per_s"] / 1e6,
        "extrapolated": False,
    }
    return row | prices(row, gpu_hour_usd)


def describe(points: pd.DataFrame) -> str:
    """Of what the points are, for a caption."""
    first = points.iloc[0]
    said = f"{first['geometry']}, {first['gpu']}, torch {first['torch']}, {first['date']}"
    if "p90_ms" not in points:
        return said
    spread = ((points["p90_ms"] - points["p10_ms"]) / points["step_ms"]).median()
    return f"{said}; p10 to p90 of a step span {spread:.1%} (median)"


def chosen(table: pd.DataFrame, batches: Sequence[int] | None, ranks: Sequence[int] | None) -> pd.DataFrame:
    """The rows of some batches and ranks; all where None. Raises `ScenarioError` if that leaves none."""
    kept = table
    for key, values in (("batch", batches), ("rank", ranks)):
        kept = kept if values is None else kept[kept[key].isin(list(values))]
    if kept.empty:
        there = ", ".join(f"{b} × {r}" for b, r in table[["batch", "rank"]].drop_duplicates().to_numpy().tolist())
        raise ScenarioError(f"--points: no such --batch and --rank were measured; there are (batch × rank) {there}")
    return kept
