"""Whole copies beside deltas: what a swap costs, arms with known answers, break-even, and what is printed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pytest

from backend.base import AdapterShape, StepBatch, StepTiming
from backend.errors import BackendError
from backend.geometry import load_geometry
from backend.profile import load_profile
from sim.cli import main
from sim.config import EngineConfig
from sim.copies import (
    Arm,
    Cell,
    Question,
    Table,
    as_models,
    cheaper,
    dedicated,
    deltas,
    most_resident,
    of_tenants,
    time_shared,
)
from sim.deployment import Deployment, attempt, open_replica
from sim.errors import ScenarioError
from sim.fleet_config import FleetConfig
from sim.plan_grid import Grid
from sim.scenario import load_scenario
from sim.slo import parse_slo
from sim.swapping import Swap, SwappedModels, model_load_bytes_per_s
from sim.traffic import Traffic, merged
from workloads.adapters import TARGET_MODULES, Catalogue
from workloads.requests import RequestTable

H100, VLLM = "h100-llama-3.1-8b", "vllm-0.24-h100-llama-3.1-8b"
ENGINE = EngineConfig(max_loras=1, max_cpu_loras=100, max_lora_rank=8, max_model_len=1024)
WEIGHTS = load_geometry("llama-3.1-8b").weights_bytes


def quiet(tenants: int, seed: int = 0, gap_s: float = 3.0, each: int = 2) -> Traffic:
    """`each` requests of every tenant, one at a time: long pauses between them."""
    rng = np.random.default_rng(seed)
    count = tenants * each
    arrival = gap_s * np.arange(1.0, count + 1)
    lengths = rng.integers(20, 100, count), np.full(count, 5)
    return Traffic(
        RequestTable(arrival, *lengths, np.tile(np.arange(1, tenants + 1), each)), Catalogue.uniform(tenants, [8])
    )


def copies(resident: int, replicas: int = 1, **engine) -> Deployment:
    fleet = FleetConfig(replicas, router="adapter_affinity")
    return Deployment(
        "llama-3.1-8b",
        H100,
        replace(ENGINE, max_loras=resident, **engine),
        fleet,
        lora=False,
        swap=Swap(resident, 50e9),
    )


def question(slo: str = "ttft_p99<=1s", most: int = 16) -> Question:
    scenario = load_scenario("demo-plan")
    return Question(scenario, parse_slo(slo), Grid(), {H100: 2.5}, {H100: 50e9}, most)


def test_a_swap_costs_the_weights_at_the_bandwidth_and_the_first_models_nothing() -> None:
    backend = open_replica(copies(2))
    assert isinstance(backend, SwappedModels)
    shape = AdapterShape(1, 8, TARGET_MODULES)
    whole = pytest.approx(load_profile(H100).load.latency_s + WEIGHTS / 50e9)
    assert [backend.load(shape, 0).elapsed_s for _ in range(4)] == [0.0, 0.0, whole, whole]
    assert backend.stage(shape).elapsed_s == 0


def test_a_step_is_the_base_steps_of_its_models_one_after_the_other() -> None:
    def step(deployment: Deployment, contexts: tuple[int, ...], slots: tuple[int, ...]) -> StepTiming:
        many = len(slots)
        return open_replica(deployment).execute(StepBatch((1,) * many, contexts, slots, (True,) * many))

    plain = Deployment("llama-3.1-8b", H100, ENGINE, FleetConfig())
    assert step(copies(1), (100, 200), (0, 0)) == step(plain, (100, 200), (-1, -1))
    both = step(copies(2), (100, 200, 300), (0, 1, 0))
    apart = step(plain, (100, 300), (-1, -1)), step(plain, (200,), (-1,))
    assert both.device_s == pytest.approx(sum(one.device_s for one in apart))
    assert both.host_s == max(one.host_s for one in apart)


def test_resident_models_take_their_weights_from_the_kv_cache() -> None:
    blocks = [open_replica(copies(n)).capacity().num_gpu_blocks for n in (1, 2, 3)]
    block = 16 * load_geometry("llama-3.1-8b").kv_bytes_per_token
    assert blocks[0] - blocks[1] == pytest.approx(WEIGHTS / block, abs=1)
    assert blocks[1] - blocks[2] == pytest.approx(WEIGHTS / block, abs=1)
    assert most_resident(copies) == 4
    with pytest.raises(BackendError, match="does not fit"):
        open_replica(copies(5))


def test_lone_requests_wait_for_one_swap_each() -> None:
    """Every request of another model than the last one, far apart: TTFT is the swap and a prefill."""
    crowd = quiet(3)
    promise = parse_slo("ttft_mean<=10s")
    swap = load_profile(H100).load.latency_s + WEIGHTS / 50e9
    alone = attempt(
        copies(1), [replace(crowd, requests=replace(crowd.requests, adapter=np.zeros(6, np.int64)))], promise
    )
    turns = attempt(copies(1), [crowd], promise)
    assert turns.values["ttft_mean"] - alone.values["ttft_mean"] == pytest.approx(swap * 5 / 6, rel=1e-6)
    enough = attempt(copies(3), [crowd], promise)
    assert enough.values == alone.values


def test_arms_of_quiet_tenants() -> None:
    """One engine serves them all; copies need a GPU each, or one that swaps if the promise allows a swap."""
    q, crowd = question(), [quiet(5)]
    models = [as_models(t, base=False) for t in crowd]
    alone = dedicated(q, models)
    assert alone is not None
    assert (alone.gpus, alone.cost) == (5, 12.5)
    one = deltas(q, crowd)
    assert one is not None
    assert one.gpus == 1
    shared = time_shared(q, models, alone)
    assert shared is not None
    assert shared.gpus == 1
    tight = time_shared(question("ttft_p99<=0.2s"), models, alone)
    assert tight is not None
    assert tight.gpus == 2, "with three and two models in the memory of two GPUs nobody is swapped out"
    tighter = time_shared(question("ttft_p99<=1ms"), models, alone)
    assert tighter is not None
    assert tighter.gpus == 5


def test_a_tenant_without_requests_has_a_gpu_all_the_same() -> None:
    some = quiet(3)
    found = dedicated(question(), [replace(some, catalogue=Catalogue.uniform(4, [8]))])
    assert found is not None
    assert found.gpus == 4


def test_nothing_keeps_a_promise_below_one_step() -> None:
    q, models = question("ttft_p99<=1ms", most=2), [quiet(2)]
    assert dedicated(q, models) is None
    assert time_shared(q, models, None) is None
    assert deltas(q, models) is None


def test_the_same_requests_belong_to_fewer_tenants() -> None:
    whole = quiet(7)
    three = of_tenants(whole, 3)
    assert len(three.catalogue) == 3
    assert np.array_equal(three.requests.arrival_s, whole.requests.arrival_s)
    assert np.array_equal(three.requests.adapter, (whole.requests.adapter - 1) % 3 + 1)
    assert np.array_equal(of_tenants(whole, 7).requests.adapter, whole.requests.adapter)


def test_models_are_adapters_and_the_base() -> None:
    mixed = quiet(3)
    mixed = replace(mixed, requests=replace(mixed.requests, adapter=np.array([0, 1, 2, 3, 0, 1])))
    models = as_models(mixed, base=True)
    assert models.requests.adapter.tolist() == [4, 1, 2, 3, 4, 1]
    parts = [merged(models, m) for m in range(1, 5)]
    assert sum(len(p.requests) for p in parts) == len(mixed.requests), "every request is served by one copy"
    assert all((p.requests.adapter == 0).all() for p in parts)


class Planted(Table):
    """Cells from a formula: deltas cost 5 a unit of the rate, copies 1 each."""

    def fill(self, keys) -> None:
        for f, n in keys:
            found = {"deltas": Arm(5, 5 * f, ""), "dedicated": Arm(n, n, ""), "time_shared": None}
            self.cells[f, n] = Cell(n, f, 10 * f, found)


@pytest.mark.parametrize(("factor", "even"), [(1.0, 6), (4.0, 21), (0.1, 1), (30.0, None)])
def test_bisection_finds_a_planted_break_even(factor: float, even: int | None) -> None:
    with joblib.Parallel(n_jobs=1) as pool:
        table = Planted(question(), [quiet(2)], pool)
        table.fill([(factor, n) for n in (1, 2, 4, 8, 16, 32, 64, 128)])
        assert table.break_even(factor, "dedicated") == even
        assert table.break_even(factor, "time_shared") == 1, "deltas keep a promise that this arm cannot"


def test_an_arm_that_serves_beats_one_that_cannot() -> None:
    one = Arm(1, 1.0, "")
    assert not cheaper(Cell(1, 1, 1, {"deltas": None, "dedicated": one}), "dedicated")
    assert not cheaper(Cell(1, 1, 1, {"deltas": one, "dedicated": one}), "dedicated")
    assert cheaper(Cell(1, 1, 1, {"deltas": one, "dedicated": None}), "dedicated")


def test_a_bandwidth_is_measured_or_given() -> None:
    assert model_load_bytes_per_s(H100, None) == load_profile(H100).load.bytes_per_s
    assert model_load_bytes_per_s(VLLM, 25) == 25e9
    with pytest.raises(ScenarioError, match="no measured load bandwidth; give --model-load-gb-s"):
        model_load_bytes_per_s(VLLM, None)


SMALL = [
    "demo-plan",
    "--slo",
    "ttft_p99<=1s",
    "--tenants",
    "1",
    "3",
    "--duration-s",
    "4",
    "--seeds",
    "1",
    "--jobs",
    "1",
]


def test_copies_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c"
    assert main(["copies", *SMALL, "--gpu-hour-usd", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "measured, pinned host memory to GPU" in printed
    assert "cost less from 2 tenants on" in printed
    data = json.loads((out / "copies.json").read_text())
    assert [c["tenants"] for c in data["cells"]] == [1, 2, 3], "between 1 and 3 by bisection"
    assert [c["arms"]["dedicated"]["cost"] for c in data["cells"]] == [2.0, 4.0, 6.0]
    assert data["break_even"] == [{"factor": 1.0, "dedicated": 2, "time_shared": None}], "three models fit into one GPU"
    assert (out / "copies.png").is_file()
    assert main(["report", str(out)]) == 0
    assert "time-shared copies" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tenants", "0"], "--tenants 0: must be from 1 to the 200 adapters"),
        (["--tenants", "201"], "--tenants 201"),
        (["--rate-factor", "0"], "--rate-factor 0.0"),
        (["--model-load-gb-s", "0"], "--model-load-gb-s is 0.0"),
        (["--profile", VLLM], "no measured load bandwidth"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--duration-s", "-1"], "--duration-s is -1"),
    ],
)
def test_copies_that_cannot_be(more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    assert main(["copies", *SMALL, *more, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()
