"""How the hosts of logged runs went: levels over time, and how alike the ratios of steps are by the time between them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from backend.host_speed import WINDOW_S, HostSpeed, Ratios
from backend.host_spread import Spread
from backend.online import OnlineRuns

_APART_S = ((0.2, 0.4), (0.7, 1.5), (6.0, 12.0))
"""Steps so far apart are compared."""


def levels(runs: OnlineRuns) -> tuple[pd.DataFrame, Spread]:
    """A row a run: the host's level (1: as the other runs say) of each window of `WINDOW_S`, and for launches and for the host's part of
    decodes the correlation of log ratios of steps by their distance in time; and how far levels lie apart.
    """
    rows, speeds = [], []
    for name, run in runs.runs.items():
        speed = HostSpeed.of(runs.without(name).predictor(), run)
        row: dict[str, object] = {"run": name}
        for i, level in enumerate(speed.windows()):
            row[f"{i * WINDOW_S:.0f} to {(i + 1) * WINDOW_S:.0f} s"] = level
        row["whole"] = speed.level(0.0, speed.end_s)
        for label, kind in (("launches", speed.launched), ("decodes", speed.captured)):
            for low, high in _APART_S:
                row[f"{label} {low:g} to {high:g} s"] = alike(kind, low, high)
        rows.append(row)
        speeds.append(speed)
    return pd.DataFrame(rows), Spread.of(speeds)


def alike(kind: Ratios, low_s: float, high_s: float) -> float:
    """Correlation of log ratios of steps that began `low_s` to `high_s` after each other."""
    at_s, ratio = np.array(kind.at_s), np.log(kind.ratio)
    ratio = (ratio - ratio.mean()) / ratio.std()
    apart = at_s[None, :] - at_s[:, None]
    chosen = (apart > low_s) & (apart <= high_s)
    return float((ratio[:, None] * ratio[None, :])[chosen].mean())
