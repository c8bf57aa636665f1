"""Moves of adapters: curves go through what was measured, never fall, and go on as latency and bandwidth say."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.fitting import load_curve
from backend.profile import LoadCurve, load_profile, measured_steps, shipped_profiles

CURVE = LoadCurve(0.001, 1e9, ((1e6, 0.010), (3e6, 0.012)))


def test_a_curve_runs_straight_between_its_points_and_parallel_to_its_trend_beyond() -> None:
    assert CURVE.seconds(1_000_000) == 0.010
    assert CURVE.seconds(2_000_000) == pytest.approx(0.011)
    assert CURVE.seconds(3_000_000) == 0.012
    assert CURVE.seconds(5_000_000) == pytest.approx(0.012 + 2e6 / 1e9)
    assert CURVE.seconds(500_000) == pytest.approx(0.010 - 5e5 / 1e9)
    assert LoadCurve(0.001, 1e9, ((1e9, 0.5),)).seconds(0) == 0  # not before it began
    assert LoadCurve(0.001, 1e9).seconds(2_000_000) == pytest.approx(0.003)


def test_points_rise() -> None:
    for points in (((2.0, 1.0), (2.0, 1.0)), ((1.0, 1.0), (2.0, 0.5))):
        with pytest.raises(ValueError, match="rising bytes, and seconds that do not fall"):
            LoadCurve(0.0, 1.0, points)


def test_a_fit_goes_through_the_means_and_evens_out_what_falls() -> None:
    moves = pd.DataFrame({"kind": "stage", "nbytes": [10, 10, 20, 40], "elapsed_s": [1.0, 3.0, 1.0, 5.0]})
    curve = load_curve(pd.concat([moves, moves.assign(kind="load", elapsed_s=9.0)]), "stage")
    assert [curve.seconds(n) for n in (10, 20, 40)] == [1.5, 1.5, 5.0]


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=6), st.lists(st.integers(0, 2000), min_size=2, max_size=2))
def test_more_bytes_never_take_less(seconds: list[float], sizes: list[int]) -> None:
    moves = pd.DataFrame({"kind": "load", "nbytes": [100 * (i + 1) for i in range(len(seconds))], "elapsed_s": seconds})
    curve = load_curve(moves, "load")
    few, many = sorted(sizes)
    assert 0 <= curve.seconds(few) <= curve.seconds(many) + 1e-12


@pytest.mark.parametrize("name", [name for name in shipped_profiles() if not name.startswith("vllm")])
@pytest.mark.parametrize("kind", ["stage", "load"])
def test_shipped_curves_are_what_was_measured(name: str, kind: str) -> None:
    steps = measured_steps(name)
    assert steps is not None
    moves = pd.read_parquet(steps.with_name("loads.parquet")).query("kind == @kind")
    curve = getattr(load_profile(name), kind)
    means = moves.groupby("nbytes")["elapsed_s"].mean()
    for nbytes, mean in means.items():
        assert curve.seconds(nbytes) == pytest.approx(mean, rel=0.08)
    assert sum(curve.seconds(n) for n in means.index) == pytest.approx(means.sum())
