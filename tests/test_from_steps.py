"""A profile from another engine's logs: planted costs come back, real vLLM logs are predicted, bad files are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from backend.base import StepBatch
from backend.errors import BackendError
from backend.features import StepFeatures
from backend.fitting import with_features
from backend.from_steps import _read_online, profile_from_steps
from backend.geometry import load_geometry
from backend.online import online_runs
from backend.profile import Profile, load_profile, measured_steps
from backend.step_logs import read_steps, read_table
from benchmarks import slot_tiles
from sim.cli import main

GEOMETRY = load_geometry("llama-3.1-8b")
SHARED = Path(__file__).parents[2] / "shared" / "data" / "vllm_h100"


def planted(rows: int, adapters: int) -> tuple[float, float]:
    """Whole step and GPU part in ms: base, first adapter, each adapter."""
    device = 5.0 + 0.02 * rows + (1.5 if adapters else 0.0) + 0.3 * adapters
    return device + 1.0, device


def write_tables(folder: Path) -> list[Path]:
    decode = []
    for batch in (1, 8, 64):
        for adapters in (0, 1, 4, 8):
            if adapters <= batch:
                total, device = planted(batch, adapters)
                decode.append((batch, adapters, 512, 512, total, device))
    prefill = []
    for tokens in (512, 2048, 8192):
        for adapters in (0, 1):
            prefill += [(tokens, 1, adapters, rep, 50.0 + tokens / 40 + 20 * adapters, tokens / 40) for rep in range(3)]
    files = [folder / "decode.csv", folder / "prefill.csv", folder / "loads.csv"]
    columns = ["B", "D", "ctx_first", "ctx_last", "median_ms", "sample_ms"]
    pd.DataFrame(decode, columns=columns).to_csv(files[0], index=False)
    columns = ["tokens", "n_prompts", "D", "rep", "step_ms", "sample_ms"]
    pd.DataFrame(prefill, columns=columns).to_csv(files[1], index=False)
    pd.DataFrame({"load_from_disk_ms": [140.0, 0.0], "activate_ms": [16.0, 18.0]}).to_csv(files[2], index=False)
    (folder / "engine.json").write_text(json.dumps({"gpu": "a GPU", "capture_sizes": [1, 8, 64], "vllm": "0.1"}))
    return files


def write_log(folder: Path) -> Path:
    """Two requests: a prompt of 600 with an adapter, one of 4 without, a decode each, one step with a load."""
    pd.DataFrame({"req": [0, 1], "prompt_tokens": [600, 4], "adapter_id": [3, 0]}).to_csv(
        folder / "x_requests.csv", index=False
    )
    steps = pd.DataFrame({"total_ms": [70.0, 9.0, 30.0, 8.0], "sample_ms": [2.0, 8.0, 8.0, 7.0]})
    steps.assign(loads=0, activations=[0, 0, 1, 0]).to_csv(folder / "x_steps.csv", index=False)
    lines = [[0, [[0, 512]]], [1, [[0, 88], [1, 4]]], [2, [[0, 1], [1, 1]]], [3, [[0, 1]]]]
    with gzip.open(folder / "x_sched.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "x_steps.csv"


def make(folder: Path, files: list[Path], held_out: list[Path] | None = None) -> Profile:
    return profile_from_steps(
        files, held_out or [], folder / "engine.json", geometry=GEOMETRY, rank=16, gpu_memory_gib=80.0,
        bandwidth_gb_s=2500.0, out=folder / "made",
    )  # fmt: skip


def test_planted_costs_come_back(tmp_path: Path) -> None:
    profile = make(tmp_path, write_tables(tmp_path))
    for batch, adapters in ((1, 0), (8, 4), (64, 0), (64, 8)):
        slots = tuple(i % adapters if adapters else -1 for i in range(batch))
        step = StepBatch((1,) * batch, (512,) * batch, slots, (True,) * batch)
        device, host, _ = profile.predictor.predict(StepFeatures.of(step, dict.fromkeys(range(8), 16)))
        total, on_device = planted(batch, adapters)
        assert device * 1e3 == pytest.approx(on_device, rel=0.02)
        assert (device + host) * 1e3 == pytest.approx(total, rel=0.02)
    # Moves of one size say nothing of others: the time is taken for all.
    assert profile.load.seconds(10**6) == pytest.approx(0.017, rel=1e-3)
    assert profile.load.seconds(10**9) == pytest.approx(0.017, rel=1e-3)
    assert profile.stage.seconds(10**8) == pytest.approx(0.140, rel=1e-3)
    assert profile.meta["vllm"] == "0.1"
    assert load_profile(str(tmp_path / "made")).predictor == profile.predictor


def test_a_longer_context_costs_its_bytes(tmp_path: Path) -> None:
    profile = make(tmp_path, write_tables(tmp_path))

    def device(context: int) -> float:
        step = StepBatch((1,) * 8, (context,) * 8, (-1,) * 8, (True,) * 8)
        return profile.predictor.predict(StepFeatures.of(step, {}))[0]

    assert device(2512) - device(512) == pytest.approx(8 * 2000 * GEOMETRY.kv_bytes_per_token / 2500e9)


def test_a_step_log_is_put_together_again(tmp_path: Path) -> None:
    steps = with_features(read_steps([write_log(tmp_path)], 16, "log"))
    assert steps["rows"].tolist() == [512, 92, 1]  # the step with an activation is left out
    assert steps["lora_rows"].tolist() == [512, 88, 1]
    assert steps["decode_only"].tolist() == [False, False, True]
    assert steps["kv_tokens"].tolist() == [0, 0, 602]
    np.testing.assert_allclose(steps["device_s"] + steps["host_s"], [0.070, 0.009, 0.008])


def test_held_out_logs_only_check(tmp_path: Path) -> None:
    files, log = write_tables(tmp_path), write_log(tmp_path)
    profile = make(tmp_path, files, [log])
    assert profile.accuracy["steps"] == 3
    steps = pd.read_parquet(measured_steps(str(tmp_path / "made")) or "")
    assert set(steps["kind"]) == {"grid", "held_out"}


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (
            lambda d: (d / "decode.csv").write_text("B,D,ctx_first,ctx_last,median_ms,sample_ms\n1,0,5,5,soon,6\n"),
            "decode.csv:2: median_ms",
        ),
        (
            lambda d: (d / "decode.csv").write_text("B,D,ctx_first,ctx_last,median_ms,sample_ms\n1,0,5,5,0,0\n"),
            "decode.csv:2: median_ms is 0, must be a number > 0",
        ),
        (
            lambda d: (d / "decode.csv").write_text("B,D,ctx_first,ctx_last,median_ms,sample_ms\n1e9,0,5,5,7,6\n"),
            "decode.csv:2: B is 1000000000.0, must be a whole number >= 1 and < 1000000",
        ),
        (
            lambda d: (d / "prefill.csv").write_text("tokens,n_prompts,D,step_ms,sample_ms,exec_ms\n9,1,0,5,5,x\n"),
            "prefill.csv:2: exec_ms is x, must be a number >= 0",
        ),
        (lambda d: (d / "decode.csv").write_text("a,b\n1,2\n"), "none of the kinds"),
        (lambda d: (d / "decode.csv").unlink(), "no such file"),
        (lambda d: (d / "engine.json").write_text("{}"), "needs gpu and capture_sizes"),
        (lambda d: (d / "loads.csv").write_text("load_from_disk_ms,activate_ms\n1,0\n"), "no load of an adapter"),
        (lambda d: (d / "prefill.csv").write_text((d / "loads.csv").read_text()), "beyond the captured sizes"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, spoil: object, names: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_tables(tmp_path)
    spoil(tmp_path)  # type: ignore[operator]
    arguments = ["measure", "--geometry", "llama-3.1-8b", "--rank", "16", "--gpu-memory-gib", "80"]
    arguments += ["--engine", str(tmp_path / "engine.json"), "--out", str(tmp_path / "made")]
    assert main([*arguments, "--from-steps", *map(str, files)]) == 2
    assert names in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_log_without_its_siblings_or_with_other_requests(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    with gzip.open(tmp_path / "x_sched.jsonl.gz", "wt") as file:
        file.write("[0, [[7, 1]]]\n")
    with pytest.raises(BackendError, match="names request 7"):
        read_steps([log], 16, "log")
    with gzip.open(tmp_path / "x_sched.jsonl.gz", "wt") as file:
        file.write("[0, [[0, 1]]]\nnot json\n")
    with pytest.raises(BackendError, match=r"x_sched.jsonl.gz:2: must be"):
        read_steps([log], 16, "log")
    (tmp_path / "x_sched.jsonl.gz").unlink()
    with pytest.raises(BackendError, match=r"x_sched\.jsonl\.gz: missing"):
        read_steps([log], 16, "log")


def test_from_steps_says_which_flag_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "made")
    assert main(["measure", "--geometry", "llama-3.1-8b", "--from-steps", "x.csv", "--out", out]) == 2
    assert "--engine" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared vLLM measurements")
def test_the_shipped_vllm_profile_is_made_from_the_shared_tables(tmp_path: Path) -> None:
    tables = [
        SHARED / f"{name}.csv" for name in ("decode_grid", "prefill", *(f"adapter_load_ml{n}" for n in (4, 8, 32)))
    ]
    runs = [("ml32_rate8", 32), ("ml32b_rate8", 32), ("ml8_rate8", 8), ("ml32_rate16", 32)]
    made = profile_from_steps(
        tables, [], SHARED / "engine_ml32.json", geometry=GEOMETRY, rank=16, gpu_memory_gib=79.18,
        bandwidth_gb_s=2443.0, out=tmp_path / "made", slot_tile_us=22.2,
        online=[(SHARED / "online" / f"{name}_steps.csv", slots) for name, slots in runs],
    )  # fmt: skip
    shipped = load_profile("vllm-0.24-h100-llama-3.1-8b")
    assert made.accuracy["mape"] == pytest.approx(shipped.accuracy["mape"], rel=1e-6)
    assert made.accuracy["mape"] < 0.066
    assert read_table(tables[0])[0] == "decode"


def test_live_runs_give_the_host_and_each_is_judged_by_the_others(tmp_path: Path) -> None:
    """Two logs of one host that takes 3 ms a decode where the grid's took 1: together they are the profile, apart they predict each other."""
    files = write_tables(tmp_path)
    online = []
    for name in ("a", "b"):
        pd.DataFrame({"req": [0], "prompt_tokens": [4], "adapter_id": [0]}).to_csv(
            tmp_path / f"{name}_requests.csv", index=False
        )
        device = planted(1, 0)[1]
        steps = pd.DataFrame({"t": np.arange(20) * 0.01, "total_ms": device + 3.0, "sample_ms": device})
        steps.assign(loads=0, activations=0).to_csv(tmp_path / f"{name}_steps.csv", index=False)
        with gzip.open(tmp_path / f"{name}_sched.jsonl.gz", "wt") as file:
            file.write("".join(f"[{step}, [[0, {1 if step else 4}]]]\n" for step in range(20)))
        online.append((tmp_path / f"{name}_steps.csv", 4))
    profile = profile_from_steps(
        files, [], tmp_path / "engine.json", geometry=GEOMETRY, rank=16, gpu_memory_gib=80.0,
        bandwidth_gb_s=2500.0, out=tmp_path / "made", online=online,
    )  # fmt: skip
    step = StepFeatures.of(StepBatch((1,), (512,), (-1,), (True,)), {})
    assert profile.predictor.predict(step)[1] == pytest.approx(0.003, rel=0.01)
    by_regime = profile.meta["accuracy_by_regime"]
    assert isinstance(by_regime, dict)
    assert by_regime["decode"]["mape"] < 0.02
    assert profile.meta["online"] == ["a", "b"]
    again = online_runs(str(tmp_path / "made"), load_profile(str(tmp_path / "made")))
    assert again is not None
    assert again.predictor() == profile.predictor
    assert [int(run["max_loras"].iloc[0]) for run in again.runs.values()] == [4, 4]
    assert again.runs["a"]["between_s"].iloc[1] == pytest.approx(0.01 - (planted(1, 0)[1] + 3.0) / 1e3)
    with pytest.raises(BackendError, match="second run of the name a"):
        _read_online([online[0], online[0]], 16)
    with pytest.raises(BackendError, match="not a step log"):
        _read_online([(files[0], 4)], 16)


def test_online_runs_need_their_slots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "measure",
        "--geometry",
        "llama-3.1-8b",
        "--rank",
        "16",
        "--gpu-memory-gib",
        "80",
        "--from-steps",
        "x.csv",
    ]
    arguments += ["--engine", "engine.json", "--out", str(tmp_path / "made")]
    for extra in (
        ["--online", "a_steps.csv"],
        ["--online-max-loras", "8"],
        ["--online", "a", "b", "c", "--online-max-loras", "1", "2"],
    ):
        assert main([*arguments, *extra]) == 2
        assert "--online needs --online-max-loras" in capsys.readouterr().err


def test_an_adapter_of_a_wide_step_costs_less(tmp_path: Path) -> None:
    """As vLLM's kernels are: a grid in which each adapter takes 0.3 ms below 128 rows and 0.2 ms from there on."""
    files = write_tables(tmp_path)
    rows = [
        (batch, adapters, 512, 512, 1.0 + (device := 5.0 + 0.02 * batch + bool(adapters) + adapters * (0.2 if batch >= 128 else 0.3)), device)
        for batch in (8, 64, 128, 256) for adapters in (0, 1, 8)
    ]  # fmt: skip
    pd.DataFrame(rows, columns=["B", "D", "ctx_first", "ctx_last", "median_ms", "sample_ms"]).to_csv(
        files[0], index=False
    )
    (tmp_path / "engine.json").write_text(json.dumps({"gpu": "a GPU", "capture_sizes": [8, 64, 128, 256]}))
    predictor = make(tmp_path, files).predictor

    def device(batch: int, adapters: int) -> float:
        slots = tuple(i % adapters for i in range(batch))
        step = StepBatch((1,) * batch, (512,) * batch, slots, (True,) * batch)
        return predictor.predict(StepFeatures.of(step, dict.fromkeys(range(8), 16)))[0]

    assert device(64, 8) - device(64, 4) == pytest.approx(4 * 0.3e-3, rel=0.02)
    assert device(256, 8) - device(256, 4) == pytest.approx(4 * 0.2e-3, rel=0.02)


def test_tables_of_one_max_loras_predict_others(tmp_path: Path) -> None:
    files = write_tables(tmp_path)
    for file in files[:2]:
        pd.read_csv(file).assign(max_loras=8).to_csv(file, index=False)
    profile = profile_from_steps(
        files, [], tmp_path / "engine.json", geometry=GEOMETRY, rank=16, gpu_memory_gib=80.0, bandwidth_gb_s=2500.0,
        out=tmp_path / "grids", slot_tile_us=50.0,
    )  # fmt: skip
    batch = StepBatch((1,) * 64, (511,) * 64, tuple(i % 4 for i in range(64)), (True,) * 64)
    seconds = {
        slots: profile.predictor.predict(StepFeatures.of(batch, dict.fromkeys(range(4), 16), max_loras=slots))[0]
        for slots in (4, 8, 32)
    }
    assert seconds[8] == pytest.approx(planted(64, 4)[1] / 1e3, rel=0.02)
    assert seconds[8] - seconds[4] == pytest.approx(4 * 50e-6)
    assert seconds[32] - seconds[8] == pytest.approx(24 * 50e-6)


def test_a_slot_s_cost_follows_from_kernels_of_few_and_many_slots(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    count = slot_tiles.blocks(GEOMETRY)
    rows = [
        ("vllm", layer, tokens, 1, slots, 10.0 + 2e-3 * count[layer] * slots * -(-tokens // 64))
        for layer in ("qkv", "gate_up") for tokens in (1, 256) for slots in (1, 16, 32, 64)
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["impl", "layer", "T", "n_adapters", "max_loras", "median_us"])
    assert slot_tiles.seconds_per_block(table, count) == pytest.approx(2e-9)
    table.to_csv(tmp_path / "max_loras_sweep.csv", index=False)
    assert slot_tiles.main(["--data", str(tmp_path)]) == 0
    assert f"{2e-3 * sum(count.values()) * 32:.1f} us a slot" in capsys.readouterr().out
