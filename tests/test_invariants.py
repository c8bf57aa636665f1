"""The invariants of a simulation, on random small worlds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import WorldBackend, random_requests

from sim.config import LORA_LOADING, EngineConfig
from sim.engine import simulate
from sim.eviction import EVICTION
from sim.tables import RunTables
from sim.waiting import WAITING
from workloads.adapters import Catalogue

WORLD = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "count": st.integers(1, 40),
        "adapters": st.integers(1, 9),
        "max_loras": st.integers(1, 4),
        "extra_cpu": st.integers(0, 3),
        "blocks": st.integers(16, 40),
        "max_num_seqs": st.integers(1, 8),
        "budget": st.integers(8, 64),
        "threshold": st.sampled_from([0, 3, 7]),
        "horizon_s": st.sampled_from([None, 0.05]),
        "scheduling_policy": st.sampled_from(sorted(WAITING)),
        "lora_eviction_policy": st.sampled_from(sorted(EVICTION)),
        "lora_loading": st.sampled_from(LORA_LOADING),
        "enable_prefix_caching": st.booleans(),
        "async_scheduling": st.booleans(),
        "scheduler_reserve_full_isl": st.booleans(),
        "watermark": st.sampled_from([0.0, 0.1]),
        "pinned": st.booleans(),
    }
)
POLICIES = (
    "scheduling_policy", "lora_eviction_policy", "lora_loading", "enable_prefix_caching", "async_scheduling",
    "scheduler_reserve_full_isl", "watermark",
)  # fmt: skip
quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def play(w: dict) -> tuple[RunTables, WorldBackend, EngineConfig]:
    # Requests tie here, and without the whole-prompt test ties under `priority` can livelock (test_waiting.py).
    if w.get("scheduling_policy") == "priority":
        w = {**w, "scheduler_reserve_full_isl": True}
    config = EngineConfig(
        max_loras=w["max_loras"],
        max_cpu_loras=w["max_loras"] + w["extra_cpu"],
        max_num_seqs=w["max_num_seqs"],
        max_num_batched_tokens=w["budget"],
        max_model_len=64,
        block_size=4,
        long_prefill_token_threshold=w["threshold"],
        **{key: w[key] for key in POLICIES if key in w},
    )
    backend = WorldBackend(w["blocks"], w["max_loras"])
    requests = random_requests(w["seed"], w["count"], w["adapters"], 30)
    catalogue = Catalogue.uniform(w["adapters"], [8, 16])
    pinned = (1,) if w.get("pinned") and w["max_loras"] > 1 else ()
    tables = simulate(requests, catalogue, config, backend, pinned=pinned, check=True, horizon_s=w["horizon_s"])
    return tables, backend, config


@quickly
@given(WORLD)
def test_i1_conservation(w: dict) -> None:
    tables, _, _ = play(w)
    r = tables.requests
    assert set(r["status"]) <= {"finished", "running", "waiting"}
    done = r[r["status"] == "finished"]
    assert (done["tokens_emitted"] == done["output_tokens"]).all()
    if w["horizon_s"] is None:
        assert len(done) == len(r) == w["count"]
        assert tables.steps["finished"].sum() == w["count"]


@quickly
@given(WORLD)
def test_i2_causality(w: dict) -> None:
    tables, _, _ = play(w)
    r = tables.requests[tables.requests["status"] == "finished"]
    assert (r["arrival_s"] <= r["first_scheduled_s"]).all()
    assert (r["first_scheduled_s"] < r["first_token_s"]).all()
    assert (r["first_token_s"] <= r["finish_s"]).all()
    assert (tables.steps["start_s"].diff().dropna() > 0).all()
    assert (tables.steps["end_s"].shift().dropna().to_numpy() <= tables.steps["start_s"].iloc[1:].to_numpy()).all()


@quickly
@given(WORLD)
def test_i3_i4_slots_and_residency(w: dict) -> None:
    tables, backend, config = play(w)  # the backend itself asserts residency in every step
    assert (tables.steps["distinct_adapters"] <= config.max_loras).all()
    assert len(backend.staged) <= config.host_loras


@quickly
@given(WORLD)
def test_i5_blocks(w: dict) -> None:
    tables, _, _ = play(w)  # the backend itself asserts that no block has two owners
    assert (tables.steps["used_blocks"] + tables.steps["free_blocks"] == w["blocks"] - 1).all()


@quickly
@given(WORLD)
def test_i6_limits(w: dict) -> None:
    tables, backend, config = play(w)
    assert (tables.steps["tokens"] <= config.max_num_batched_tokens).all()
    assert all(len(b.query_lens) <= config.max_num_seqs for b in backend.batches)
    assert len(backend.batches) >= len(tables.steps)


@quickly
@given(WORLD)
def test_i7_determinism(w: dict) -> None:
    (one, _, _), (two, _, _) = play(w), play(w)
    for name in ("requests", "steps", "adapters"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name), check_exact=True)


@quickly
@given(WORLD)
def test_i10_work_conservation(w: dict) -> None:
    tables, _, _ = play({**w, "horizon_s": None, "lora_loading": "blocking"})
    s, arrivals = tables.steps, np.sort(tables.requests["arrival_s"])
    for end, start, left in zip(s["end_s"], s["start_s"].iloc[1:], (s["running"] + s["waiting"]), strict=False):
        if start > end + 1e-12:
            assert left == 0, "idle while a request was there"
            assert np.isclose(arrivals, start).any()


def test_a_preempted_request_still_finishes() -> None:
    w = {"seed": 1, "count": 30, "adapters": 3, "max_loras": 2, "extra_cpu": 0, "blocks": 16}
    w |= {"max_num_seqs": 8, "budget": 64, "threshold": 0, "horizon_s": None}
    tables, _, _ = play(w)
    assert tables.requests["preemptions"].sum() > 0
    assert (tables.requests["status"] == "finished").all()


def test_two_adapters_one_slot_by_hand() -> None:
    """Two requests at t = 0 for adapters 1 and 2 and one slot: the second is skipped until the first has finished."""
    from workloads.requests import RequestTable

    two = np.array([2, 2])
    table = RequestTable(np.zeros(2), two, two, np.array([1, 2]))
    config = EngineConfig(max_loras=1, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=64, block_size=4)
    tables = simulate(table, Catalogue.uniform(2, [8]), config, WorldBackend(16, 1))
    first = 0.005 + 0.002 + 0.001 + 2e-5
    second = first + 0.001 + 1e-5
    assert tables.requests["first_token_s"].tolist() == pytest.approx([first, second + first])
    assert tables.requests["finish_s"].tolist() == pytest.approx([second, 2 * second])
    assert tables.requests["skips"].tolist() == [0, 2]
    assert tables.adapters["evictions"].tolist() == [1, 0]
