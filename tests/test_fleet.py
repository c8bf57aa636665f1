"""Fleets: nothing is lost when replicas fail, queueing theory's answers, and one replica is what it was without a fleet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import WorldBackend, random_requests

from sim.cli import main
from sim.config import EngineConfig
from sim.engine import simulate
from sim.errors import ScenarioError
from sim.fleet import Fleet
from sim.fleet_config import Autoscaling, FleetConfig, FleetEvent, fleet_of
from sim.fleet_member import NOWHERE
from sim.fleet_tables import fleet_tables
from sim.placement import PLACEMENTS
from sim.router import ROUTERS
from sim.run import execute, run_scenario
from sim.scenario import load_scenario
from workloads.adapters import Catalogue
from workloads.requests import RequestTable

CONFIG = EngineConfig(
    max_loras=2, max_cpu_loras=3, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, block_size=4
)
ADAPTERS = Catalogue.uniform(6, [8, 16])
quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def world(requests: RequestTable, fleet: FleetConfig, config: EngineConfig = CONFIG, **more) -> Fleet:
    return Fleet(requests, ADAPTERS, config, lambda: WorldBackend(40, config.max_loras), fleet, **more)


FLEET = st.fixed_dictionaries(
    {
        "replicas": st.integers(1, 4),
        "router": st.sampled_from(sorted(ROUTERS)),
        "placement": st.sampled_from(sorted(PLACEMENTS)),
        "startup_s": st.sampled_from([0.0, 0.02]),
        "copies": st.integers(1, 3),
    }
)
LIFE = st.lists(
    st.tuples(st.integers(0, 3), st.floats(0, 0.3), st.floats(0, 0.1)), max_size=4, unique_by=lambda e: e[0]
)


@quickly
@given(FLEET, LIFE, st.integers(0, 10_000), st.sampled_from([None, 0.1]), st.booleans())
def test_i1_failures_lose_and_double_nothing(
    f: dict, life: list, seed: int, horizon_s: float | None, back: bool
) -> None:
    events = [FleetEvent(at, "fail", i) for i, at, _ in life if i < f["replicas"]]
    if back:
        events += [FleetEvent(at + away, "recover", i) for i, at, away in life if i < f["replicas"]]
    requests = random_requests(seed, 40, 6, 30)
    fleet = world(requests, FleetConfig(**f, events=tuple(events)), check=True)
    fleet.run(horizon_s)
    r = fleet_tables(fleet).requests
    assert r["request_id"].tolist() == list(range(len(r)))
    assert r["status"].isin(["finished", "running", "waiting"]).all()
    inside = [s.request.request_id for m in fleet.members for s in m.engine.scheduler.unfinished()]
    held = [t.state.request.request_id for t in fleet.held]
    finished = r.loc[r["status"] == "finished", "request_id"].tolist()
    assert sorted(inside + held + finished) == list(range(len(r)))
    done = r[r["status"] == "finished"]
    assert (done["tokens_emitted"] == done["output_tokens"]).all()
    assert (done["arrival_s"] <= done["first_scheduled_s"]).all()
    assert (done["first_scheduled_s"] < done["first_token_s"]).all()
    if horizon_s is None and (back or len(events) < f["replicas"]):
        assert len(done) == len(r) == 40
    if not life:
        assert r["requeues"].sum() == 0


def test_tokens_of_attempts_that_failed_are_accounted_for() -> None:
    n = 30
    requests = RequestTable(
        np.linspace(0, 0.1, n), np.full(n, 4, np.int64), np.full(n, 20, np.int64), np.arange(n, dtype=np.int64) % 7
    )
    fleet = world(requests, FleetConfig(2, events=(FleetEvent(0.08, "fail", 0),)))
    fleet.run()
    tables = fleet_tables(fleet)
    sampled = sum(
        sum(batch.samples)
        for member in fleet.members
        for engine in member.lives
        for batch in engine.backend.batches[: len(engine.rows)]  # a step that was under way yields nothing
    )
    assert (tables.requests["status"] == "finished").all()
    assert tables.requests["requeues"].sum() > 0
    assert tables.requests["lost_tokens"].sum() > 0
    assert sampled == tables.requests["tokens_emitted"].sum() + tables.requests["lost_tokens"].sum()
    assert (tables.requests.loc[tables.requests["requeues"] > 0, "replica"] == 1).all()


def test_requests_wait_at_the_router_while_no_replica_is_there() -> None:
    requests = RequestTable(np.array([0.0, 0.5]), *(np.full(2, 3, np.int64) for _ in range(2)), np.zeros(2, np.int64))
    lost = FleetEvent(0.2, "fail", 0)
    fleet = world(requests, FleetConfig(1, events=(lost,), startup_s=0.5))
    fleet.run()
    table = fleet_tables(fleet).requests
    assert table["status"].tolist() == ["finished", "waiting"]
    assert table["replica"].tolist() == [0, NOWHERE]
    fleet = world(requests, FleetConfig(1, events=(lost, FleetEvent(1.0, "recover", 0)), startup_s=0.5))
    fleet.run()
    tables = fleet_tables(fleet)
    assert tables.requests["first_scheduled_s"].tolist() == [0.0, 1.5]
    assert tables.replicas is not None
    assert tables.replicas["paid_s"].tolist() == pytest.approx([0.2 + tables.horizon_s - 1.0])


@quickly
@given(st.integers(0, 10_000), st.sampled_from(sorted(ROUTERS)), st.sampled_from([None, 0.05]), st.booleans())
def test_i7_a_fleet_of_one_is_one_engine(seed: int, router: str, horizon_s: float | None, later: bool) -> None:
    requests = random_requests(seed, 30, 6, 30)
    config = replace(CONFIG, async_scheduling=later)
    alone = simulate(requests, ADAPTERS, config, WorldBackend(40, 2), horizon_s=horizon_s)
    fleet = world(requests, FleetConfig(1, router=router), config)
    fleet.run(horizon_s)
    tables = fleet_tables(fleet)
    for name in ("requests", "steps", "adapters", "moves"):
        one, other = getattr(alone, name), getattr(tables, name)
        pd.testing.assert_frame_equal(one, other[list(one.columns)], check_exact=True)
    assert tables.horizon_s == alone.horizon_s


@quickly
@given(FLEET, st.integers(0, 10_000))
def test_i7_the_same_fleet_gives_the_same_tables(f: dict, seed: int) -> None:
    def play() -> tuple[pd.DataFrame, pd.DataFrame]:
        fleet = world(random_requests(seed, 30, 6, 30), FleetConfig(**f), seed=seed)
        fleet.run()
        tables = fleet_tables(fleet)
        return tables.requests, tables.steps

    for one, two in zip(play(), play(), strict=True):
        pd.testing.assert_frame_equal(one, two, check_exact=True)


ONE_AT_A_TIME = replace(CONFIG, max_num_seqs=1, enable_prefix_caching=False)
SERVICE_S = 0.001 + 1e-5 * 4


def mean_wait(rate_rps: float, replicas: int, router: str, count: int = 12_000) -> float:
    """Of Poisson requests that take one step of `SERVICE_S` each, one at a time."""
    rng = np.random.default_rng(5)
    requests = RequestTable(
        rng.exponential(1 / rate_rps, count).cumsum(), np.full(count, 4, np.int64), np.ones(count, np.int64),
        np.zeros(count, np.int64),
    )  # fmt: skip
    fleet = world(requests, FleetConfig(replicas, router=router), ONE_AT_A_TIME)
    fleet.run()
    table = fleet_tables(fleet).requests
    return float((table["first_scheduled_s"] - table["arrival_s"]).mean())


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_waits_are_those_of_an_m_d_1_queue(load: float) -> None:
    """Pollaczek and Khinchine: load × service / 2 (1 - load), for each of two replicas behind a random router, too."""
    wanted = load * SERVICE_S / (2 * (1 - load))
    assert mean_wait(load / SERVICE_S, 1, "round_robin") == pytest.approx(wanted, rel=0.07)
    assert mean_wait(2 * load / SERVICE_S, 2, "random") == pytest.approx(wanted, rel=0.07)


def test_looking_at_the_queues_beats_drawing_lots() -> None:
    lots, turn, least = (mean_wait(1.6 / SERVICE_S, 2, name) for name in ("random", "round_robin", "least_outstanding"))
    assert least <= turn < lots, "with equal services taking turns is as good as looking"


def test_a_replica_that_is_removed_finishes_what_it_has() -> None:
    requests = random_requests(3, 40, 6, 30)
    fleet = world(requests, FleetConfig(2, events=(FleetEvent(0.02, "remove", 0),)))
    fleet.run()
    tables = fleet_tables(fleet)
    assert (tables.requests["status"] == "finished").all()
    assert tables.requests["requeues"].sum() == 0
    assert (tables.requests.loc[tables.requests["arrival_s"] > 0.02, "replica"] == 1).all()


def test_autoscaling_follows_the_load_up_and_down() -> None:
    n = 3000
    busy = np.linspace(0, 2, n)
    requests = RequestTable(
        np.append(busy, 12.0), np.full(n + 1, 8, np.int64), np.full(n + 1, 20, np.int64), np.zeros(n + 1, np.int64)
    )
    scaling = Autoscaling(max_replicas=4, target=8, period_s=0.1, stabilization_s=1.0)
    fleet = world(requests, FleetConfig(1, autoscaling=scaling, startup_s=0.2))
    fleet.run()
    tables = fleet_tables(fleet)
    assert (tables.requests["status"] == "finished").all()
    assert len(fleet.members) == 4
    assert sum(member.status == "up" for member in fleet.members) == 1
    assert tables.replicas is not None
    alone = world(requests, FleetConfig(1))
    alone.run()
    slow = fleet_tables(alone).requests
    assert (tables.requests["finish_s"] - tables.requests["arrival_s"]).mean() < 0.8 * (
        slow["finish_s"] - slow["arrival_s"]
    ).mean()
    assert tables.replicas["paid_s"].sum() < 4 * tables.horizon_s


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"replicas": 0}, "fleet.replicas is 0"),
        ({"replicas": 1.5}, "fleet.replicas is 1.5, must be a whole number"),
        ({"router": "best"}, "fleet.router is 'best', must be one of round_robin"),
        ({"placement": "best"}, "fleet.placement is 'best'"),
        ({"hot_share": 0}, "fleet.hot_share"),
        ({"colour": 1}, "fleet.colour: unknown key"),
        ({"events": 3}, "must be a list of tables"),
        ({"events": [{"kind": "fail", "replica": 0}]}, r"fleet.events\[0\].at_s is missing"),
        ({"events": [{"at_s": 1, "kind": "fail"}]}, r"fleet.events\[0\].replica"),
        ({"events": [{"at_s": 1, "kind": "fail", "replica": 7}]}, "must be 0 to 0"),
        ({"autoscaling": {"max_replicas": 4}}, "fleet.autoscaling.target is missing"),
        ({"autoscaling": {"max_replicas": 4, "target": 0}}, "fleet.autoscaling.target"),
        ({"replicas": 9, "autoscaling": {"max_replicas": 4, "target": 1}}, "fleet.replicas is 9"),
        ({"autoscaling": {"max_replicas": 4, "target": 1, "signal": "mood"}}, "fleet.autoscaling.signal"),
    ],
)
def test_fleets_that_cannot_be(table: dict, says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        fleet_of(table)


def test_an_event_that_cannot_happen_is_told() -> None:
    twice = (FleetEvent(0.01, "fail", 0), FleetEvent(0.02, "fail", 0))
    with pytest.raises(ScenarioError, match=r"fleet.events\[1\]: replica 0 is down at 0.02 s, cannot fail"):
        world(random_requests(1, 40, 6, 30), FleetConfig(2, events=twice)).run()


def test_a_table_goes_there_and_back() -> None:
    fleet = FleetConfig(3, "rendezvous", events=(FleetEvent(1.0, "add"),), autoscaling=Autoscaling(4, 2.0))
    assert fleet_of(fleet.to_table()) == fleet
    assert FleetConfig().to_table() == {}


def test_the_shipped_fleet_runs_again_from_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_scenario("demo-fleet", out=tmp_path / "a", duration_s=30)
    second = run_scenario(tmp_path / "a" / "scenario.toml", out=tmp_path / "b")
    for name in ("requests", "steps", "adapters", "moves", "replicas"):
        pd.testing.assert_frame_equal(getattr(first.tables, name), getattr(second.tables, name), check_exact=True)
    assert first.summary["requeues"] > 0
    assert first.summary["replicas"] == 4
    assert main(["report", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    events = json.loads((tmp_path / "a" / "timeline.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {1, 2, 3, 4}


def test_one_machine_is_no_fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo-fleet", "--backend", "cpu", "--out", str(tmp_path / "o")]) == 2
    assert "fleet: needs backend.kind profile" in capsys.readouterr().err


def test_a_replica_that_fails_and_comes_back_is_one_in_the_totals() -> None:
    """`load_share` is over replicas, however many engines each of them was."""
    tables, summary, _ = execute(load_scenario("demo-fleet"))
    steps = tables.steps
    assert tables.replicas is not None
    assert tables.replicas["failures"].sum() > 0
    engines = steps["replica"].nunique()
    assert summary["steps"] == len(steps)
    assert summary["load_share"] == pytest.approx(steps["load_s"].sum() / tables.horizon_s / engines)
    lengths = steps["end_s"] - steps["start_s"]
    usage = steps["used_blocks"] / (steps["used_blocks"] + steps["free_blocks"])
    assert summary["mean_kv_usage"] == pytest.approx((usage * lengths).sum() / lengths.sum())
    assert summary["max_kv_usage"] == usage.max()
