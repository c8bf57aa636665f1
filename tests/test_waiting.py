"""Waiting policies: order, victims, and ageing bounds that nothing breaks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import WorldBackend, random_requests

from sim.config import EngineConfig
from sim.engine import simulate
from sim.errors import LivelockError
from sim.kv_cache import BlockPool
from sim.scheduler import Scheduler
from sim.state import RequestState
from sim.tables import RunTables
from sim.waiting import WAITING, Waiting
from workloads.adapters import Catalogue
from workloads.requests import Request, RequestTable


def state(
    index: int, *, at: float = 0.0, prompt: int = 4, output: int = 4, adapter: int = 0, priority: int = 0
) -> RequestState:
    return RequestState(Request(index, at, prompt, output, adapter, priority), output)


def queue(name: str, states: list[RequestState], ageing_s: float = 10.0) -> Waiting:
    waiting = WAITING[name](ageing_s)
    for s in states:
        waiting.add(s)
    return waiting


def order(waiting: Waiting, now_s: float = 0.0, resident: tuple[int, ...] = ()) -> list[int]:
    return [s.request.request_id for s in waiting.candidates(now_s, resident)]


def test_fcfs_keeps_arrival_order_and_takes_the_preempted_first() -> None:
    states = [state(0), state(1), state(2)]
    waiting = queue("fcfs", states[:2])
    waiting.requeue(states[2])
    assert order(waiting) == [2, 0, 1]
    assert waiting.victim(states) is states[2]


def test_priority_orders_by_value_then_arrival_and_preempts_the_first_of_the_last() -> None:
    states = [state(0, priority=2), state(1, priority=1, at=0.5), state(2, priority=1), state(3, priority=2)]
    waiting = queue("priority", states)
    assert order(waiting) == [2, 1, 0, 3]
    assert waiting.victim(states) is states[0]
    waiting.remove(states[1])
    assert order(waiting) == [2, 0, 3]


def test_sjf_takes_the_least_work_first() -> None:
    waiting = queue("sjf", [state(0, prompt=9), state(1, output=2), state(2, prompt=5)])
    assert order(waiting) == [1, 2, 0]
    assert len(waiting) == 3


def test_adapter_aware_prefers_what_is_resident() -> None:
    waiting = queue("adapter_aware", [state(0, adapter=1), state(1, adapter=2), state(2), state(3, adapter=1)])
    assert order(waiting, resident=(2,)) == [1, 2, 0, 3]
    assert order(waiting, resident=(1,)) == [0, 2, 3, 1]


@pytest.mark.parametrize("name", ["sjf", "adapter_aware"])
def test_the_aged_come_first_and_hold_the_others_back(name: str) -> None:
    old = state(0, at=0.0, prompt=50, adapter=3)
    waiting = queue(name, [old, state(1, at=4.0, adapter=1), state(2, at=4.5, prompt=2, adapter=1)], ageing_s=5.0)
    assert order(waiting, 4.9, resident=(1,))[-1] == 0
    assert not waiting.is_barrier(old, 4.9)
    assert order(waiting, 5.0, resident=(1,))[0] == 0
    assert waiting.is_barrier(old, 5.0)


def test_an_aged_request_empties_the_slots_for_itself() -> None:
    """One slot, adapter 1 runs and more of it waits: fcfs skips adapter 2 for ever, ageing stops admitting others."""
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, scheduling_policy="adapter_aware", ageing_s=5.0)
    scheduler = Scheduler(config, BlockPool(100, 16))
    scheduler.add(state(0, adapter=1))
    scheduler.schedule(0.0, (1,))
    scheduler.add(state(1, at=0.0, adapter=2))
    scheduler.add(state(2, at=1.0, adapter=1))
    assert [i.state.request.request_id for i in scheduler.schedule(1.0, (1,)).admitted] == [2]
    scheduler.add(state(3, at=2.0, adapter=1))
    plan = scheduler.schedule(5.0, (1,))
    assert [s.request.request_id for s in plan.skipped] == [1]
    assert not plan.admitted
    assert [s.request.request_id for s in scheduler.waiting] == [1, 3]


def world(w: dict, **settings_: object) -> RunTables:
    config = EngineConfig(
        max_loras=w["max_loras"],
        max_num_seqs=w["max_num_seqs"],
        max_num_batched_tokens=w["budget"],
        max_model_len=64,
        block_size=4,
        **settings_,  # type: ignore[arg-type]
    )
    requests = random_requests(w["seed"], w["count"], w["adapters"], 30)
    return simulate(
        requests, Catalogue.uniform(w["adapters"], [8]), config, WorldBackend(w["blocks"], w["max_loras"]), check=True
    )


WORLD = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "count": st.integers(2, 60),
        "adapters": st.integers(1, 9),
        "max_loras": st.integers(1, 3),
        "blocks": st.integers(17, 60),
        "max_num_seqs": st.integers(1, 8),
        "budget": st.integers(8, 64),
    }
)


@settings(max_examples=60, deadline=None)
@given(WORLD, st.sampled_from(["sjf", "adapter_aware"]), st.sampled_from([0.02, 0.1]))
def test_nobody_overtakes_a_request_that_has_aged(w: dict, policy: str, ageing_s: float) -> None:
    """The starvation bound: when a request is first admitted, none that arrived `ageing_s` ago and before it waits."""
    r = world(w, scheduling_policy=policy, ageing_s=ageing_s).requests
    assert (r["status"] == "finished").all()
    first, arrival = r["first_scheduled_s"].to_numpy(), r["arrival_s"].to_numpy()
    for later in range(len(r)):
        aged = (first[later] - arrival >= ageing_s) & (arrival < arrival[later])
        assert (first[aged] <= first[later]).all()


@settings(max_examples=40, deadline=None)
@given(WORLD, st.sampled_from(sorted(WAITING)))
def test_every_policy_finishes_everything(w: dict, policy: str) -> None:
    r = world(w, scheduling_policy=policy).requests
    assert (r["status"] == "finished").all()
    assert (r["tokens_emitted"] == r["output_tokens"]).all()


def test_sjf_shortens_the_mean_and_adapter_aware_saves_loads() -> None:
    """Each does what it is there for, on a world where the queue is long."""
    w = {"seed": 3, "count": 200, "adapters": 8, "max_loras": 2, "blocks": 60, "max_num_seqs": 4, "budget": 64}
    runs = {p: world(w, scheduling_policy=p, ageing_s=100.0) for p in ("fcfs", "sjf", "adapter_aware")}
    e2e = {p: float((t.requests["finish_s"] - t.requests["arrival_s"]).mean()) for p, t in runs.items()}
    loads = {p: int(t.adapters["activations"].sum()) for p, t in runs.items()}
    assert e2e["sjf"] < 0.9 * e2e["fcfs"]
    assert loads["adapter_aware"] <= 0.9 * loads["fcfs"]


def test_a_livelock_is_said_not_simulated() -> None:
    """vLLM preempts the first of equals, which has most progress: without the whole-prompt test that can go on for ever."""
    prompt = np.array([86, 118, 82, 104, 86, 88, 50, 109, 20, 73, 90])
    output = np.array([6, 4, 3, 3, 3, 4, 6, 7, 1, 7, 4])
    base = np.zeros(len(prompt), dtype=np.int64)
    config = EngineConfig(
        max_num_seqs=11, max_num_batched_tokens=31, max_model_len=200, block_size=4, long_prefill_token_threshold=4,
        scheduling_policy="priority", scheduler_reserve_full_isl=False, enable_prefix_caching=False,
    )  # fmt: skip
    with pytest.raises(LivelockError, match="preempt each other"):
        simulate(RequestTable(base.astype(float), prompt, output, base), Catalogue(()), config, WorldBackend(33, 1))
