"""Metrics of a run small enough to compute by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from worlds import totals_of

from sim.metrics import jain, latencies, summarise
from sim.tables import RunTables

NAN = float("nan")
HORIZON_S = 10.0


def tables() -> RunTables:
    """Four requests until t = 10 s: two finished, one with a first token only so far, one never scheduled."""
    requests = pd.DataFrame(
        {
            "request_id": [0, 1, 2, 3],
            "arrival_s": [0.0, 1.0, 2.0, 6.0],
            "adapter": [1, 2, 1, 2],
            "prompt_tokens": [100, 50, 30, 20],
            "output_tokens": [5, 1, 9, 4],
            "status": ["finished", "finished", "running", "waiting"],
            "first_scheduled_s": [0.0, 2.0, 3.0, NAN],
            "first_token_s": [1.0, 4.0, 4.0, NAN],
            "finish_s": [3.0, 4.0, NAN, NAN],
            "tokens_emitted": [5, 1, 4, 0],
            "cached_tokens": [16, 0, 20, 0],
            "preemptions": [0, 1, 2, 0],
            "skips": [0, 0, 0, 1],
        }
    )
    steps = pd.DataFrame(
        {
            "start_s": [0.0, 1.0],
            "end_s": [1.0, 4.0],
            "load_s": [0.5, 0.0],
            "used_blocks": [10, 30],
            "free_blocks": [30, 10],
            "extrapolated": [True, False],
            "stages": [1, 0],
            "running": [2, 1],
        }
    )
    adapters = pd.DataFrame(
        {"step_uses": [6, 2], "hits": [5, 1], "stages": [1, 2], "activations": [1, 3], "evictions": [0, 2]}
    )
    return RunTables(requests, steps, adapters, HORIZON_S, totals=totals_of(steps))


def test_prefix_cache_hit_rate_counts_what_was_scheduled() -> None:
    assert summarise(tables())["prefix_cache_hit_rate"] == pytest.approx(36 / 180)


def test_finished_only_latencies() -> None:
    """A request of one token has no TPOT."""
    values = latencies(tables(), censored=False)
    assert values["ttft"].tolist() == [1000.0, 3000.0]
    assert values["tpot"].tolist() == [500.0]
    assert values["e2el"].tolist() == [3000.0, 3000.0]


def test_censored_latencies_count_the_unfinished_at_the_horizon() -> None:
    values = latencies(tables(), censored=True)
    assert values["ttft"].tolist() == [1000.0, 3000.0, 2000.0, 4000.0]
    assert values["tpot"].tolist() == [500.0, 2000.0]
    assert values["e2el"].tolist() == [3000.0, 3000.0, 8000.0, 4000.0]


def test_summary() -> None:
    s = summarise(tables())
    assert (s["requests"], s["completed"], s["running"], s["waiting"]) == (4, 2, 1, 1)
    assert (s["total_input_tokens"], s["total_output_tokens"]) == (150, 6)
    assert s["request_throughput"] == pytest.approx(0.2)
    assert s["output_throughput"] == pytest.approx(0.6)
    assert s["total_token_throughput"] == pytest.approx(15.6)
    assert s["censored_output_throughput"] == pytest.approx(1.0)
    assert (s["mean_ttft_ms"], s["p50_ttft_ms"], s["p90_ttft_ms"]) == pytest.approx((2000.0, 2000.0, 2800.0))
    assert s["p99_ttft_ms"] == pytest.approx(2980.0)
    assert (s["censored_mean_ttft_ms"], s["censored_p50_ttft_ms"]) == pytest.approx((2500.0, 2500.0))
    assert s["censored_mean_e2el_ms"] == pytest.approx(4500.0)
    assert s["adapter_hit_rate"] == pytest.approx(6 / 8)
    assert (s["adapter_stages"], s["adapter_activations"], s["adapter_evictions"]) == (3, 4, 2)
    assert s["preemptions"] == 3
    assert s["mean_kv_usage"] == pytest.approx((1 * 0.25 + 3 * 0.75) / 4)
    assert s["max_kv_usage"] == pytest.approx(0.75)
    assert s["longest_wait_s"] == pytest.approx(4.0)  # of the one never scheduled
    assert s["load_share"] == pytest.approx(0.05)
    assert s["extrapolated_share"] == pytest.approx(0.5)
    # mean waits: adapter 1 (0 + 1) / 2, adapter 2 (1 + 4) / 2
    x, y = 1 / 0.501, 1 / 2.501
    assert s["jain_wait"] == pytest.approx((x + y) ** 2 / (2 * (x * x + y * y)))


def test_jain() -> None:
    assert jain(np.array([3.0, 3.0, 3.0])) == pytest.approx(1.0)
    assert jain(np.array([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert jain(np.zeros(3)) is None


def test_a_run_in_which_nothing_happened_has_no_latency_and_is_json() -> None:
    full = tables()
    empty = RunTables(full.requests.iloc[:0], full.steps.iloc[:0], full.adapters.iloc[:0], HORIZON_S)
    summary = summarise(empty)
    unknown = (
        "mean_ttft_ms",
        "censored_p99_e2el_ms",
        "adapter_hit_rate",
        "mean_kv_usage",
        "longest_wait_s",
        "jain_wait",
    )
    assert all(summary[key] is None for key in unknown)
    assert summary["request_throughput"] == 0
    json.dumps(summary, allow_nan=False)


def test_steps_without_length_have_no_time_weighted_mean() -> None:
    full = tables()
    at_once = replace(full, totals=totals_of(full.steps.iloc[:1].assign(end_s=0.0)))
    assert summarise(at_once)["mean_kv_usage"] is None
