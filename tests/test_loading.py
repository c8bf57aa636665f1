"""Asynchronous scheduling and overlapped adapter loading, timed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import WorldBackend, random_requests

from backend.contention import Contention
from sim.config import EngineConfig
from sim.engine import simulate
from sim.tables import RunTables
from workloads.adapters import Catalogue
from workloads.requests import RequestTable

STEP_S, TOKEN_S, STAGE_S, LOAD_S = 0.001, 1e-5, 0.005, 0.002


def run(adapters: list[int], output: list[int], *, host_s: float = 0.0, **engine: object) -> RunTables:
    """Requests of two prompt tokens at t = 0."""
    n = len(adapters)
    table = RequestTable(np.zeros(n), np.full(n, 2), np.array(output), np.array(adapters))
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=8, max_model_len=64, block_size=4, **engine)  # type: ignore[arg-type]
    backend = WorldBackend(32, config.max_loras, host_s=host_s)
    return simulate(table, Catalogue.uniform(3, [8]), config, backend, check=True)


def test_async_scheduling_hides_the_host_behind_the_gpu() -> None:
    host_s = 0.0004
    first, later = STEP_S + 2 * TOKEN_S, STEP_S + TOKEN_S
    sync = run([0], [3], host_s=host_s)
    ahead = run([0], [3], host_s=host_s, async_scheduling=True)
    assert sync.requests["finish_s"][0] == pytest.approx(first + 2 * later + 3 * host_s)
    assert ahead.requests["first_token_s"][0] == pytest.approx(host_s + first)
    assert ahead.requests["finish_s"][0] == pytest.approx(host_s + first + 2 * later)
    assert len(sync.steps) == len(ahead.steps) == 3


def test_async_scheduling_cannot_hide_more_than_the_gpu_takes() -> None:
    host_s = 0.005
    ahead = run([0], [3], host_s=host_s, async_scheduling=True)
    # The first two steps are prepared at once; the third when the first has ended.
    second_end = host_s + 2 * STEP_S + 3 * TOKEN_S
    third_end = max(host_s + STEP_S + 2 * TOKEN_S + host_s, second_end) + STEP_S + TOKEN_S
    assert ahead.requests["finish_s"][0] == pytest.approx(third_end)


def test_blocking_loads_hold_the_base_request_up_and_overlapped_ones_do_not() -> None:
    blocking = run([0, 1], [20, 2])
    overlapped = run([0, 1], [20, 2], lora_loading="overlapped")
    assert blocking.requests["first_token_s"][0] == pytest.approx(STAGE_S + LOAD_S + STEP_S + 4 * TOKEN_S)
    assert overlapped.requests["first_token_s"][0] == pytest.approx(STEP_S + 2 * TOKEN_S)
    arrived = STAGE_S + LOAD_S
    assert arrived < overlapped.requests["first_token_s"][1] < arrived + 2 * (STEP_S + 4 * TOKEN_S)
    assert overlapped.requests["skips"][1] == 0


def test_an_engine_that_only_waits_for_an_adapter_sleeps_until_it_is_there() -> None:
    tables = run([2], [1], lora_loading="overlapped")
    assert tables.requests["first_token_s"][0] == pytest.approx(STAGE_S + LOAD_S + STEP_S + 2 * TOKEN_S)
    assert len(tables.steps) == 1


def test_overlapped_loads_go_one_after_the_other_and_take_only_free_slots() -> None:
    tables = run([1, 2, 3], [30, 30, 2], lora_loading="overlapped", max_loras=2)
    first = tables.requests["first_scheduled_s"]
    assert STAGE_S + LOAD_S <= first[0] < first[1]
    assert first[1] >= 2 * (STAGE_S + LOAD_S)
    assert first[2] >= tables.requests["finish_s"][:2].min() + STAGE_S + LOAD_S
    assert tables.adapters["activations"].tolist() == [1, 1, 1]


class Narrow(WorldBackend):
    """Loads take three times as long beside steps, steps twice as long beside a load, and four times with three tokens or more."""

    contention = Contention(step=2.0, eager=4.0, load=3.0, captured_rows=2)


def test_overlapped_loads_and_steps_slow_each_other_down_as_measured() -> None:
    table = RequestTable(np.zeros(2), np.full(2, 2), np.array([20, 2]), np.array([0, 1]))
    engine = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 64, "block_size": 4}
    runs = {}
    for loading in ("blocking", "overlapped"):
        config = EngineConfig(lora_loading=loading, **engine)  # type: ignore[arg-type]
        runs[loading] = simulate(table, Catalogue.uniform(3, [8]), config, Narrow(32, config.max_loras), check=True)
    moves = runs["overlapped"].moves.set_index("kind")
    assert moves.loc["load", "end_s"] - moves.loc["load", "start_s"] == pytest.approx(3 * LOAD_S)
    arrived = STAGE_S + 3 * LOAD_S
    steps = runs["overlapped"].steps
    beside = steps[steps["start_s"] < arrived]
    assert beside["device_s"].tolist() == pytest.approx([2 * (STEP_S + t * TOKEN_S) for t in beside["tokens"]])
    assert set(beside["tokens"]) == {1, 2}
    after = steps[steps["start_s"] >= arrived]
    assert after["device_s"].tolist() == pytest.approx([STEP_S + t * TOKEN_S for t in after["tokens"]])
    blocking = runs["blocking"].moves.set_index("kind")
    assert blocking.loc["load", "end_s"] - blocking.loc["load", "start_s"] == pytest.approx(LOAD_S)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), slots=st.integers(1, 4), ahead=st.booleans(), extra=st.integers(0, 4))
def test_overlapped_loading_finishes_everything(seed: int, slots: int, ahead: bool, extra: int) -> None:
    config = EngineConfig(
        max_loras=slots, max_cpu_loras=slots + extra, max_num_seqs=6, max_num_batched_tokens=32, max_model_len=64,
        block_size=4, lora_loading="overlapped", async_scheduling=ahead,
    )  # fmt: skip
    tables = simulate(
        random_requests(seed, 30, 9, 30), Catalogue.uniform(9, [8]), config, WorldBackend(24, slots), check=True
    )
    assert (tables.requests["status"] == "finished").all()
    assert (tables.steps["load_s"] == 0).all()
