"""Where a live run and its replay part: milliseconds of steps by kind, and of the host by time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

KINDS = (
    ("decodes, up to 8", 0, 0, 8),
    ("decodes, 9 to 32", 0, 9, 32),
    ("decodes, more", 0, 33, None),
    ("with prompts, up to 256 tokens", 1, 1, 256),
    ("with prompts, 257 to 1024 tokens", 1, 257, 1024),
    ("with prompts, more", 1, 1025, None),
)
"""Kinds of steps: name, whether prompts are among them, least and most tokens."""


def _kind(steps: pd.DataFrame, prompts: int, least: int, most: int | None) -> pd.DataFrame:
    tokens = steps["tokens"]
    inside = (tokens >= least) & (tokens <= (tokens.max() if most is None else most))
    return steps[((steps["prefill_tokens"] > 0) == bool(prompts)) & inside & (tokens > 0)]


def by_kind(live: pd.DataFrame, replay: pd.DataFrame) -> list[dict[str, object]]:
    """How long steps of each kind take, live and replayed, and how many tokens they have: where the two part.

    `load_most_ms`: what the slowest of them waited for adapters; live, one slow read delays all that are waiting.
    """
    rows = ({"kind": name, **_means("live", live, which), **_means("replay", replay, which)} for name, *which in KINDS)
    return [row for row in rows if row["live_steps"] and row["replay_steps"]]


def _means(side: str, steps: pd.DataFrame, which: list[Any]) -> dict[str, object]:
    mine = _kind(steps, *which)
    means = {f"{side}_{part}_ms": float(mine[f"{part}_s"].mean() * 1e3) for part in ("device", "host", "load")}
    most = {f"{side}_load_most_ms": float(mine["load_s"].max() * 1e3)}
    return {f"{side}_steps": len(mine), f"{side}_tokens": float(mine["tokens"].mean()), **means, **most}


WINDOW_S = 10.0
"""Of `host_by_time`."""


def host_by_time(live: pd.DataFrame, replay: pd.DataFrame) -> list[dict[str, float]]:
    """Milliseconds of the host's part of decodes in windows of `WINDOW_S`: a shared machine's host is now faster, now slower,
    of which a profile knows the mean while it was measured.
    """
    return _beside(_host_ms(live), _host_ms(replay))


def _host_ms(steps: pd.DataFrame) -> dict[float, float]:
    decodes = steps[(steps["prefill_tokens"] == 0) & (steps["tokens"] > 0)]
    means = decodes.groupby(decodes["start_s"] // WINDOW_S * WINDOW_S)["host_s"].mean() * 1e3
    return {float(start_s): float(mean) for start_s, mean in zip(means.index, means, strict=True)}


def _beside(live: Mapping[float, float], replay: Mapping[float, float]) -> list[dict[str, float]]:
    both = (start_s for start_s in live if start_s in replay)
    return [{"start_s": s, "live_host_ms": live[s], "replay_host_ms": replay[s]} for s in both]


def tables_of(live: pd.DataFrame, replay: pd.DataFrame) -> dict[str, Any]:
    """`by_kind` and `host_by_time` of a comparison."""
    return {"by_kind": by_kind(live, replay), "host_by_time": host_by_time(live, replay)}


def tables_again(rows: Mapping[str, Any], replay: pd.DataFrame) -> dict[str, Any]:
    """The live figures of an earlier comparison's tables, those that it has, beside a new replay."""
    which = {kind: rest for kind, *rest in KINDS}
    tables: dict[str, Any] = {
        "by_kind": [row | _means("replay", replay, which[row["kind"]]) for row in rows.get("by_kind", [])]
    }
    if waves := {row["start_s"]: row["live_host_ms"] for row in rows.get("host_by_time", [])}:
        tables["host_by_time"] = _beside(waves, _host_ms(replay))
    return tables
