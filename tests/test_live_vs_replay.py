"""A comparison of live and replay taken up again: the live figures stay, the replay is new."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import live_vs_replay
from sim import cli
from sim.run import run_scenario


def test_an_earlier_comparison_is_replayed_beside_its_live_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = dict.fromkeys(live_vs_replay.KEYS, 10.0)
    rows = {key: {"live": value, "replay": 0.0, "difference": -1.0} for key, value in live.items()}
    earlier = {
        "device": {"gpu": "one"},
        "duration_s": 20.0,
        "profile": "old",
        "demo-azure": {"live_wall_s": 3.0, **rows},
    }
    file, out = tmp_path / "earlier.json", tmp_path / "again.json"
    file.write_text(json.dumps(earlier))
    argv = ["live_vs_replay", "--profile", "h100-llama-3.1-8b", "--again", str(file), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    live_vs_replay.main()
    found = json.loads(out.read_text())
    alone = run_scenario("demo-azure", duration_s=20.0, out=tmp_path / "alone").summary
    assert (found["device"], found["profile"]) == ({"gpu": "one"}, "h100-llama-3.1-8b")
    assert found["profile_measured"] == live_vs_replay.measured_when("h100-llama-3.1-8b") != {}
    assert found["demo-azure"]["live_wall_s"] == 3.0
    for key in ("steps", "mean_ttft_ms"):
        row = found["demo-azure"][key]
        assert (row["live"], row["replay"]) == (10.0, alone[key])
        assert row["difference"] == pytest.approx(float(str(alone[key])) / 10 - 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_one_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["live_vs_replay", "demo-azure", "--profile", "h100-llama-3.1-8b"])
    measuring = ["measure", "--geometry", "llama-3.1-8b", "--device", "cuda", "--out", str(tmp_path / "gpu")]
    for command in (live_vs_replay.main, lambda: cli.main(measuring)):
        assert command() == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "device cuda: torch sees no CUDA device here" in said
    assert not list(tmp_path.iterdir())
