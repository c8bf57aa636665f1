"""How many replicas a fleet should have, by what it sees of those it has. Pure policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from sim.router import View

SIGNALS: Mapping[str, Callable[[View], float]] = {
    "outstanding": lambda view: view.outstanding,
    "waiting": lambda view: view.waiting,
    "kv_usage": lambda view: view.kv_usage,
}
"""`fleet.autoscaling.signal` by name: of one replica."""


def wanted(views: Sequence[View], signal: str, target: float, tolerance: float) -> int:
    """Replicas that bring the mean signal to `target`: the rule of Kubernetes' horizontal pod autoscaler."""
    total = sum(SIGNALS[signal](view) for view in views)
    ratio = total / (len(views) * target)
    return len(views) if abs(ratio - 1.0) <= tolerance else math.ceil(total / target)


class Steady:
    """Holds a fall back until the rule has asked for it all through `stabilization_s`."""

    def __init__(self, stabilization_s: float, count: int) -> None:
        """`count`: how many there are at the start."""
        self._window_s = stabilization_s
        self._asked = [(0.0, count)]

    def __call__(self, now_s: float, count: int) -> int:
        """The most that was asked for in the window that ends now."""
        self._asked = [(at, n) for at, n in self._asked if at >= now_s - self._window_s] + [(now_s, count)]
        return max(n for _, n in self._asked)
