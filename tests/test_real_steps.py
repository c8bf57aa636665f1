"""Steps as real vLLM 0.8.5 servers took them: the fit by hand, and what it says of runs it was not fitted to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from backend.geometry import load_geometry
from backend.profile import load_profile
from backend.replay import ReplayBackend
from benchmarks.real_steps import MODEL, MeasuredSteps, load_s, measured_steps
from sim.config import EngineConfig
from sim.curve import decode_features
from sim.engine import simulate
from sim.run import limits_of
from workloads.adapters import Catalogue
from workloads.requests import RequestTable

DATA = Path(__file__).parents[2] / "shared" / "data" / "real_vllm_runs"


def test_planted_costs_are_found_again(tmp_path: Path) -> None:
    """10 ms + 0.03 a decode + 1e-4 a key, 0.02 a prompt token; times 2 + 0.02 D with adapters."""
    runs, steps = [], []

    def add(
        batch: int, tokens: int, factor: float, max_loras: int, distinct: int, phase: str = "measured batch"
    ) -> None:
        base = 10 + 0.03 * batch + 1e-4 * batch * tokens / 2 if tokens > 1 else 10 + 0.02 * 2048
        name = f"r{len(runs)}"
        runs.append({"repo_path": name, "num_prompts": 10 * batch})
        steps.append({"model": MODEL, "repo_path": name, "max_loras": max_loras, "request_output_tokens": tokens,
                      "unique_adapters_in_batch": distinct, "phase": phase, "steps": 10 * tokens,
                      "step_mean_ms": base * factor})  # fmt: skip

    for batch in (50, 200, 800):
        for tokens in (100, 200, 400):
            add(batch, tokens, 1.0, 0, 0)
    add(100, 1, 1.0, 0, 0)
    for distinct in (1, 32, 100):
        add(208, 100, 2 + 0.02 * distinct, 300, distinct)
    add(1, 100, 2.02, 300, 1, "preload, one request at a time")
    pd.DataFrame(runs).to_csv(tmp_path / "compute.csv")
    pd.DataFrame(steps).to_csv(tmp_path / "compute_steps.csv")
    m = measured_steps(tmp_path)
    assert (m.constant, m.decode, m.key) == pytest.approx((10, 0.03, 1e-4))
    assert (m.prompt_token, m.c0, m.c1) == pytest.approx((0.02, 2, 0.02))
    assert m.error < 1e-9
    f = decode_features(64, 8, 16, 99)
    assert m.predict(f)[0] == pytest.approx(1e-3 * (10 + 0.03 * 64 + 1e-4 * 6400) * 2.16)


def test_what_stands_for_a_predictor_is_replayed_step_by_step() -> None:
    profile = replace(load_profile("h100-llama-3.1-8b"), predictor=MeasuredSteps(10, 0.03, 1e-4, 0.02, 2, 0.02, 0.0))  # type: ignore[arg-type]
    config = EngineConfig(max_loras=2, max_lora_rank=16, max_model_len=256)
    backend = ReplayBackend(profile, load_geometry("llama-3.1-8b"), limits_of(config), 100)
    requests = RequestTable(np.zeros(3), np.full(3, 20), np.full(3, 4), np.array([0, 1, 2]))
    tables = simulate(requests, Catalogue.uniform(2, [16]), config, backend)
    assert (tables.requests["status"] == "finished").all()
    decode = tables.steps.iloc[-1]
    assert decode["device_s"] == pytest.approx(1e-3 * (10 + 0.03 * 3 + 1e-4 * 3 * 23) * 2.04)


@pytest.mark.skipif(not DATA.is_dir(), reason="the published runs are not here")
def test_it_says_how_long_steps_of_real_servers_are() -> None:
    """By Little's law a server's mean step is its running requests over its tokens a second; prompts come on top here."""
    m, runs = measured_steps(DATA), pd.read_csv(DATA / "runs_public.csv")
    assert m.error < 0.15
    assert 0.006 < load_s(DATA) < 0.009
    runs = runs[(runs["run_set"] == "digital_twin") & (runs["model"] == MODEL) & (runs["n_adapters"] == 384)]
    runs = runs[(runs["client_flag"] == "clean") & (runs["max_lora_rank"] == 16) & (runs["max_loras"] <= 64)]
    assert len(runs) == 4
    for run in runs.to_dict("records"):
        real = run["srv_running_mean"] / run["output_throughput_tok_s"]
        decodes = round(run["srv_running_mean"])
        keys = round(run["kv_cache_tokens"] * run["kv_usage_mean"] / decodes)
        decode_s, _, _ = m.predict(decode_features(decodes, min(run["max_loras"], decodes), 16, keys))
        assert 0.7 < decode_s / real < 1.1
