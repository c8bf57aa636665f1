"""How far hosts lie apart: what is believed of a run's host as a whole, before it begins and after its first seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from backend.host_speed import WINDOW_S, HostSpeed

RUN_LAUNCH_MS = (62.0, 63.0, 67.0, 69.0, 72.0, 90.0)
"""Median launches of a step of more than 256 rows in six runs of one engine on machines of one kind (vLLM 0.24, H100, ms)."""

_GRID, _TAILS = 81, 4.0
"""Levels that stand for the normal distribution of a run unlike those reported, and its standard deviations to either side."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spread:
    """`windows`: standard deviation of the logarithm of a run's levels over `WINDOW_S` from the run's own. `levels`: logarithms of the
    levels that a run may have as a whole, rising, beside a middle run's; `shares`: how likely each is.
    """

    windows: float
    levels: tuple[float, ...] = (0.0,)
    shares: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, speeds: Sequence[HostSpeed]) -> Spread:
        """Of windows by these runs; of runs by `RUN_LAUNCH_MS`.

        The next run is like one of those reported, each as likely, or, as likely as one of them, unlike all: anywhere in the normal
        distribution of their mean and standard deviation (a Dirichlet process with that base; Ferguson 1973). Few lie close together
        and one far off, so that a slow beginning is more likely a slow run than the normal distribution alone would have it.
        """
        logs = [np.log(levels) for speed in speeds if len(levels := speed.windows()) > 1]
        free = sum(len(values) - 1 for values in logs)
        within = sum(float(((values - values.mean()) ** 2).sum()) for values in logs) / free if free else 0.0
        reported = np.log(RUN_LAUNCH_MS) - np.log(np.median(RUN_LAUNCH_MS))
        base = NormalDist(float(reported.mean()), float(reported.std(ddof=1)))
        grid = np.linspace(base.mean - _TAILS * base.stdev, base.mean + _TAILS * base.stdev, _GRID)
        heights = np.array([base.pdf(level) for level in grid])
        both = [(float(level), 1.0) for level in reported]
        both += [(float(level), float(height / heights.sum())) for level, height in zip(grid, heights, strict=True)]
        both.sort()
        shares = tuple(share / (len(reported) + 1) for _, share in both)
        return cls(within**0.5, tuple(level for level, _ in both), shares)

    def believed(self, level: float | None, seconds: float) -> FloatArray:
        """How likely each of `levels` is for a run whose first `seconds` were at `level` (None: not known)."""
        shares = np.array(self.shares)
        if level is None:
            return shares
        # Without waves the run is as it began; the floor only keeps that a number.
        waves = max(self.windows * (WINDOW_S / seconds) ** 0.5, 1e-3)
        apart = (np.log(level) - np.array(self.levels)) / waves
        likely = shares * np.exp(-0.5 * (apart**2 - (apart**2).min()))
        return np.asarray(likely / likely.sum())

    def expected(self, level: float | None, seconds: float) -> float:
        """The mean level of such a run as a whole."""
        return float(self.believed(level, seconds) @ np.exp(self.levels))

    def quantile(self, share: float, level: float | None, seconds: float) -> float:
        """The level that `share` of such runs are not above."""
        below = self.believed(level, seconds).cumsum()
        return float(np.exp(self.levels[min(int(np.searchsorted(below, share)), len(self.levels) - 1)]))

    def lasting(self, seconds: float) -> float:
        """The share of the distance between the first `seconds` of two runs that is the runs' own, and no wave."""
        mean = np.dot(self.shares, self.levels)
        own = float(np.dot(self.shares, (np.array(self.levels) - mean) ** 2))
        whole = own + self.windows**2 * WINDOW_S / seconds
        return own / whole if whole else 1.0
