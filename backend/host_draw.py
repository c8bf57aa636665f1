"""A host whose speed goes in waves, drawn from measured runs: seeded, and the same again for the same seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backend.host_speed import HostSpeed
from backend.host_spread import Spread

STRETCH_S = 5.0
"""Seconds of a record that are played on end: ratios of steps are alike for 1 to 3 s, and unrelated after 6."""


@dataclass(frozen=True, slots=True)
class HostOutlook:
    """What is known of a run's host before it begins: records of `others` (none: only its own), how far runs lie apart, and `own`, the
    record of its beginning, `own_s` long.
    """

    others: tuple[HostSpeed, ...]
    spread: Spread
    own: HostSpeed | None = None
    own_s: float = 0.0

    @property
    def began(self) -> float | None:
        """The level of the run's beginning."""
        return None if self.own is None else self.own.level(0.0, self.own_s)


class HostDraw:
    """Host seconds over predicted ones, as one run would have them.

    While the run's own record lasts, it is played. Then stretches of `STRETCH_S` follow each other, each from the run's own beginning
    or from another run, at the level that this run may have as a whole: of `seeds` draws, `seed` has its quantile of what is believed of
    that. Time is that of the steps, without idle.
    """

    def __init__(self, outlook: HostOutlook, seed: int = 0, seeds: int = 1) -> None:
        self._outlook = outlook
        self._rng = np.random.default_rng(seed)
        self._began = outlook.began
        self._run = outlook.spread.quantile((seed + 0.5) / seeds, self._began, outlook.own_s)
        self._like_own = 0.0 if self._began is None else outlook.spread.lasting(outlook.own_s)
        self._level, self._record, self._around_s = 1.0, outlook.own, outlook.own_s
        self._at_s, self._until_s = 0.0, outlook.own_s

    def ratio(self, *, launched: bool) -> float:
        """Of a step that begins now; `launched`: kernel by kernel."""
        if self._at_s >= self._until_s or self._record is None:
            self._next()
        at_s = self._at_s % self._around_s if self._around_s else 0.0
        return 1.0 if self._record is None else self._level * self._record.at(at_s, launched=launched)

    def passed(self, seconds: float) -> None:
        """A step took that long."""
        self._at_s += seconds

    def _next(self) -> None:
        """Begin the next stretch: anywhere in a record, which goes on with its beginning where it ends, so that all of it is as likely."""
        known, rng = self._outlook, self._rng
        if known.own is not None and (not known.others or rng.random() < self._like_own):
            self._record, self._around_s = known.own, known.own_s
            self._level = self._run / (self._began or 1.0) if known.others else 1.0
        elif known.others:
            self._record = known.others[int(rng.integers(len(known.others)))]
            self._around_s, self._level = self._record.end_s, self._run
        self._at_s = float(rng.uniform(0.0, self._around_s))
        self._until_s = self._at_s + STRETCH_S
