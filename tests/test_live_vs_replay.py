"""A comparison of live and replay taken up again: the live figures stay, the replay is new."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from backend.base import AdapterShape, EngineLimits
from backend.geometry import load_geometry
from backend.profile import load_profile
from backend.replay import ReplayBackend
from benchmarks import live_tables, live_vs_replay
from benchmarks.as_it_was import AsItWas, host_factor
from benchmarks.drawn_loads import DrawnLoads
from sim import cli
from sim.compiled_inputs import supports
from sim.config import EngineConfig
from sim.run import run_scenario

LIMITS = EngineLimits(16, 64, 32, 2048, 2048, 16, 0.9)


def test_an_earlier_comparison_is_replayed_beside_its_live_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = dict.fromkeys(live_vs_replay.KEYS, 10.0)
    rows = {key: {"live": value, "replay": 0.0, "difference": -1.0} for key, value in live.items()}
    rows["p99_ttft_ms"] |= {"live_again": [0.02]}  # type: ignore[dict-item]
    earlier = {
        "device": {"gpu": "one"},
        "duration_s": 20.0,
        "profile": "old",
        "demo-azure": {
            "live_wall_s": 3.0,
            **rows,
            "by_kind": [{"kind": "decodes, up to 8", "live_steps": 7, "replay_steps": 0}],
            "host_by_time": [{"start_s": 10.0, "live_host_ms": 0.7, "replay_host_ms": 9.0}],
        },
    }
    file, out = tmp_path / "earlier.json", tmp_path / "again.json"
    file.write_text(json.dumps(earlier))
    argv = ["live_vs_replay", "--profile", "h100-llama-3.1-8b", "--again", str(file), "--out", str(out), "--draws", "2"]
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
    row = found["demo-azure"]["mean_ttft_ms"]
    assert row["drawn_loads_p10"] < row["drawn_loads_p90"]
    assert found["demo-azure"]["p99_ttft_ms"]["live_again"] == [0.02]
    assert "live_again" not in row
    (kind,) = found["demo-azure"]["by_kind"]
    assert kind["live_steps"] == 7 and kind["replay_steps"] > 100
    (window,) = found["demo-azure"]["host_by_time"]
    assert window["live_host_ms"] == 0.7 and 0 < window["replay_host_ms"] < 1


def test_how_far_a_replay_would_move_with_longer_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A request alone takes as much longer as its steps; what waits for others more, loads not at all."""
    args = argparse.Namespace(profile="h100-llama-3.1-8b", duration_s=20.0)
    replay = run_scenario("demo-azure", duration_s=20.0, out=tmp_path / "alone").summary
    monkeypatch.setattr(live_vs_replay, "LONGER", 0.0)
    shown = live_vs_replay.show(
        "demo-azure", replay, replay, live_vs_replay.Beside(live_vs_replay._longer("demo-azure", args))
    )
    assert {row["longer_steps"] for row in shown.values()} == {0.0}, "the third run is not the replay"
    monkeypatch.setattr(live_vs_replay, "LONGER", 0.01)
    shown = live_vs_replay.show(
        "demo-azure", replay, replay, live_vs_replay.Beside(live_vs_replay._longer("demo-azure", args))
    )
    assert 0.005 < float(str(shown["p50_tpot_ms"]["longer_steps"])) < 0.03
    assert shown["completed"]["longer_steps"] == 0.0
    assert "steps +1 %" in capsys.readouterr().out


def test_how_far_live_runs_lie_apart(capsys: pytest.CaptureFixture[str]) -> None:
    live, other = dict.fromkeys(live_vs_replay.KEYS, 10.0), dict.fromkeys(live_vs_replay.KEYS, 11.0)
    shown = live_vs_replay.show("demo-azure", live, live, live_vs_replay.Beside(live, lives=[other, live]))
    assert shown["mean_ttft_ms"]["live_again"] == pytest.approx([0.1, 0.0])
    assert capsys.readouterr().out.count("live again") == 2
    alone = live_vs_replay.show("demo-azure", live, live, live_vs_replay.Beside(live))["mean_ttft_ms"]
    assert not {"live_again", "as_it_was", "drawn_loads_p10"} & alone.keys()


def test_steps_of_a_kind_are_held_against_each_other() -> None:
    def steps(slower: float) -> pd.DataFrame:
        rows = [
            (4, 0, 0.01, 0.0),
            (4, 0, 0.02, 0.001),
            (40, 0, 0.03, 0.0),
            (1500, 1496, 0.1 * slower, 0.02),
            (0, 0, 0.0, 0.5),
        ]
        table = pd.DataFrame(rows, columns=["tokens", "prefill_tokens", "device_s", "load_s"])
        return table.assign(host_s=0.0005)

    few, many, prompts = live_tables.by_kind(steps(1.0), steps(0.5))
    assert (few["kind"], few["live_steps"], few["live_load_ms"]) == ("decodes, up to 8", 2, pytest.approx(0.5))
    assert few["live_device_ms"] == few["replay_device_ms"] == pytest.approx(15.0)
    assert (many["kind"], many["replay_tokens"]) == ("decodes, more", 40.0)
    assert prompts["kind"] == "with prompts, more"
    assert prompts["live_load_most_ms"] == prompts["live_load_ms"] == pytest.approx(20.0)
    assert few["live_load_most_ms"] == 1.0
    assert prompts["replay_device_ms"] == pytest.approx(0.5 * float(str(prompts["live_device_ms"])))


def test_the_hosts_part_by_time() -> None:
    live = pd.DataFrame(
        {
            "start_s": [0.0, 9.9, 10.0, 12.0, 13.0, 25.0],
            "prefill_tokens": [0, 0, 0, 7, 0, 0],
            "tokens": [1, 1, 1, 8, 0, 1],
            "host_s": [0.001, 0.003, 0.004, 1.0, 1.0, 0.005],
        }
    )
    first, second = live_tables.host_by_time(live, live[:5].assign(host_s=0.002))
    assert first == {"start_s": 0.0, "live_host_ms": pytest.approx(2.0), "replay_host_ms": pytest.approx(2.0)}
    assert second == {"start_s": 10.0, "live_host_ms": pytest.approx(4.0), "replay_host_ms": pytest.approx(2.0)}


def test_kept_runs_complete_an_earlier_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live = run_scenario("demo-azure", duration_s=20.0, out=tmp_path / "demo-azure-live").summary
    rows = {key: {"live": live[key]} for key in live_vs_replay.KEYS}
    file, out = tmp_path / "earlier.json", tmp_path / "again.json"
    argv = ["live_vs_replay", "--profile", "h100-llama-3.1-8b", "--again", str(file), "--out", str(out), "--draws", "2"]
    monkeypatch.setattr(sys, "argv", [*argv, "--keep", str(tmp_path)])
    file.write_text(json.dumps({"duration_s": 20.0, "demo-azure": {"live_wall_s": 3.0, **rows}}))
    assert live_vs_replay.main() == 0
    found = json.loads(out.read_text())["demo-azure"]
    assert found["steps"]["difference"] == found["steps"]["as_it_was"] == 0.0, "the live run was a replay"
    assert all(kind["live_device_ms"] == kind["replay_device_ms"] for kind in found["by_kind"])
    assert [row["live_host_ms"] for row in found["host_by_time"]] == [
        r["replay_host_ms"] for r in found["host_by_time"]
    ]
    assert [row["start_s"] for row in found["host_by_time"]] == [0.0, 10.0, 20.0]
    rows["steps"]["live"] = 3
    file.write_text(json.dumps({"duration_s": 20.0, "demo-azure": {"live_wall_s": 3.0, **rows}}))
    assert live_vs_replay.main() == 2
    assert f"--keep {tmp_path}: demo-azure-live is not the run of --again {file}" in capsys.readouterr().err


def test_too_few_draws_and_lives_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, value, least in (("--draws", "-1", 0), ("--lives", "0", 1)):
        monkeypatch.setattr(sys, "argv", ["live_vs_replay", "--profile", "h100-llama-3.1-8b", flag, value])
        with pytest.raises(SystemExit, match="2"):
            live_vs_replay.main()
        assert f"{flag}: {value}: must be a whole number, {least} or more" in capsys.readouterr().err


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


def test_drawn_loads_are_the_measured_ones_and_the_same_again_for_a_seed() -> None:
    loads = pd.DataFrame(
        {"kind": ["stage", "stage", "load"], "nbytes": [100, 100, 100], "elapsed_s": [0.01, 0.03, 0.002]}
    )
    inner = ReplayBackend(load_profile("h100-llama-3.1-8b"), load_geometry("llama-3.1-8b"), LIMITS, 1000)
    adapter = AdapterShape(0, 16, ("q_proj",))
    mean = inner.stage(adapter).elapsed_s
    runs = [[DrawnLoads(inner, loads, seed) for _ in range(2)] for seed in range(3)]
    for pair in runs:
        one, other = ([backend.stage(adapter).elapsed_s / mean for _ in range(40)] for backend in pair)
        assert one == other
        assert {round(share, 9) for share in one} == {0.5, 1.5}
    assert runs[0][0].load(adapter, 0) == inner.load(adapter, 0), "one repeat is its own mean"
    assert not supports(EngineConfig(), runs[0][0]), "a compiled replay would draw once for all loads of an adapter"


def test_a_replay_as_it_was_has_the_live_runs_loads_and_its_hosts_speed(tmp_path: Path) -> None:
    """Loads and host that are twice as slow as the profile says, and not of its making: the replay has them."""
    args = argparse.Namespace(profile="h100-llama-3.1-8b", duration_s=20.0)
    run = run_scenario("demo-azure", duration_s=20.0, out=tmp_path / "run").tables
    slow = run.steps.assign(host_s=2 * run.steps["host_s"])
    moves = run.moves.assign(end_s=run.moves["start_s"] + 2 * (run.moves["end_s"] - run.moves["start_s"]))
    assert host_factor(slow, run.steps) == pytest.approx(2.0)
    inner = ReplayBackend(load_profile("h100-llama-3.1-8b"), load_geometry("llama-3.1-8b"), LIMITS, 1000)
    backend = AsItWas(inner, moves, 2.0)
    first = moves[moves["kind"] == "stage"].iloc[0]
    adapter = AdapterShape(int(first["adapter"]), 16, ("q_proj",))
    assert backend.stage(adapter).elapsed_s == pytest.approx(first["end_s"] - first["start_s"])
    assert backend.stage(replace(adapter, adapter_id=10**6)) == inner.stage(adapter), "one that the run had not"
    was = live_vs_replay._as_it_was("demo-azure", args, slow, moves, run.steps)
    same = live_vs_replay._as_it_was("demo-azure", args, run.steps, run.moves, run.steps)
    assert float(str(was["mean_ttft_ms"])) > 1.2 * float(str(same["mean_ttft_ms"]))
