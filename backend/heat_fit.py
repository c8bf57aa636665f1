"""What heat (`backend/heat.py`) does to steps, from repeats of the same steps in different orders.

Two repeats of a step differ by what ran before them and by chance; all that is fitted lies in these differences, so that it does not
matter what a step costs otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from backend.heat import UNKNOWN, Heat, HeatCurve
from backend.predictor import FloatArray, Predictor

TAUS_S = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3)
"""Time constants that are tried."""

SPARES = tuple(i / 20 for i in range(13))
"""Shares of the steps that begin with too little heat to tell, which are tried."""

LEAST_EXPLAINED = 0.05
"""Less of what repeats differ by is chance: nothing is said of heat then."""

FARTHEST = 0.1
"""A repeat that lies farther than this from its step's mean (relative) says nothing of heat."""


@dataclass(frozen=True, slots=True)
class HeatFit:
    """`slopes`: of each regime, by what share of itself a step takes longer for each unit of heat that tells (`HeatCurve`).

    `explained`: share of the variance among repeats that this accounts for; 0 where repeats say nothing of heat.
    """

    curve: HeatCurve
    slopes: Mapping[str, float]
    explained: float = 0.0

    def factors(self, steps: pd.DataFrame, tokens: Sequence[int], regimes: Sequence[str]) -> FloatArray:
        """By what each row of `steps` took longer than on a rested GPU; arguments as of `fit_heat`."""
        if not self.curve.tau_s:
            return np.ones(len(steps))
        slope = np.array([self.slopes.get(name, 0.0) for name in regimes])[steps["composition"]]
        return 1.0 + slope * np.maximum(0.0, levels(steps, tokens, self.curve.tau_s) - self.curve.spare)

    def on(self, predictor: Predictor) -> Predictor:
        """`predictor`, fitted to steps of a rested GPU, with this heat."""
        regimes = {name: replace(r, heat=self.slopes.get(name, 0.0)) for name, r in predictor.regimes.items()}
        return replace(predictor, regimes=regimes, heat=self.curve)


NO_HEAT = HeatFit(UNKNOWN, {})


def levels(steps: pd.DataFrame, tokens: Sequence[int], tau_s: float) -> FloatArray:
    """The heat that each row of `steps` began with."""
    out: list[float] = []
    curve = HeatCurve(tau_s)
    heat, number, free_s = Heat(curve), -1, 0.0
    columns = (steps[name].tolist() for name in ("round", "composition", "start_s", "host_s", "device_s"))
    for of_round, composition, start_s, host_s, device_s in zip(*columns, strict=True):
        if of_round != number:
            number, heat = of_round, Heat(curve)
        else:
            heat.rest(max(0.0, start_s - free_s) + host_s)
        out.append(heat.level)
        heat.work(tokens[composition], device_s)
        free_s = start_s + host_s + device_s
    return np.array(out)


def fit_heat(steps: pd.DataFrame, tokens: Sequence[int], regimes: Sequence[str], used: Sequence[bool]) -> HeatFit:
    """Fit the curve and slopes to `steps` in the order in which they were executed.

    Columns `round, composition, device_s, host_s, start_s` (of the step, on the host's clock); `tokens`, `regimes` and `used`: of each
    composition its rows, its regime, and whether its repeats may be looked at.
    """
    kept = np.array(used)[steps["composition"]]
    kind = np.array(regimes)[steps["composition"]]
    device_s, composition = steps["device_s"].to_numpy(), steps["composition"].to_numpy()
    apart = _within(np.log(device_s), composition)
    kept &= np.abs(apart) < FARTHEST
    whole = float((apart[kept] ** 2).sum())
    best = NO_HEAT
    for tau_s in TAUS_S if whole > 0 else ():
        level = levels(steps, tokens, tau_s)
        for spare in np.quantile(level[kept], SPARES).tolist():
            slopes, left, told = {}, 0.0, np.maximum(0.0, level - spare)
            for name in sorted(set(regimes)):
                mine = kept & (kind == name)
                slopes[name], rest = _slope(device_s[mine], told[mine], composition[mine])
                left += rest
            if (explained := 1.0 - left / whole) > max(best.explained, LEAST_EXPLAINED):
                best = HeatFit(HeatCurve(tau_s, spare), slopes, explained)
    return best


def _slope(device_s: FloatArray, level: FloatArray, composition: npt.NDArray[np.int64]) -> tuple[float, float]:
    """The slope >= 0 that leaves the least squares between repeats, and what it leaves (Gauss-Newton: the slope is small)."""
    slope = 0.0
    for _ in range(4):
        rest = _within(np.log(device_s / (1.0 + slope * level)), composition)
        by = _within(level / (1.0 + slope * level), composition)
        if not (by**2).sum() > 0:
            break
        slope = max(0.0, slope + float((rest * by).sum() / (by**2).sum()))
    rest = _within(np.log(device_s / (1.0 + slope * level)), composition)
    return slope, float((rest**2).sum())


def _within(values: FloatArray, group: npt.NDArray[np.int64]) -> FloatArray:
    """Values less the mean of their group."""
    return np.asarray(
        values - (np.bincount(group, values) / np.maximum(1, np.bincount(group)))[group], dtype=np.float64
    )
