"""Cost curves: what a decode step, and a million tokens, cost with N distinct adapters in the batch.

Base plus N deltas, on one engine, against N full copies of the model, each on a GPU of its own with its share of the
requests. From a profile's predictor, beside the points that were measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from backend.base import NO_SLOT, StepBatch
from backend.features import StepFeatures
from backend.fitting import with_features
from backend.geometry import ModelGeometry, floor_bytes, load_geometry
from backend.profile import Profile, load_profile, measured_steps
from sim.errors import ScenarioError

FloatArray = npt.NDArray[np.float64]
DEFAULT_ADAPTERS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


def decode_features(batch: int, adapters: int, rank: int, context: int) -> StepFeatures:
    """A decode of `batch` requests with `context` keys each, spread evenly over `adapters` of `rank` (0: base only)."""
    slots = tuple(i % adapters if adapters else NO_SLOT for i in range(batch))
    step = StepBatch((1,) * batch, (context,) * batch, slots, (True,) * batch)
    return StepFeatures.of(step, dict.fromkeys(range(adapters), rank))


def curve(
    profiles: Iterable[str],
    batches: Sequence[int],
    ranks: Sequence[int],
    *,
    context: int = 512,
    adapters: Sequence[int] = DEFAULT_ADAPTERS,
    max_lora_rank: int | None = None,
    gpu_hour_usd: float | None = None,
    bandwidth_gb_s: float | None = None,
) -> pd.DataFrame:
    """One row per profile, batch, rank and number of distinct adapters up to the batch.

    `step_ms` = `base_ms` + `attention_ms` + `lora_ms` + `host_ms`; `padded_step_ms`: the same with every adapter padded to
    `max_lora_rank` (empty where the profile knows one rank only); `copies_ms`: a token for every request from full copies, one copy after the other; `floor_ms`:
    `floor_bytes` at `bandwidth_gb_s`; `gpu_s_per_mtok`, `copies_gpu_s_per_mtok`: GPU seconds per million output tokens of
    the deltas, and of full copies; `usd_per_mtok`, `copies_usd_per_mtok` at `gpu_hour_usd`; `extrapolated`: outside what
    the profile measured. Columns without their input are empty.
    """
    check_curve(batches, ranks, context, max_lora_rank)
    rows = []
    for name in profiles:
        profile = load_profile(name)
        geometry = load_geometry(str(profile.meta["geometry"]))
        for batch in batches:
            for rank in ranks:
                for count in sorted({n for n in adapters if n <= batch} | {0}):
                    point = _Point(profile, geometry, batch, rank, count, context)
                    rows.append({"profile": name, **point.row(max_lora_rank, gpu_hour_usd, bandwidth_gb_s)})
    return pd.DataFrame(rows)


def check_curve(batches: Sequence[int], ranks: Sequence[int], context: int, max_lora_rank: int | None) -> None:
    """Raise `ScenarioError` for what no curve can be of."""
    if min(batches) < 1 or context < 1:
        raise ScenarioError("a curve needs batches >= 1 and context >= 1")
    for rank in (*ranks, *(() if max_lora_rank is None else (max_lora_rank,))):
        if not (8 <= rank <= 256 and rank % 8 == 0):
            raise ScenarioError(f"a rank is {rank}, must be a multiple of 8 from 8 to 256")
    if max_lora_rank is not None and max_lora_rank < max(ranks):
        raise ScenarioError(f"--max-lora-rank is {max_lora_rank}, an adapter's rank is {max(ranks)}: nothing to pad")


@dataclass(frozen=True, slots=True)
class _Point:
    profile: Profile
    geometry: ModelGeometry
    batch: int
    rank: int
    adapters: int
    context: int

    def step_s(self, batch: int, adapters: int, rank: int) -> float:
        features = decode_features(batch, adapters, rank, self.context)
        device, host, _ = self.profile.predictor.predict_lasting(features)
        return device + host

    def row(
        self, max_lora_rank: int | None, gpu_hour_usd: float | None, bandwidth_gb_s: float | None
    ) -> dict[str, object]:
        features = decode_features(self.batch, self.adapters, self.rank, self.context)
        device, host, outside = self.profile.predictor.predict_lasting(features)
        parts = self.profile.predictor.parts(features)
        longer = device / sum(parts.values())  # than on a rested GPU, all parts alike
        # A profile made of another engine's logs knows one rank, and nothing of what others would cost.
        known = self.profile.meta.get("rank")
        padded = None
        if max_lora_rank is not None and known in (None, max_lora_rank):
            padded = 1e3 * self.step_s(self.batch, self.adapters, max_lora_rank)
        outside |= self.adapters > 0 and known not in (None, self.rank)
        floor = floor_bytes(self.geometry, self.batch, self.adapters, self.rank, self.context)
        row: dict[str, object] = {
            "batch": self.batch, "rank": self.rank, "adapters": self.adapters, "context": self.context,
            "step_ms": 1e3 * (device + host), **{f"{key}_ms": 1e3 * longer * value for key, value in parts.items()},
            "host_ms": 1e3 * host, "padded_step_ms": padded, "copies_ms": 1e3 * self._copies_s(),
            "floor_ms": None if bandwidth_gb_s is None else floor / bandwidth_gb_s / 1e6, "extrapolated": outside,
        }  # fmt: skip
        return row | prices(row, gpu_hour_usd)

    def _copies_s(self) -> float:
        """GPU seconds of one token for every request of the batch, from as many full copies as there are adapters."""
        shares = copy_shares(self.batch, self.adapters)
        return sum(count * self.step_s(size, 0, self.rank) for count, size in shares)


def prices(row: Mapping[str, object], gpu_hour_usd: float | None) -> dict[str, float | None]:
    """What a million output tokens cost by a curve's row: GPU seconds, and USD at `gpu_hour_usd`.

    Of the step, and of full copies (`copies_`) and the loop over adapters (`loop_`) where the row has them.
    """
    priced: dict[str, float | None] = {}
    for prefix, column in (("", "step_ms"), ("copies_", "copies_ms"), ("loop_", "loop_step_ms")):
        if column in row:
            seconds = float(str(row[column])) * 1e3 / int(str(row["batch"]))
            priced[f"{prefix}gpu_s_per_mtok"] = seconds
            priced[f"{prefix}usd_per_mtok"] = None if gpu_hour_usd is None else seconds * gpu_hour_usd / 3600
    return priced


def copy_shares(batch: int, adapters: int) -> list[tuple[int, int]]:
    """(copies, requests of each) where as many full copies as adapters, at least one, share a batch."""
    copies = max(1, adapters)
    share, more = divmod(batch, copies)
    return [(count, size) for count, size in ((copies - more, share), (more, share + 1)) if count and size]


def measured_points(profile: str, batch: int, rank: int, context: int) -> pd.DataFrame:
    """The profile's own measurements nearest to a curve: `adapters`, `step_ms`. Empty if it has none."""
    file = measured_steps(profile)
    empty = pd.DataFrame({"adapters": [], "step_ms": []})
    if file is None:
        return empty
    steps = with_features(pd.read_parquet(file))
    steps = steps[steps["decode_only"] & (steps["requests"] == batch) & (steps["kind"] != "held_out")]
    same_rank = steps["rank_sum"] == rank * steps["active_adapters"]
    near = (steps["kv_tokens"] / batch).between(0.8 * context, 1.25 * context)
    chosen = steps[same_rank & near & (steps["lora_rows"].isin([0, batch]))]
    if chosen.empty:
        return empty
    points = chosen.groupby("active_adapters")["elapsed_s"].median() * 1e3
    return pd.DataFrame({"adapters": points.index.to_numpy(), "step_ms": points.to_numpy()})


@dataclass(frozen=True, slots=True)
class Shape:
    """A curve in three numbers: `step_ms`, what the first adapter costs; `knee`, up to where more cost nothing; `slope_ms`.

    `slope_ms` is what each adapter beyond the knee costs; `error`: greatest relative error of that description.
    """

    step_ms: float
    knee: float
    slope_ms: float
    error: float


def shape(adapters: FloatArray, step_ms: FloatArray) -> Shape:
    """Fit step, plateau and slope to a curve whose first point has no adapter. At least three points."""
    if len(adapters) < 3 or adapters[0] != 0:
        raise ScenarioError("the shape of a curve needs the point without adapters and two more")
    x, y = adapters[1:], step_ms[1:]
    best: Shape | None = None
    for knee in x:
        beyond = np.maximum(0.0, x - knee)
        matrix = np.stack([np.ones_like(x), beyond], 1) if beyond.any() else np.ones((len(x), 1))
        solution = np.linalg.lstsq(matrix, y, rcond=None)[0]
        plateau, slope = float(solution[0]), float(solution[1]) if len(solution) > 1 else 0.0
        error = float(np.abs(plateau + slope * beyond - y).max() / y.min())
        if best is None or error < best.error - 1e-12:
            best = Shape(plateau - float(step_ms[0]), float(knee), slope, error)
    assert best is not None
    return best


def described(group: pd.DataFrame, points: pd.DataFrame | None) -> str:
    """One curve's `shape` in words, with its error and how far `points`, the measured ones, lie from the curve at most."""
    if len(group) < 3:
        return ""
    x, y = group["adapters"].to_numpy(float), group["step_ms"].to_numpy(float)
    s = shape(x, y)
    text = (
        f"step {s.step_ms:.2f} ms, plateau to {s.knee:g}, then {1e3 * s.slope_ms:.0f} µs an adapter (fit ±{s.error:.1%}"
    )
    if points is not None and len(points):
        off = np.abs(np.interp(points["adapters"], x, y) / points["step_ms"] - 1).max()
        text += f"; measured points within {off:.1%}"
    return f"{text})"


def break_even(group: pd.DataFrame) -> str:
    """From which number of adapters on, of those in the curve, base plus N deltas cost less than N full copies."""
    cheaper = (group["gpu_s_per_mtok"] < group["copies_gpu_s_per_mtok"]).to_numpy()
    dearer = group["adapters"].to_numpy()[~cheaper]
    after = group["adapters"][group["adapters"] > (dearer.max() if len(dearer) else -1)]
    if after.empty:
        return "not cheaper than N full copies"
    return f"cheaper than N full copies from N = {after.iloc[0]} on"
