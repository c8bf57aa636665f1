"""Fit a predictor to measured steps: each regime by non-negative least squares on relative error (Lawson & Hanson; scipy)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from backend.errors import BackendError
from backend.features import StepFeatures
from backend.predictor import (
    BAND_TERMS,
    BANDS,
    BOUNDED,
    PADDED_ROWS,
    REGIMES,
    TERMS,
    FloatArray,
    Predictor,
    Regime,
    band_terms,
    hat,
    host_terms,
)

_LEAN = frozenset({"prefill_keys", "active_adapters", "wide_adapters"})
"""Those that a sparse table, of one rank and one context, can tell apart."""

_GRIDS = frozenset({"slot_tiles", "wide_adapters", "prompt_rows"})
"""Those of vLLM's LoRA kernels alone, which are not fitted to single steps of other engines."""

WAITED_S = 0.005
"""A step whose device was waited for longer than this after the launches was bound by the device."""

_ENOUGH = 3
"""Measured steps of a captured size that give it a knot of its own: base products do not cost what their neighbours' say."""


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


@dataclass(frozen=True, slots=True)
class Engine:
    """What is known of an engine whose steps are fitted.

    `seconds_per_key`: what reading one cached key costs, for sparse tables in which contexts do not vary: it is taken as
    given, and only terms that such a table can tell apart are fitted. `lora_rows`: see `Regime`. `seconds_per_slot_tile`: what the
    blocks of a slot take in all LoRA kernels for 64 rows, measured apart: a table of one `max_loras` does not tell. `bands`: its LoRA kernels
    are ours, which differ by the rows of a step (`predictor.BANDS`).
    """

    graph_sizes: tuple[int, ...]
    seconds_per_key: float | None = None
    lora_rows: int = 1
    seconds_per_slot_tile: float = 0.0
    bands: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """Measured steps and their seconds; of `host_s`, `launch_s` went into launches (0: not known)."""

    steps: tuple[StepFeatures, ...]
    device_s: FloatArray
    host_s: FloatArray
    launch_s: FloatArray

    def at(self, chosen: Sequence[int]) -> Measured:
        """Those at the positions `chosen`."""
        index = np.array(chosen, dtype=int)
        return Measured(
            tuple(self.steps[i] for i in chosen), self.device_s[index], self.host_s[index], self.launch_s[index]
        )


def fit_regime(
    measured: Measured, sizes: Sequence[int], knots: Sequence[int], lora_knots: Sequence[int], engine: Engine
) -> Regime:
    """Fit one regime to measured steps; relative errors of the whole step weigh alike."""
    steps = measured.steps
    ranges = {k: [float(getattr(f, k)) for f in steps] for k in BOUNDED}
    low = {k: min(v) for k, v in ranges.items()}
    high = {k: max(v) for k, v in ranges.items()}
    empty = Regime(tuple(knots), tuple(lora_knots), (), (), low, high, (), engine.lora_rows)
    matrix = np.array([empty.terms(f, size) for f, size in zip(steps, sizes, strict=True)])
    weight = 1.0 / (measured.device_s + measured.host_s)
    first = len(knots) + len(lora_knots)
    each, wide = (first + TERMS.index(name) for name in ("active_adapters", "wide_adapters"))
    given = {first + i: 0.0 for i, name in enumerate(TERMS) if name in _GRIDS}
    if engine.seconds_per_key is not None:
        given = {first + i: 0.0 for i, name in enumerate(TERMS) if name not in _LEAN}
        given[first] = engine.seconds_per_key
        # An adapter of a wide step costs no less than nothing, but less than one of a narrow step: two columns, then a difference.
        matrix[:, each] -= matrix[:, wide]
    given[first + TERMS.index("slot_tiles")] = engine.seconds_per_slot_tile
    width = matrix.shape[1]
    if engine.bands:
        matrix = np.hstack([matrix, _band_columns(steps, sizes)])
        padded = range(width + len(BAND_TERMS) * (1 + BANDS.index(PADDED_ROWS)), matrix.shape[1])
        given |= {i: 0.0 for i in padded if (i - width) % len(BAND_TERMS) == BAND_TERMS.index("padded_ranks")}
    fitted = _nonnegative(matrix, measured.device_s, weight, given)
    device = list(fitted[:width])
    if engine.seconds_per_key is not None:
        device[wide] -= device[each]
    return replace(empty, device=tuple(device), host=fit_host(steps, measured.host_s, weight), bands=fitted[width:])


def _band_columns(steps: Sequence[StepFeatures], sizes: Sequence[int]) -> FloatArray:
    """The terms of each step in the columns of its band."""
    columns = np.zeros((len(steps), len(BANDS) + 1, len(BAND_TERMS)))
    for i, (f, size) in enumerate(zip(steps, sizes, strict=True)):
        columns[i, bisect_left(BANDS, size)] = band_terms(f)
    return columns.reshape(len(steps), -1)


def fit_host(steps: Sequence[StepFeatures], seconds: FloatArray, weight: FloatArray) -> tuple[float, ...]:
    """Coefficients of `host_terms`."""
    return _nonnegative(np.array([host_terms(f) for f in steps]), seconds, weight, {})


def fit_predictor(measured: Measured, engine: Engine, online: Measured | None = None) -> Predictor:
    """Fit every regime there are steps of; knots are the row counts of its base-only steps (`fit_regime`).

    `online`: steps of a running engine, whose larger ones say what the device takes where it was waited for.
    """
    placing = Predictor(engine.graph_sizes, {})
    placed = [placing.regime(f) for f in measured.steps]
    if all(f.active_adapters for f, (name, _) in zip(measured.steps, placed, strict=True) if name == "long"):
        placed = [("mixed" if name == "long" else name, size) for name, size in placed]  # too few to be told apart
    regimes: dict[str, Regime] = {}
    for name in REGIMES:
        chosen = [i for i, (regime, _) in enumerate(placed) if regime == name]
        if not chosen:
            continue
        part, sizes = measured.at(chosen), [placed[i][1] for i in chosen]
        base_only = _base_only(part, sizes)
        if not base_only:
            raise BackendError(f"a profile needs measured {name} steps without adapters beside those with")
        if name == "eager":
            large = None if online is None else _eager(online, placing)
            regimes[name] = _fit_eager(part, _largest_captured(measured, placed, engine), engine, large)
        else:
            knots = sorted({*base_only, *(size for size, count in Counter(sizes).items() if count >= _ENOUGH)})
            regimes[name] = fit_regime(part, sizes, knots, _thinned(base_only), engine)
    if "eager" not in regimes:
        raise BackendError("a profile needs measured steps beyond the captured sizes")
    return Predictor(engine.graph_sizes, regimes)


def _base_only(part: Measured, sizes: Sequence[int]) -> list[int]:
    return sorted({size for size, f in zip(sizes, part.steps, strict=True) if not f.active_adapters})


def _largest_captured(measured: Measured, placed: Sequence[tuple[str, int]], engine: Engine) -> Measured:
    """The steps that were executed at the largest captured size: the same kernels as in larger steps."""
    return measured.at(
        [i for i, (name, size) in enumerate(placed) if name != "eager" and size == engine.graph_sizes[-1]]
    )


def _eager(measured: Measured, placing: Predictor) -> Measured:
    """The steps launched kernel by kernel whose launches were timed."""
    timed = measured.launch_s > 0
    return measured.at([i for i, f in enumerate(measured.steps) if timed[i] and placing.regime(f)[0] == "eager"])


def _fit_eager(part: Measured, captured: Measured, engine: Engine, online: Measured | None) -> Regime:
    """Steps launched kernel by kernel. Where launches were timed, a step whose device was waited for says what the device takes,
    any other what the launches take; the device's share of the smaller ones lies between `captured` and those waited for.
    """
    if not part.launch_s.any():
        sizes = [f.rows for f in part.steps]
        base_only = _base_only(part, sizes)
        return fit_regime(part, sizes, _thinned(sorted({min(sizes), *base_only})), _thinned(base_only), engine)
    waited = [part.at(np.flatnonzero(part.device_s > WAITED_S).tolist())]
    if online is not None:
        waited.append(online.at(np.flatnonzero(online.device_s > WAITED_S).tolist()))
    steps = (*captured.steps, *(f for slow in waited for f in slow.steps))
    device_s = np.concatenate([captured.device_s, *(slow.launch_s + slow.device_s for slow in waited)])
    sizes = [f.rows for f in steps]
    joined = Measured(steps, device_s, np.zeros(len(steps)), np.zeros(len(steps)))
    plain = _thinned(_base_only(joined, sizes))
    adapted = sorted({f.rows for f in steps if f.active_adapters})
    fast = part.at(np.flatnonzero(part.device_s <= WAITED_S).tolist())
    if not plain or not fast.steps:
        raise BackendError(
            "a profile from launches needs larger steps without adapters that the device bounds, and some that it does not"
        )
    # Online steps come at any row count: what LoRA costs then has the base's knots, those that steps with adapters lie around.
    around = [k for i, k in enumerate(plain) if any(hat(rows, plain)[i] > 0 for rows in adapted)]
    lora = around if online is not None and len(waited[1].steps) else _thinned(adapted)
    regime = fit_regime(joined, sizes, plain, lora or plain, engine)
    host_s = part.host_s - part.launch_s
    known = (*part.steps, *(() if online is None else online.steps))
    return replace(
        regime,
        host=fit_host(part.steps, host_s, 1.0 / (part.device_s + part.host_s)),
        launch=fit_host(fast.steps, fast.launch_s + fast.device_s, 1.0 / (fast.device_s + fast.host_s)),
        high={key: float(max(getattr(f, key) for f in known)) for key in BOUNDED},
    )


def _thinned(rows: Sequence[int]) -> list[int]:
    """Knots at least a factor 1.3 apart."""
    kept: list[int] = []
    for value in rows:
        if not kept or value >= 1.3 * kept[-1] or value == rows[-1]:
            kept.append(value)
    return kept
