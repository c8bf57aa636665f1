"""Step times from measured ones: additive where the physics is, with the staircase of captured graph sizes.

A step costs base (by rows) + attention (by keys read) + LoRA (by adapters, ranks, rows); every term's
coefficient is >= 0, fitted by non-negative least squares on relative error (Lawson & Hanson; scipy).
Pure decodes, other captured steps, captured steps of more than `LONG_ROWS` rows, and larger steps launched one kernel at
a time are four regimes, fitted apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from backend.features import FILLING_DECODES, SPLIT_DECODES, StepFeatures
from backend.heat import UNKNOWN, Heat, HeatCurve
from backend.profile_values import Values

FloatArray = npt.NDArray[np.float64]

BOUNDED = ("rows", "kv_tokens", "max_kv", "prefill_keys", "active_adapters", "rank_sum", "row_rank")

REGIMES = ("decode", "mixed", "long", "eager")

TERMS = (
    "kv_tokens", "kv_tail", "prefill_keys", "prefill_tail",
    "requests", "active_adapters", "rank_sum", "max_rank", "lora_tiles", "row_rank", "idle_slots",
    "slot_tiles", "wide_adapters", "prompt_rows", "rank_rows", "both_kinds",
)  # fmt: skip
"""The terms after the two hats, in the order of `Regime.terms`; attention's come first."""

GRID_ROWS = 64
"""Rows of a step that one block of vLLM's LoRA expand takes (`block_m`): each slot has blocks for all rows, used or not."""

WIDE_ROWS = 128
"""From so many rows on vLLM's LoRA shrink splits its sums 8 times instead of 64 (`get_lora_op_configs`): adapters cost less."""

LONG_ROWS = 1024
"""Captured steps of more rows are a regime of their own."""

BANDS = (8, 16, 32, 64, 128, 256, 512)
"""Rows up to which steps have the same LoRA kernels, or all but (`sgmv/base_linear.py`, `sgmv/tilings.py`), and beyond the last: what
adapters cost jumps between them."""

BAND_TERMS = ("active_adapters", "rank_sum", "row_rank", "padded_ranks")
"""The terms that bands have each for themselves, beside those of all; the last one is what ranks add up to if all are the highest, for a
launch waits for its slowest block."""

PADDED_ROWS = 64
"""Bands beyond have no `padded_ranks`: steps of so many rows are bound by others."""

_ATTENTION = 4

HOST_TERMS = 7
"""How many `host_terms` there are."""

HOST_STEP, HOST_AFTER_PROMPTS, HOST_REQUESTS = 0, 2, 3
"""Where in `host_terms` the step itself, whether it follows one with prompts, and its requests stand."""


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


def dot(coefficients: Sequence[float], terms: Sequence[float]) -> float:
    """Sum of products, one after the other: `sum` compensates its rounding in some versions of Python, the compiled replay does not."""
    total = 0.0
    for c, t in zip(coefficients, terms, strict=True):
        total += c * t
    return total


def band_terms(f: StepFeatures) -> tuple[int, ...]:
    """What the coefficients of a band multiply."""
    return f.active_adapters, f.rank_sum, f.row_rank, f.max_rank * f.active_adapters


def host_terms(f: StepFeatures) -> list[float]:
    """What the host's seconds of a step depend on: the step, whether it has adapters or follows one with prompts, its sizes, the queue."""
    flags = (1.0, 1.0 if f.active_adapters else 0.0, 1.0 if f.after_prompts else 0.0)
    return [*flags, f.requests, f.active_adapters, f.rows, f.skipped]


@dataclass(frozen=True, slots=True)
class Regime:
    """One regime's fit: knots over rows, coefficients for device and host seconds, and the measured range.

    `knots`: of the base model; `lora_knots`: of what LoRA costs at all, where steps with and without it were measured;
    `lora_rows`: rows that LoRA kernels take together, whole or not; `heat`: by what share of itself a step takes longer for each unit of
    heat (`backend/heat.py`): what the fit says of the device is of a rested one; `bands`: coefficients of `BAND_TERMS`, band by band
    (none: the kernels are not ours);
    `launch`: seconds in which the host launches the kernels one by one; the device works beside it, and the longer counts.
    """

    knots: tuple[float, ...]
    lora_knots: tuple[float, ...]
    device: tuple[float, ...]
    host: tuple[float, ...]
    low: Mapping[str, float]
    high: Mapping[str, float]
    launch: tuple[float, ...] = ()
    lora_rows: int = 1
    heat: float = 0.0
    bands: tuple[float, ...] = ()

    def device_s(self, f: StepFeatures, size: int) -> float:
        """Seconds of the device, a rested one; `size` is the row count the step is executed at."""
        return dot(self.device, self.terms(f, size)) + self._band_s(f, size)

    def _band_s(self, f: StepFeatures, size: int) -> float:
        if not (self.bands and f.active_adapters):
            return 0.0
        first = bisect_left(BANDS, size) * len(BAND_TERMS)
        return dot(self.bands[first : first + len(BAND_TERMS)], band_terms(f))

    def terms(self, f: StepFeatures, size: int) -> list[float]:
        """The features that coefficients multiply; `size` is the row count the step is executed at."""
        tiles = -(-size // self.lora_rows) * self.lora_rows
        lora = hat(tiles, self.lora_knots) if f.active_adapters else [0.0] * len(self.lora_knots)
        # With too few decodes to fill the memory's bandwidth but too many to split their keys, some of it idles until the longest ends.
        idle = max(0, FILLING_DECODES - f.decodes) * f.max_kv if f.decodes > SPLIT_DECODES else 0
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
            f.idle_slots,
            (f.idle_slots + f.active_adapters) * -(-size // GRID_ROWS),
            f.active_adapters if size >= WIDE_ROWS else 0,
            f.rows - f.decodes if f.active_adapters else 0,
            f.max_rank * f.rows,
            1 if f.decodes and not f.decode_only else 0,
        ]

    def parts(self, f: StepFeatures, size: int) -> dict[str, float]:
        """Device seconds by what causes them: `base` model, `attention`, `lora`; they add up to the whole."""
        products = [c * t for c, t in zip(self.device, self.terms(f, size), strict=True)]
        base, lora, rest = (
            products[: len(self.knots)],
            products[len(self.knots) : -len(TERMS)],
            products[-len(TERMS) :],
        )
        return {
            "base": sum(base) + rest[_ATTENTION],
            "attention": sum(rest[:_ATTENTION]) + rest[-1],
            "lora": sum(lora) + sum(rest[_ATTENTION + 1 : -1]) + self._band_s(f, size),
        }

    def contains(self, f: StepFeatures) -> bool:
        """Whether every bounded feature lies inside what was measured."""
        return all(self.low[k] <= getattr(f, k) <= self.high[k] for k in self.low)


@dataclass(frozen=True, slots=True)
class Predictor:
    """Predicts a step's device and host seconds; `graph_sizes` is empty where nothing is replayed as a graph.

    `regimes`: by name, `decode`, `mixed` and `long` (captured) and `eager` (not); the latter is always there. `heat`: what is known
    of how steps heat those after them (`backend/heat.py`).
    """

    graph_sizes: tuple[int, ...]
    regimes: Mapping[str, Regime]
    heat: HeatCurve = UNKNOWN

    def regime(self, f: StepFeatures) -> tuple[str, int]:
        """A step's regime, and the row count it is executed at."""
        if not self.graph_sizes or f.rows > self.graph_sizes[-1]:
            return "eager", f.rows
        size = self.graph_sizes[bisect_left(self.graph_sizes, f.rows)]
        return "decode" if f.decode_only else "long" if size > LONG_ROWS else "mixed", size

    def _fitted(self, name: str) -> Regime:
        """The regime that stands for `name`: profiles of engines whose steps did not tell it apart lack some."""
        spare = self.regimes.get("mixed") if name == "long" else None
        return self.regimes.get(name) or spare or self.regimes["eager"]

    def predict(self, f: StepFeatures, heat: Heat | None = None, idle_s: float = 0.0) -> tuple[float, float, bool]:
        """(device_s, host_s, whether the step lies outside the measured range), on a rested device.

        With `heat`: on a device of that heat, after `idle_s` without a step; it is left as the step leaves it.
        """
        regime, device, host = self._rested(f)
        if heat is not None:
            device = heat.step(device, regime.heat, f.rows, idle_s + host)
        return device, host, not regime.contains(f)

    def predict_lasting(self, f: StepFeatures) -> tuple[float, float, bool]:
        """The same of a step that follows on itself for good, as decodes do."""
        regime, device, host = self._rested(f)
        return self.heat.lasting_s(device, regime.heat, f.rows), host, not regime.contains(f)

    def _rested(self, f: StepFeatures) -> tuple[Regime, float, float]:
        regime, device, launch, host = self.split(f)
        return regime, max(device, launch) if regime.launch else device, host

    def new_heat(self) -> Heat | None:
        """The heat of a rested device; None where nothing is known of it."""
        return Heat(self.heat) if self.heat.tau_s else None

    def split(self, f: StepFeatures) -> tuple[Regime, float, float, float]:
        """The step's regime, and the seconds of its kernels, of the launches beside them (0: not known), and of the host's rest."""
        name, size = self.regime(f)
        regime = self._fitted(name)
        terms = host_terms(f)
        launch = dot(regime.launch, terms) if regime.launch else 0.0
        return regime, regime.device_s(f, size), launch, dot(regime.host, terms)

    def parts(self, f: StepFeatures) -> dict[str, float]:
        """Device seconds by what causes them (`Regime.parts`)."""
        name, size = self.regime(f)
        return self._fitted(name).parts(f, size)

    def to_json(self) -> dict[str, object]:
        """Plain data for `profile.json`."""
        regimes = {k: {f.name: getattr(r, f.name) for f in fields(Regime)} for k, r in self.regimes.items()}
        return {"graph_sizes": list(self.graph_sizes), "heat": asdict(self.heat), "regimes": regimes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Predictor:
        """Read what `to_json` wrote. Raises `ValueError` naming the key for anything else."""
        values = Values(data, "predictor.")
        sizes, regimes = values.numbers("graph_sizes", rising=True), values.table("regimes")
        if any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"predictor.graph_sizes is {list(sizes)}, must be whole numbers >= 1")
        unknown = set(regimes.data) - set(REGIMES)
        if unknown or REGIMES[-1] not in regimes.data:
            raise ValueError(
                f"predictor.regimes has {', '.join(regimes.data)}, must have {REGIMES[-1]}, of {', '.join(REGIMES)}"
            )
        heat = _heat_curve(values)
        return cls(tuple(map(int, sizes)), {name: _regime(regimes.table(name)) for name in regimes.data}, heat)


def _bands(values: Values) -> tuple[float, ...]:
    count = (len(BANDS) + 1) * len(BAND_TERMS)
    given = values.numbers("bands", most=count) if "bands" in values.data else ()
    return values.numbers("bands", least=count) if given else ()


def _heat_curve(predictor: Values) -> HeatCurve:
    """What a predictor's file says of heat; those of before say nothing. Raises `ValueError` naming the key that is wrong."""
    if "heat" not in predictor.data:
        return UNKNOWN
    values = predictor.table("heat")
    return HeatCurve(values.number("tau_s", least=0), values.number("spare", least=0))


def _regime(values: Values) -> Regime:
    knots, lora_knots = (
        values.numbers("knots", least=1, rising=True),
        values.numbers("lora_knots", least=1, rising=True),
    )
    # Profiles from before vLLM's grids were terms: nothing was fitted to them.
    every = len(knots) + len(lora_knots) + len(TERMS)
    device = values.numbers("device", least=len(knots) + len(lora_knots), most=every)
    host, launch = values.numbers("host", least=1, most=HOST_TERMS), values.numbers("launch", most=HOST_TERMS)
    low, high = ({key: bounds.number(key) for key in BOUNDED} for bounds in (values.table("low"), values.table("high")))
    return Regime(
        knots=knots,
        lora_knots=lora_knots,
        device=device + (0.0,) * (every - len(device)),
        host=host + (0.0,) * (HOST_TERMS - len(host)),
        low=low,
        high=high,
        launch=launch + (0.0,) * (HOST_TERMS - len(launch) if launch else 0),
        lora_rows=values.whole("lora_rows", least=1),
        heat=values.number("heat", least=0) if "heat" in values.data else 0.0,
        bands=_bands(values),
    )
