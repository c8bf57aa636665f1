"""Heat: how hard a GPU worked just now, which its next steps take longer for.

At its power limit a GPU lowers its clock, and some tens of milliseconds of lighter work or rest bring it back: on an H100 the same step
takes up to a tenth longer after long prompts than after decodes of few requests (docs/steps.md). `Heat.level` stands for the
power drawn lately: the mean of (tokens a millisecond)², a moment counting the less the longer ago it is; up to `spare` of it the limit
is not reached. Squares: of the powers tried (1 to 4) those from 2 to 2.5 explain most of what repeats of a step differ by, all about as much
(`backend/heat_fit.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LASTING_TURNS = 8
"""After so many repeats a step's seconds and its heat have settled on each other: where heat makes steps a tenth longer, a turn changes a fifth
of what the one before changed.
"""


def drive(tokens: int, device_s: float) -> float:
    """What the level tends to while a step of `tokens` runs that takes `device_s`; 0 if it takes no time."""
    if device_s <= 0:
        return 0.0
    rate = 1e-3 * tokens / device_s
    return rate * rate


@dataclass(frozen=True, slots=True)
class HeatCurve:
    """What is known of a GPU's heat: what a moment counts falls to 1/e in `tau_s` seconds (0: nothing is known), and the level up to
    which steps are as on a rested GPU, in (tokens / ms)².
    """

    tau_s: float = 0.0
    spare: float = 0.0

    def above(self, level: float) -> float:
        """The heat that tells."""
        return max(0.0, level - self.spare)

    def lasting_s(self, cool_s: float, slope: float, tokens: int) -> float:
        """Seconds of a step of `tokens` that follows on itself for good, if it takes `cool_s` on a rested GPU, and `slope` of it more for each
        unit of heat that tells.
        """
        device_s = cool_s
        for _ in range(LASTING_TURNS if self.tau_s else 0):
            device_s = cool_s * (1.0 + slope * self.above(drive(tokens, device_s)))
        return device_s


UNKNOWN = HeatCurve()


@dataclass(slots=True)
class Heat:
    """The heat of one GPU: `level` in (tokens / ms)²."""

    curve: HeatCurve
    level: float = 0.0

    def rest(self, seconds: float) -> None:
        """The GPU has nothing to do."""
        self.level *= math.exp(-seconds / self.curve.tau_s)

    def step(self, cool_s: float, slope: float, tokens: int, rest_s: float) -> float:
        """Seconds of a step after a rest; the rest as of `HeatCurve.lasting_s`."""
        self.rest(rest_s)
        device_s = cool_s * (1.0 + slope * self.curve.above(self.level))
        self.work(tokens, device_s)
        return device_s

    def work(self, tokens: int, device_s: float) -> None:
        """It runs a step."""
        to = drive(tokens, device_s)
        self.level = to + (self.level - to) * math.exp(-device_s / self.curve.tau_s)
