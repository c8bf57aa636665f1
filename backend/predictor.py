"""Step times from measured ones: additive where the physics is, with the staircase of captured graph sizes.

A step costs base (by rows) + attention (by keys read) + LoRA (by adapters, ranks, rows); every term's
coefficient is >= 0, fitted by non-negative least squares on relative error (Lawson & Hanson; scipy).
Decode steps replayed as graphs and all other steps are two regimes, fitted apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from backend.errors import BackendError
from backend.features import StepFeatures

FloatArray = npt.NDArray[np.float64]

_BOUNDED = ("rows", "kv_tokens", "max_kv", "prefill_pairs", "active_adapters", "rank_sum", "row_rank")


def hat(value: float, knots: Sequence[float]) -> list[float]:
    """Weights of piecewise-linear interpolation of `value` between `knots`; linear beyond the last."""
    weights = [0.0] * len(knots)
    if len(knots) == 1 or value <= knots[0]:
        weights[0] = 1.0
        return weights
    right = min(bisect_left(knots, value), len(knots) - 1)
    left = right - 1
    share = (value - knots[left]) / (knots[right] - knots[left])
    weights[left], weights[right] = 1.0 - share, share
    return weights


@dataclass(frozen=True, slots=True)
class Regime:
    """One regime's fit: knots over rows, coefficients for device and host seconds, and the measured range."""

    knots: tuple[float, ...]
    device: tuple[float, ...]
    host: tuple[float, ...]
    low: Mapping[str, float]
    high: Mapping[str, float]

    def terms(self, f: StepFeatures, size: int) -> list[float]:
        """The features that coefficients multiply; `size` is the row count the step is executed at."""
        adapted = 1.0 if f.active_adapters else 0.0
        base = hat(size, self.knots)
        lora = hat(f.lora_rows, self.knots) if f.active_adapters else [0.0] * len(self.knots)
        few = 1.0 if f.requests <= 16 else 0.0
        return [
            *base,
            *lora,
            f.kv_tokens,
            f.max_kv * few,
            f.max_kv,
            f.prefill_pairs,
            f.samples,
            f.requests,
            f.active_adapters,
            f.rank_sum,
            f.lora_tiles,
            f.row_rank,
            adapted,
        ]

    def contains(self, f: StepFeatures) -> bool:
        """Whether every bounded feature lies inside what was measured."""
        return all(self.low[k] <= getattr(f, k) <= self.high[k] for k in self.low)


@dataclass(frozen=True, slots=True)
class Predictor:
    """Predicts a step's device and host seconds; `graph_sizes` is empty where nothing is replayed as a graph."""

    graph_sizes: tuple[int, ...]
    graph: Regime | None
    eager: Regime

    def _size(self, f: StepFeatures) -> int | None:
        if not f.decode_only or not self.graph_sizes or f.rows > self.graph_sizes[-1]:
            return None
        return self.graph_sizes[bisect_left(self.graph_sizes, f.rows)]

    def predict(self, f: StepFeatures) -> tuple[float, float, bool]:
        """(device_s, host_s, whether the step lies outside the measured range)."""
        size = self._size(f)
        regime = self.eager if size is None or self.graph is None else self.graph
        terms = regime.terms(f, f.rows if regime is self.eager else size or f.rows)
        device = sum(c * t for c, t in zip(regime.device, terms, strict=True))
        host = sum(c * t for c, t in zip(regime.host, terms, strict=True))
        return device, host, not regime.contains(f)

    def to_json(self) -> dict[str, object]:
        """Plain data for `profile.json`."""
        regimes = {"graph": self.graph, "eager": self.eager}
        return {
            "graph_sizes": list(self.graph_sizes),
            **{
                k: None if r is None else {f.name: getattr(r, f.name) for f in fields(Regime)}
                for k, r in regimes.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Predictor:
        """Read what `to_json` wrote."""

        def regime(value: object) -> Regime | None:
            if not isinstance(value, dict):
                return None
            lists = {k: tuple(value[k]) for k in ("knots", "device", "host")}
            return Regime(**lists, low=value["low"], high=value["high"])

        eager = regime(data["eager"])
        sizes = data["graph_sizes"]
        if eager is None or not isinstance(sizes, list):
            raise BackendError("profile.json: predictor needs eager and graph_sizes; measure the profile again")
        return cls(tuple(sizes), regime(data["graph"]), eager)


def _nonnegative(matrix: FloatArray, target: FloatArray, weight: FloatArray) -> tuple[float, ...]:
    from scipy.optimize import nnls

    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
    solution, _ = nnls(matrix / scale * weight[:, None], target * weight, maxiter=100 * matrix.shape[1])
    return tuple((solution / scale).tolist())


def fit_regime(
    steps: Sequence[StepFeatures],
    sizes: Sequence[int],
    device_s: FloatArray,
    host_s: FloatArray,
    knots: Sequence[float],
) -> Regime:
    """Fit one regime to measured steps; relative errors of the whole step weigh alike."""
    ranges = {k: [float(getattr(f, k)) for f in steps] for k in _BOUNDED}
    low = {k: min(v) for k, v in ranges.items()}
    high = {k: max(v) for k, v in ranges.items()}
    empty = Regime(tuple(knots), (), (), low, high)
    matrix = np.array([empty.terms(f, size) for f, size in zip(steps, sizes, strict=True)])
    weight = 1.0 / (device_s + host_s)
    device = _nonnegative(matrix, device_s, weight)
    return Regime(tuple(knots), device, _nonnegative(matrix, host_s, weight), low, high)


def fit_predictor(
    steps: Sequence[StepFeatures], device_s: FloatArray, host_s: FloatArray, graph_sizes: Sequence[int]
) -> Predictor:
    """Fit both regimes; knots are the measured row counts of the base-only steps."""
    blank = Predictor(tuple(graph_sizes), None, Regime((), (), (), {}, {}))
    sizes = [blank._size(f) for f in steps]
    regimes: dict[bool, Regime] = {}
    for in_graph in (True, False):
        chosen = [i for i, size in enumerate(sizes) if (size is not None) == in_graph]
        if not chosen:
            continue
        rows = sorted({sizes[i] or steps[i].rows for i in chosen if not steps[i].active_adapters})
        knots = [float(r) for r in rows] if in_graph else _thinned(rows)
        regimes[in_graph] = fit_regime(
            [steps[i] for i in chosen],
            [sizes[i] or steps[i].rows for i in chosen],
            device_s[chosen],
            host_s[chosen],
            knots,
        )
    if False not in regimes:
        raise BackendError("a profile needs measured steps beside pure decodes, to know what prefill costs")
    return Predictor(tuple(graph_sizes), regimes.get(True), regimes[False])


def _thinned(rows: Sequence[int]) -> list[float]:
    """Knots at least a factor 1.4 apart."""
    kept: list[float] = []
    for value in rows:
        if not kept or value >= 1.4 * kept[-1] or value == rows[-1]:
            kept.append(float(value))
    return kept
