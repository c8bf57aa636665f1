"""A host whose speed goes in waves, drawn from measured runs: seeded, and the same again for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from statistics import NormalDist

import numpy as np

from backend.host_speed import HostSpeed, Spread

STRETCH_S = 5.0
"""Seconds of a record that are played on end: ratios of steps are alike for 1 to 3 s, and unrelated after 6."""


@dataclass(frozen=True, slots=True)
class HostOutlook:
    """What is known of a run's host before it begins: records of `others`, how far runs lie apart, and `own`, the record of its
    beginning, `own_s` long.
    """

    others: tuple[HostSpeed, ...]
    spread: Spread
    own: HostSpeed | None = None
    own_s: float = 0.0

    @property
    def trust(self) -> float:
        """How likely the run goes on like its own beginning rather than like another run."""
        if self.own is None:
            return 0.0
        return self.spread.trust(self.own_s) if self.others else 1.0


class HostDraw:
    """Host seconds over predicted ones, as one run would have them.

    While the run's own record lasts, it is played. Then stretches of `STRETCH_S` follow each other, each from the run's own beginning
    or from another run, and all of them times what this run as a whole may differ by: of `seeds` draws, `seed` has its quantile of
    that. Time is that of the steps, without idle.
    """

    def __init__(self, outlook: HostOutlook, seed: int = 0, seeds: int = 1) -> None:
        self._outlook = outlook
        self._rng = np.random.default_rng(seed)
        apart = outlook.spread.runs * (1.0 - outlook.trust) ** 0.5
        self._run = exp(apart * NormalDist().inv_cdf((seed + 0.5) / seeds))
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
        if known.own is not None and (not known.others or rng.random() < known.trust):
            self._record, self._around_s = known.own, known.own_s
        elif known.others:
            self._record = known.others[int(rng.integers(len(known.others)))]
            self._around_s = self._record.end_s
        self._level = self._run
        self._at_s = float(rng.uniform(0.0, self._around_s))
        self._until_s = self._at_s + STRETCH_S
