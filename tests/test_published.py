"""Published runs: costs from planted runs come back, the memory boundary holds, loads are made as asked, bad files are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from backend.base import StepBatch
from backend.errors import BackendError
from backend.features import StepFeatures
from backend.from_runs import COSTS, counted, distinct_adapters, itl_of, predictor_of, step_costs
from sim.cli import main
from sim.published import (
    boundary,
    clean,
    itl_errors,
    kv_blocks,
    load_of,
    predict,
    profiles_of,
    read_runs,
    shipped_costs,
    training,
    unseen,
)

DATA = Path(__file__).parents[2] / "shared" / "data" / "real_vllm_runs"
PLANTED = {"base_s": 0.012, "request_s": 3e-5, "adapter_s": 5e-4, "idle_slot_s": 2e-5, "prompt_token_s": 8e-5}


def run(**changes: object) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run_id": "x", "model": "llama-3.1-8b-instruct", "engine": "vLLM 0.8.5 (V1)", "max_loras": 16, "n_adapters": 16,
        "max_lora_rank": 16, "adapter_ranks": "8:8;16:8", "adapter_rates": "0.5:8;0.25:8", "status": "ok", "failure": None,
        "max_num_seqs": 2048, "max_num_batched_tokens": 2048, "max_model_len": 131072, "gpu_memory_utilization": 0.9,
        "block_size": 16, "window_s": 60.0, "client_flag": "clean", "srv_running_mean": 30.0, "itl_mean_ms": 25.0,
        "request_throughput_rps": 6.0, "mean_input_tokens": 200.0, "output_throughput_tok_s": 1200.0, "ttft_mean_ms": 60.0,
        "ttft_median_ms": 50.0, "ttft_p99_ms": 200.0,
    }  # fmt: skip
    return row | changes


LENGTHS = pd.DataFrame({"llama31_input_tokens": [100, 300], "llama31_output_tokens": [150, 50],
                        "qwen25_input_tokens": [100, 300], "qwen25_output_tokens": [150, 50]})  # fmt: skip


def planted_runs() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(30):
        row = run(max_loras=int(rng.integers(4, 200)), srv_running_mean=float(rng.uniform(1, 300)))
        row |= {"adapter_rates": f"1.0:{rng.integers(1, 200)}", "request_throughput_rps": float(rng.uniform(0.5, 25))}
        distinct = distinct_adapters(row)
        step = PLANTED["base_s"] + PLANTED["request_s"] * row["srv_running_mean"] + PLANTED["adapter_s"] * distinct
        step += PLANTED["idle_slot_s"] * (row["max_loras"] - distinct)
        prompts = row["request_throughput_rps"] * row["mean_input_tokens"] * PLANTED["prompt_token_s"]
        rows.append({**row, "itl_mean_ms": 1e3 * step / (1 - prompts)})
    return pd.DataFrame(rows)


def test_planted_costs_come_back_from_whole_runs() -> None:
    assert step_costs(planted_runs()) == pytest.approx(PLANTED, rel=1e-3)
    np.testing.assert_allclose(itl_of(planted_runs(), PLANTED), planted_runs()["itl_mean_ms"])
    with pytest.raises(BackendError, match="too few"):
        step_costs(planted_runs().iloc[:3])


def test_costs_are_a_predictor_s_steps() -> None:
    batch = StepBatch((1, 1, 1, 500), (9, 9, 9, 0), (0, 1, 0, 0), (True,) * 4)
    features = StepFeatures.of(batch, {0: 16, 1: 16}, max_loras=8)
    expected = PLANTED["base_s"] + 4 * PLANTED["request_s"] + 2 * PLANTED["adapter_s"]
    expected += 6 * PLANTED["idle_slot_s"] + 499 * PLANTED["prompt_token_s"]
    assert sum(predictor_of(PLANTED).predict(features)[:2]) == pytest.approx(expected)


def test_distinct_adapters_are_at_most_slots_and_adapters() -> None:
    assert distinct_adapters(run(max_loras=4)) == 4
    assert distinct_adapters(run(srv_running_mean=1e9)) == pytest.approx(16)
    assert distinct_adapters(run(srv_running_mean=1e-3)) == pytest.approx(1e-3, rel=0.01)
    assert counted("8:64;16:64", "x") == [(8.0, 64), (16.0, 64)]
    with pytest.raises(BackendError, match="adapter_rates"):
        counted("many", "adapter_rates")


def test_a_load_is_as_asked_and_hangs_on_its_seed() -> None:
    load = load_of(run(), LENGTHS, 2000.0, 1)
    assert len(load.requests.arrival_s) == pytest.approx(6.0 * 2000, rel=0.05)
    assert sorted(load.ranks) == [8] * 8 + [16] * 8
    counts = np.bincount(load.requests.adapter)[1:]
    assert sorted(counts)[8:] == pytest.approx([1000] * 8, rel=0.15)
    again = load_of(run(), LENGTHS, 2000.0, 1)
    np.testing.assert_array_equal(again.requests.arrival_s, load.requests.arrival_s)


def test_slots_that_leave_no_kv_fail_to_start() -> None:
    assert kv_blocks(run()) > 0
    assert kv_blocks(run(max_loras=512, max_lora_rank=32)) == 0
    runs = pd.DataFrame(
        [run(), run(max_loras=512, status="failed", failure="cuda_oom"), run(status="failed", failure="port_in_use")]
    )
    assert boundary(runs).to_dict("records") == [
        {"did": "failed", "predicted": "failed", "runs": 1},
        {"did": "started", "predicted": "started", "runs": 1},
    ]


def test_a_light_run_is_served_as_offered() -> None:
    profile = profiles_of(shipped_costs())["llama-3.1-8b-instruct"]
    row = predict(run(), profile, LENGTHS, 60.0, 0)
    assert row["predicted_output_throughput_tok_s"] == pytest.approx(6.0 * 100, rel=0.2)
    assert 15 < float(str(row["predicted_itl_mean_ms"])) < 40


def test_rows_that_made_the_costs_are_not_predicted() -> None:
    rows = pd.DataFrame([run(run_id=str(i)) for i in range(30)])
    made = training(rows)
    assert len(made) == 3
    assert len(unseen(rows, {"m": {"runs": made["run_id"].tolist()}})) == 27


def test_validate_runs_needs_its_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, lengths = tmp_path / "runs.csv", tmp_path / "lengths.csv"
    pd.DataFrame([run()]).to_csv(file, index=False)
    LENGTHS.to_csv(lengths, index=False)
    assert main(["validate", "--runs", str(file)]) == 0
    assert "started" in capsys.readouterr().out
    assert main(["validate", "--runs", str(file), "--lengths", str(lengths), "--window-s", "20"]) == 0
    assert "ttft_p99_ms" in capsys.readouterr().out
    assert main(["validate", "--runs", str(file), "--lengths", str(file)]) == 2
    assert "has no column llama31_input_tokens" in capsys.readouterr().err
    pd.DataFrame([run()]).drop(columns="max_loras").to_csv(file, index=False)
    assert main(["validate", "--runs", str(file)]) == 2
    assert "has no column max_loras" in capsys.readouterr().err
    assert main(["validate"]) == 2
    assert "--trace" in capsys.readouterr().err
    assert main(["validate", "--runs", str(file), "--every", "0"]) == 2
    assert "--every" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared runs")
def test_every_memory_failure_is_predicted_and_the_costs_are_those_shipped() -> None:
    runs = read_runs(DATA / "runs_public.csv")
    table = boundary(runs)
    assert (table["did"] == table["predicted"]).all()
    rows = clean(runs)
    made = training(rows)
    assert len(made) <= len(rows) / 9
    for model, known in shipped_costs().items():
        own = made[made["model"] == model]
        assert known["runs"] == own["run_id"].tolist()
        assert known["costs"] == pytest.approx(step_costs(own))
        assert tuple(known["costs"]) == COSTS
    assert (itl_errors(rows, shipped_costs())["smape"] <= 0.08).all()
