"""Cost curves: parts that add up, the price of deltas and copies by hand, a planted shape found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.geometry import floor_bytes, load_geometry
from backend.profile import load_profile
from sim.cli import main
from sim.curve import break_even, curve, decode_features, described, measured_points, shape
from sim.errors import ScenarioError

PROFILE = "h100-llama-3.1-8b"


def test_parts_add_up_to_the_step() -> None:
    table = curve([PROFILE], [1, 32, 128], [8, 64])
    parts = table[["base_ms", "attention_ms", "lora_ms", "host_ms"]].sum(axis=1)
    np.testing.assert_allclose(parts, table["step_ms"])
    assert (table.loc[table["adapters"] == 0, "lora_ms"] == 0).all()
    assert (table["adapters"] <= table["batch"]).all()
    assert table.groupby(["batch", "rank"])["step_ms"].apply(lambda s: s.is_monotonic_increasing).all()
    assert table[["padded_step_ms", "floor_ms", "usd_per_mtok"]].isna().all(axis=None)


def test_copies_pay_for_the_base_each() -> None:
    """Four copies with 8 requests each cost four base steps of 8; a GPU hour at 3.6 USD is a thousandth a second."""
    table = curve([PROFILE], [32], [16], adapters=[4], gpu_hour_usd=3.6, bandwidth_gb_s=3000.0, max_lora_rank=64)
    row = table[table["adapters"] == 4].iloc[0]
    predictor = load_profile(PROFILE).predictor
    alone = sum(predictor.predict(decode_features(8, 0, 16, 512))[:2])
    assert row["copies_gpu_s_per_mtok"] == pytest.approx(4 * alone / 32 * 1e6)
    assert row["gpu_s_per_mtok"] == pytest.approx(row["step_ms"] / 1e3 / 32 * 1e6)
    assert row["usd_per_mtok"] == pytest.approx(row["gpu_s_per_mtok"] / 1000)
    assert row["padded_step_ms"] > row["step_ms"]
    geometry = load_geometry("llama-3.1-8b")
    floor = floor_bytes(geometry, 32, 4, 16, 512)
    table = 128256 * 4096 * 2
    assert floor == geometry.weights_bytes - table + 32 * 513 * geometry.kv_bytes_per_token + 4 * geometry.lora_bytes(
        16
    )
    assert row["floor_ms"] == pytest.approx(floor / 3000e9 * 1e3)
    assert row["floor_ms"] < row["step_ms"]


def test_measured_points_lie_near_the_curve() -> None:
    """The curve is a fit to the profile's measurements: it passes by them."""
    points = measured_points(PROFILE, 32, 16, 512)
    assert len(points) >= 3
    table = curve([PROFILE], [32], [16], adapters=points["adapters"].astype(int).tolist())
    np.testing.assert_allclose(table["step_ms"], points["step_ms"], rtol=0.12)
    assert measured_points(PROFILE, 33, 16, 512).empty


@given(st.floats(0.1, 3), st.sampled_from([1, 2, 4, 8, 16]), st.floats(0.01, 0.5), st.floats(5, 20))
def test_a_planted_shape_is_found_again(step: float, knee: int, slope: float, base: float) -> None:
    x = np.array([0, 1, 2, 4, 8, 16, 32, 64], dtype=float)
    y = base + np.where(x > 0, step + slope * np.maximum(0, x - knee), 0)
    found = shape(x, y)
    assert found.step_ms == pytest.approx(step, abs=1e-6)
    assert found.knee == knee
    assert found.slope_ms == pytest.approx(slope, rel=1e-6)
    assert found.error < 1e-9


def test_a_planted_shape_is_found_in_noise() -> None:
    """Half a percent of noise: the slope comes back within 5 %, the step within 0.15 ms, and the error says how noisy it was."""
    x = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128], dtype=float)
    y = 8 + np.where(x > 0, 0.6 + 0.04 * np.maximum(0, x - 8), 0)
    for seed in range(20):
        found = shape(x, y * (1 + 0.005 * np.random.default_rng(seed).standard_normal(len(x))))
        assert found.slope_ms == pytest.approx(0.04, rel=0.05)
        assert found.step_ms == pytest.approx(0.6, abs=0.15)
        assert 0.0 < found.error < 0.02


def test_a_curve_in_words() -> None:
    table = pd.DataFrame({"adapters": [0, 1, 2, 4], "step_ms": [8.0, 9.0, 9.0, 11.0]})
    points = pd.DataFrame({"adapters": [1, 3], "step_ms": [9.0, 12.5]})
    assert described(table, points) == (
        "step 1.00 ms, plateau to 2, then 1000 µs an adapter (fit ±0.0%; measured points within 20.0%)"
    )
    copies = table.assign(gpu_s_per_mtok=[2, 2, 2, 2], copies_gpu_s_per_mtok=[2, 1, 3, 4])
    assert break_even(copies) == "cheaper than N full copies from N = 2 on"
    assert break_even(copies.head(2)) == "not cheaper than N full copies"


def test_a_shape_needs_points() -> None:
    with pytest.raises(ScenarioError, match="point without adapters and two more"):
        shape(np.array([1.0, 2.0, 3.0]), np.ones(3))


def test_a_profile_of_one_rank_says_nothing_of_others() -> None:
    table = curve(["vllm-0.24-h100-llama-3.1-8b"], [32], [16, 32], adapters=[0, 8], max_lora_rank=64)
    assert table["padded_step_ms"].isna().all()
    assert table["extrapolated"].tolist() == [False, False, False, True]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["curve", "--profile", PROFILE, "--batch", "32", "--rank", "16", "--gpu-hour-usd", "2"]
    assert main([*argv, "--out", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "usd_per_mtok" in printed[0]
    assert printed[-1] == str(tmp_path / "c")
    assert printed[-2].startswith(f"{PROFILE}, 32 requests, rank 16: step 0.")
    assert printed[-2].endswith("cheaper than N full copies from N = 2 on")
    assert len(pd.read_parquet(tmp_path / "c" / "curve.parquet")) == 7
    assert (tmp_path / "c" / "curve.png").stat().st_size > 20_000
    for more, says in (
        (["--batch", "0"], "batches >= 1"),
        (["--rank", "9"], "a rank is 9, must be a multiple of 8"),
        (["--gpu-hour-usd", "-1"], "--gpu-hour-usd is -1.0, must be finite and > 0"),
        (["--profile", "none"], "profile none: neither"),
    ):
        assert main([*argv, *more, "--out", str(tmp_path / "d")]) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "d").exists()
