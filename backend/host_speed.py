"""How fast a host was, over a measured run: what it took for each step over what was predicted.

One thread drives the engine, and machines share their cores: launches and Python of like steps take up to twice as long for
seconds, then as short again, all of them together. No function of a step's composition knows that; these records do.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import pandas as pd

from backend.fitting import measured
from backend.predictor import Predictor
from backend.regression import WAITED_S

WINDOW_S = 10.0
"""Seconds over which the level of a host is taken."""


@dataclass(frozen=True, slots=True)
class Ratios:
    """Steps of one kind: when each began (s), its host's seconds over the predicted ones, and these."""

    at_s: tuple[float, ...]
    ratio: tuple[float, ...]
    expected_s: tuple[float, ...]

    def nearest(self, at_s: float) -> float:
        """The ratio of the step that began nearest to `at_s`."""
        right = bisect_left(self.at_s, at_s)
        if right == len(self.at_s) or (right and at_s - self.at_s[right - 1] < self.at_s[right] - at_s):
            right -= 1
        return self.ratio[right]

    def within(self, begin_s: float, end_s: float) -> tuple[float, float]:
        """Seconds that steps begun in a window took, and those predicted for them."""
        window = slice(bisect_left(self.at_s, begin_s), bisect_left(self.at_s, end_s))
        expected = np.array(self.expected_s[window])
        return float((expected * np.array(self.ratio[window])).sum()), float(expected.sum())


@dataclass(frozen=True, slots=True)
class HostSpeed:
    """A run's host: the whole host's part of steps replayed from graphs (`captured`), the launches of steps launched kernel by kernel
    (`launched`); `end_s`: of the record.
    """

    captured: Ratios
    launched: Ratios
    end_s: float

    @classmethod
    def of(cls, predictor: Predictor, steps: pd.DataFrame) -> HostSpeed:
        """From a run's steps; those whose launches the device hid, or nobody timed, say nothing and are left out."""
        kinds: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
        own = measured(steps)
        for at_s, f, device_s, host_s, launch_s in zip(
            steps["t_s"], own.steps, own.device_s, own.host_s, own.launch_s, strict=True
        ):
            regime, _, launch, host = predictor.split(f)
            expected, took = (launch, launch_s + device_s) if regime.launch else (host, host_s)
            if expected > 0 and not (regime.launch and (device_s > WAITED_S or launch_s == 0)):
                kinds[bool(regime.launch)].append((at_s, took / expected, expected))
        captured, launched = (
            Ratios(*(zip(*sorted(kinds[kind]), strict=True) if kinds[kind] else ((), (), ()))) for kind in (False, True)
        )
        return cls(captured, launched, float(steps["t_s"].max()))

    def at(self, at_s: float, *, launched: bool) -> float:
        """The ratio of the step nearest to `at_s`, of its own kind where there are any; 1 where nothing was measured."""
        own, other = (self.launched, self.captured) if launched else (self.captured, self.launched)
        chosen = own if own.at_s else other
        return chosen.nearest(at_s) if chosen.at_s else 1.0

    def level(self, begin_s: float, end_s: float) -> float | None:
        """The host's seconds of a window over those predicted for them; None where nothing was measured."""
        parts = [kind.within(begin_s, end_s) for kind in (self.captured, self.launched)]
        expected = sum(part[1] for part in parts)
        return sum(part[0] for part in parts) / expected if expected else None

    def windows(self) -> list[float]:
        """Levels of its whole windows of `WINDOW_S`, one after the other."""
        begins = np.arange(0.0, self.end_s - WINDOW_S + 1e-9, WINDOW_S)
        return [level for begin in begins if (level := self.level(begin, begin + WINDOW_S)) is not None]
