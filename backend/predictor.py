"""Step times from measured ones: additive where the physics is, with the staircase of captured graph sizes.

A step costs base (by rows) + attention (by keys read) + LoRA (by adapters, ranks, rows); every term's
coefficient is >= 0, fitted by non-negative least squares on relative error (Lawson & Hanson; scipy).
Pure decodes, mixed steps small enough for a captured graph, and larger steps launched one kernel at a time are
three regimes, fitted apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.errors import BackendError
from backend.features import DECODES_AT_ONCE, SPLIT_DECODES, StepFeatures

FloatArray = npt.NDArray[np.float64]

_BOUNDED = ("rows", "kv_tokens", "max_kv", "prefill_keys", "active_adapters", "rank_sum", "row_rank")

_TERMS = (
    "kv_tokens", "kv_tail", "prefill_keys", "prefill_tail",
    "requests", "active_adapters", "rank_sum", "max_rank", "lora_tiles", "row_rank",
)  # fmt: skip
"""The terms after the two hats, in the order of `Regime.terms`; attention's come first."""

_ATTENTION = 4

_LEAN = frozenset({"prefill_keys", "active_adapters"})
"""Those that a sparse table, of one rank and one context, can tell apart."""

_ENOUGH = 3
"""Measured steps of a captured size that give it a knot of its own: base products do not cost what their neighbours' say."""


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


def host_terms(f: StepFeatures) -> list[float]:
    """What the host's seconds of a step depend on: the step, whether it has adapters, its requests, adapters and rows."""
    return [1.0, 1.0 if f.active_adapters else 0.0, f.requests, f.active_adapters, f.rows]


@dataclass(frozen=True, slots=True)
class Regime:
    """One regime's fit: knots over rows, coefficients for device and host seconds, and the measured range.

    `knots`: of the base model; `lora_knots`: of what LoRA costs at all, where steps with and without it were measured.
    """

    knots: tuple[float, ...]
    lora_knots: tuple[float, ...]
    device: tuple[float, ...]
    host: tuple[float, ...]
    low: Mapping[str, float]
    high: Mapping[str, float]

    def terms(self, f: StepFeatures, size: int) -> list[float]:
        """The features that coefficients multiply; `size` is the row count the step is executed at."""
        lora = hat(size, self.lora_knots) if f.active_adapters else [0.0] * len(self.lora_knots)
        # With too few decodes to fill the processors but too many to split their keys, some idle until the longest ends.
        idle = max(0, DECODES_AT_ONCE - f.decodes) * f.max_kv if f.decodes > SPLIT_DECODES else 0
        return [
            *hat(size, self.knots),
            *lora,
            f.kv_tokens,
            f.kv_tail + idle,
            f.prefill_keys,
            f.prefill_tail,
            f.requests,
            f.active_adapters,
            f.rank_sum,
            f.max_rank,
            f.lora_tiles,
            f.row_rank,
        ]

    def parts(self, f: StepFeatures, size: int) -> dict[str, float]:
        """Device seconds by what causes them: `base` model, `attention`, `lora`; they add up to the whole."""
        products = [c * t for c, t in zip(self.device, self.terms(f, size), strict=True)]
        base, lora, rest = (
            products[: len(self.knots)],
            products[len(self.knots) : -len(_TERMS)],
            products[-len(_TERMS) :],
        )
        return {
            "base": sum(base) + rest[_ATTENTION],
            "attention": sum(rest[:_ATTENTION]),
            "lora": sum(lora) + sum(rest[_ATTENTION + 1 :]),
        }

    def contains(self, f: StepFeatures) -> bool:
        """Whether every bounded feature lies inside what was measured."""
        return all(self.low[k] <= getattr(f, k) <= self.high[k] for k in self.low)


@dataclass(frozen=True, slots=True)
class Predictor:
    """Predicts a step's device and host seconds; `graph_sizes` is empty where nothing is replayed as a graph.

    `regimes`: by name, `decode` and `mixed` (captured) and `eager` (not); the latter is always there.
    """

    graph_sizes: tuple[int, ...]
    regimes: Mapping[str, Regime]

    def regime(self, f: StepFeatures) -> tuple[str, int]:
        """A step's regime, and the row count it is executed at."""
        if not self.graph_sizes or f.rows > self.graph_sizes[-1]:
            return "eager", f.rows
        return "decode" if f.decode_only else "mixed", self.graph_sizes[bisect_left(self.graph_sizes, f.rows)]

    def predict(self, f: StepFeatures) -> tuple[float, float, bool]:
        """(device_s, host_s, whether the step lies outside the measured range)."""
        name, size = self.regime(f)
        regime = self.regimes.get(name) or self.regimes["eager"]
        terms = regime.terms(f, size)
        device = sum(c * t for c, t in zip(regime.device, terms, strict=True))
        host = sum(c * t for c, t in zip(regime.host, host_terms(f), strict=True))
        return device, host, not regime.contains(f)

    def parts(self, f: StepFeatures) -> dict[str, float]:
        """Device seconds by what causes them (`Regime.parts`)."""
        name, size = self.regime(f)
        return (self.regimes.get(name) or self.regimes["eager"]).parts(f, size)

    def to_json(self) -> dict[str, object]:
        """Plain data for `profile.json`."""
        regimes = {k: {f.name: getattr(r, f.name) for f in fields(Regime)} for k, r in self.regimes.items()}
        return {"graph_sizes": list(self.graph_sizes), "regimes": regimes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Predictor:
        """Read what `to_json` wrote. Raises KeyError or TypeError for anything else."""
        regimes = {
            name: Regime(
                tuple(r["knots"]), tuple(r["lora_knots"]), tuple(r["device"]), tuple(r["host"]), r["low"], r["high"]
            )
            for name, r in data["regimes"].items()
        }
        return cls(tuple(data["graph_sizes"]), regimes)


def _nonnegative(
    matrix: FloatArray, target: FloatArray, weight: FloatArray, fixed: Mapping[int, float]
) -> tuple[float, ...]:
    """Coefficients >= 0 of the least relative error; `fixed` ones are given, by column."""
    from scipy.optimize import nnls

    given = np.zeros(matrix.shape[1])
    given[list(fixed)] = list(fixed.values())
    rest = np.maximum(target - matrix @ given, 0.0)
    free = np.array([i not in fixed for i in range(matrix.shape[1])])
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
    solution, _ = nnls((matrix / scale * weight[:, None])[:, free], rest * weight, maxiter=100 * matrix.shape[1])
    given[free] = solution / scale[free]
    return tuple(given.tolist())


def fit_regime(
    steps: Sequence[StepFeatures],
    sizes: Sequence[int],
    device_s: FloatArray,
    host_s: FloatArray,
    knots: Sequence[float],
    lora_knots: Sequence[float],
    seconds_per_key: float | None = None,
) -> Regime:
    """Fit one regime to measured steps; relative errors of the whole step weigh alike.

    `seconds_per_key`: what reading one cached key costs, for sparse tables in which contexts do not vary: it is taken as
    given, and only terms that such a table can tell apart are fitted.
    """
    ranges = {k: [float(getattr(f, k)) for f in steps] for k in _BOUNDED}
    low = {k: min(v) for k, v in ranges.items()}
    high = {k: max(v) for k, v in ranges.items()}
    empty = Regime(tuple(knots), tuple(lora_knots), (), (), low, high)
    matrix = np.array([empty.terms(f, size) for f, size in zip(steps, sizes, strict=True)])
    weight = 1.0 / (device_s + host_s)
    first = len(knots) + len(lora_knots)
    no_cost: dict[int, float] = {}
    if seconds_per_key is not None:
        no_cost = {first + i: 0.0 for i, name in enumerate(_TERMS) if name not in _LEAN}
    keys = {first: seconds_per_key} if seconds_per_key is not None else {}
    device = _nonnegative(matrix, device_s, weight, no_cost | keys)
    host = _nonnegative(np.array([host_terms(f) for f in steps]), host_s, weight, {})
    return replace(empty, device=device, host=host)


def fit_predictor(
    steps: Sequence[StepFeatures],
    device_s: FloatArray,
    host_s: FloatArray,
    graph_sizes: Sequence[int],
    seconds_per_key: float | None = None,
) -> Predictor:
    """Fit every regime there are steps of; knots are the row counts of its base-only steps (`fit_regime`)."""
    placing = Predictor(tuple(graph_sizes), {})
    placed = [placing.regime(f) for f in steps]
    regimes: dict[str, Regime] = {}
    for name in ("decode", "mixed", "eager"):
        chosen = [i for i, (regime, _) in enumerate(placed) if regime == name]
        if not chosen:
            continue
        sizes = [placed[i][1] for i in chosen]
        base_only = sorted({placed[i][1] for i in chosen if not steps[i].active_adapters})
        if not base_only:
            raise BackendError(f"a profile needs measured {name} steps without adapters beside those with")
        if name == "eager":
            knots = _thinned([min(sizes), *base_only])
        else:
            knots = sorted({*base_only, *(size for size, count in Counter(sizes).items() if count >= _ENOUGH)})
        regimes[name] = fit_regime(
            [steps[i] for i in chosen],
            sizes,
            device_s[chosen],
            host_s[chosen],
            knots,
            _thinned(base_only),
            seconds_per_key,
        )
    if "eager" not in regimes:
        raise BackendError("a profile needs measured steps beyond the captured sizes")
    return Predictor(tuple(graph_sizes), regimes)


def _thinned(rows: Sequence[int]) -> list[int]:
    """Knots at least a factor 1.3 apart."""
    kept: list[int] = []
    for value in rows:
        if not kept or value >= 1.3 * kept[-1] or value == rows[-1]:
            kept.append(value)
    return kept
