"""Measured parts: what `curve --live` measures, and a curve from a table of points, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from backend.geometry import floor_bytes, load_geometry
from backend.parts import measure_points
from sim.cli import main
from sim.curve_points import load_points, points_curve
from sim.errors import ScenarioError

FACTS = {"geometry": "tiny", "gpu": "g", "date": "d", "torch": "t", "context": 10, "copy_gb_per_s": 2.0}


def by_hand() -> pd.DataFrame:
    """Batch 4: 10 ms alone on the device, 3 of them attention, 1 ms host; two and four adapters."""
    base = {"rank": 0, "adapters": 0, "attention_ms": 3.0, "host_ms": 1.0, "floor_bytes": 4_000_000}
    rows = [
        {**base, "batch": 4, "step_ms": 11.0, "device_ms": 10.0},
        {**base, "batch": 2, "step_ms": 9.0, "device_ms": 8.0},
        {**base, "batch": 1, "step_ms": 8.0, "device_ms": 7.0},
    ]
    for count, step in ((2, 13.0), (4, 14.0)):
        rows.append({**base, "batch": 4, "rank": 8, "adapters": count, "step_ms": step, "device_ms": step - 1,
                     "shrink_ms": 1.0, "expand_ms": 2.0, "loop_ms": 5.0 * count, "padded_step_ms": step + 1})  # fmt: skip
    return pd.DataFrame(rows).assign(**FACTS)


def test_a_curve_by_hand() -> None:
    table = points_curve(by_hand(), "mine", gpu_hour_usd=3.6)
    assert table["adapters"].tolist() == [0, 2, 4]
    assert table["profile"].eq("mine").all()
    assert table["base_ms"].tolist() == [7.0] * 3
    assert table["step_ms"].tolist() == [11.0, 13.0, 14.0]
    assert table["padded_step_ms"].tolist() == [11.0, 14.0, 15.0]
    assert table["shrink_ms"].tolist() == [0.0, 1.0, 1.0]
    assert table["loop_step_ms"].tolist() == [11.0, 21.0, 31.0]
    assert table["copies_ms"].tolist() == [11.0, 18.0, 32.0]
    assert table["floor_ms"].tolist() == [2.0] * 3
    assert table["gpu_s_per_mtok"].tolist() == pytest.approx([2750, 3250, 3500])
    assert table["copies_usd_per_mtok"].tolist() == pytest.approx([2.75, 4.5, 8.0])
    assert "lora_ms" not in table


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The points of a few settings on the CPU, as the command leaves them."""
    out = tmp_path_factory.mktemp("c") / "live"
    argv = ["curve", "--live", "--backend", "cpu", "--geometry", "tiny", "--batch", "2", "--rank", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backend.parts.REPEATS", 2)
        patch.setattr("backend.parts.COPY_BYTES", {"cpu": 1 << 20})
        assert main([*argv, "--context", "20", "--max-lora-rank", "16", "--out", str(out)]) == 0
    return out


def test_the_live_command_measures_every_part(live: Path) -> None:
    points = load_points(str(live / "points.parquet"))
    assert points[["batch", "rank", "adapters"]].to_numpy().tolist() == [[1, 0, 0], [2, 0, 0], [2, 8, 1], [2, 8, 2]]
    assert (points[["step_ms", "device_ms", "attention_ms", "copy_gb_per_s"]] > 0).all(axis=None)
    assert (points.loc[points["adapters"] > 0, ["shrink_ms", "expand_ms", "loop_ms", "padded_step_ms"]] > 0).all(
        axis=None
    )
    geometry = load_geometry("tiny")
    assert points["floor_bytes"].tolist()[-1] == floor_bytes(geometry, 2, 2, 8, 20)
    assert points["geometry"].eq("tiny").all()
    table = pd.read_parquet(live / "curve.parquet")
    assert table["adapters"].tolist() == [0, 1, 2]
    for name in ("curve.png", "curve.svg"):
        assert (live / name).stat().st_size > 20_000
    svg = (live / "curve.svg").read_text()
    assert "CPU" in svg
    np.testing.assert_allclose(table["loop_step_ms"] - table["step_ms"].iloc[0], [0, *points["loop_ms"].tolist()[-2:]])


def test_points_are_drawn_again_beside_a_profile(
    live: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "curve",
        "--points",
        str(live / "points.parquet"),
        "--profile",
        "h100-llama-3.1-8b",
        "--batch",
        "2",
        "--rank",
        "8",
    ]
    assert main([*argv, "--out", str(tmp_path / "both")]) == 0
    table = pd.read_parquet(tmp_path / "both" / "curve.parquet")
    assert table["profile"].unique().tolist() == ["h100-llama-3.1-8b", "points.parquet"]
    assert table.groupby("profile")["shrink_ms"].count().tolist() == [0, 3]
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "both")


def test_what_cannot_be_measured_or_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand().drop(columns="loop_ms").to_parquet(tmp_path / "less.parquet")
    by_hand().to_parquet(tmp_path / "points.parquet")
    (tmp_path / "text").write_text("x")
    live = ["--live", "--backend", "cpu", "--geometry"]
    for argv, says in (
        ([], "whose costs? Give --profile, --points, or --live"),
        (["--live"], "--live needs --geometry"),
        ([*live, "tiny", "--rank", "12"], "a rank is 12, must be a multiple of 8"),
        ([*live, "tiny", "--rank", "32", "--max-lora-rank", "16"], "--max-lora-rank is 16, an adapter's rank is 32"),
        ([*live, "llama-3.1-8b"], "llama-3.1-8b does not fit"),
        ([*live, "tiny", "--context", "100000"], "ask for fewer requests"),
        (["--points", "nowhere"], "no such file, and no shipped profile with measured parts"),
        (["--points", str(tmp_path / "text")], "not a Parquet file"),
        (["--points", str(tmp_path / "less.parquet")], "has no column loop_ms"),
        (["--points", str(tmp_path / "points.parquet"), "--batch", "3"], "there are (batch × rank) 4 × 8"),
    ):
        assert main(["curve", *argv, "--out", str(tmp_path / "d")]) == 2, argv
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
        assert not (tmp_path / "d").exists()


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        measure_points(load_geometry("tiny"), "cuda", [1], [8], [1], context=10)


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    by_hand().head(0).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ScenarioError, match="is empty"):
        load_points(str(tmp_path / "none.parquet"))
