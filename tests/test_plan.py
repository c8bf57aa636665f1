"""Plans: the promise, early stops that prove, the search against exhaustive search, bisection, and what is printed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.cli import main
from sim.config import EngineConfig
from sim.deployment import Deployment, Relief, attempt, interval
from sim.errors import ScenarioError
from sim.fleet_config import FleetConfig
from sim.plan import Searcher
from sim.plan_checks import more_adapters, unlike_vllm, vllm_command
from sim.plan_grid import Grid, candidates_of
from sim.plan_search import Candidate, Judge, Part, exhaustive, fewest, greatest, improve, least, search, sustainable
from sim.scenario import load_scenario
from sim.slo import Limit, Promise, attained, keeps, parse_slo
from sim.traffic import Traffic, keep_ranks
from workloads.adapters import Catalogue
from workloads.requests import RequestTable

H100, VLLM = "h100-llama-3.1-8b", "vllm-0.24-h100-llama-3.1-8b"
ENGINE = EngineConfig(max_loras=4, max_cpu_loras=12, max_lora_rank=16, max_num_seqs=8, max_model_len=1024)


def traffic(seed: int, rate_rps: float = 20.0, count: int = 80, adapters: int = 12) -> Traffic:
    rng = np.random.default_rng(seed)
    arrival = rng.exponential(1 / rate_rps, count).cumsum()
    lengths = rng.integers(20, 200, count), rng.integers(2, 30, count)
    requests = RequestTable(arrival, *lengths, rng.integers(0, adapters + 1, count))
    return Traffic(requests, Catalogue.uniform(adapters, [8, 16]))


def deployment(replicas: int = 1, profile: str = H100, router: str = "least_outstanding", **engine) -> Deployment:
    return Deployment("llama-3.1-8b", profile, replace(ENGINE, **engine), FleetConfig(replicas, router=router))


def test_a_promise_from_text() -> None:
    assert parse_slo("ttft_p99<=1.0s, tpot_p99 <= 60ms", 0.99) == Promise(
        (Limit("ttft", 99.0, 1.0), Limit("tpot", 99.0, 0.06)), 0.99
    )
    assert parse_slo("e2el_mean<=2s").limits[0].percentile is None


@pytest.mark.parametrize(
    "text", ["", "ttft<=1s", "ttft_p99<1s", "ttft_p99<=1", "speed_p99<=1s", "ttft_p99<=0s", "ttft_p99<=1s;"]
)
def test_promises_that_cannot_be(text: str) -> None:
    with pytest.raises(ScenarioError, match="--slo"):
        parse_slo(text)


@given(st.lists(st.floats(0, 2), min_size=1, max_size=300), st.floats(1, 99.9))
def test_more_misses_than_allowed_break_a_percentile(values: list[float], percentile: float) -> None:
    limit = Limit("ttft", percentile, 1.0)
    array = np.array(values)
    if (array > 1.0).sum() > limit.allowed(len(values)):
        assert limit.value(array) > 1.0


def test_attainment_counts_requests_within_all_bounds_at_once() -> None:
    promise = parse_slo("ttft_p50<=1s, tpot_p50<=1s", 0.5)
    times = {"ttft": np.array([0.5, 2, 0.5, 0.5]), "tpot": np.array([0.5, 0.5, 2, np.nan]), "e2el": np.zeros(4)}
    assert attained(promise, times) == 0.5
    assert keeps(promise, times)
    assert not keeps(replace(promise, attainment=0.51), times)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([5.0, 40.0, 100.0]),
    st.integers(1, 2),
    st.sampled_from(["ttft_p90<=0.2s", "tpot_p90<=9ms", "e2el_p50<=0.3s", "ttft_p99<=0.5s, tpot_p99<=20ms"]),
    st.sampled_from([None, 0.9]),
)
def test_an_early_stop_never_changes_the_verdict(
    seed: int, rate: float, replicas: int, slo: str, attainment: float | None
) -> None:
    promise = parse_slo(slo, attainment)
    seeds = [traffic(seed, rate, 40), traffic(seed + 1, rate, 40)]
    soon = attempt(deployment(replicas, max_num_seqs=4), seeds, promise)
    whole = attempt(deployment(replicas, max_num_seqs=4), seeds, promise, to_the_end=True)
    assert soon.kept == whole.kept
    assert not whole.broken_early
    if not soon.broken_early:
        assert soon == whole


def test_overload_is_stopped_early() -> None:
    crowd = [traffic(1, 2000, 2000)]
    trial = attempt(deployment(max_num_seqs=2), crowd, parse_slo("ttft_p99<=0.1s"))
    assert trial.broken_early
    assert trial.attained < 0.5


@given(st.integers(1, 60), st.integers(1, 60))
def test_integer_searches_find_the_knee(knee: int, top: int) -> None:
    assert fewest(lambda n: n >= knee, top) == (knee if knee <= top else None)
    assert least(1, top, lambda n: n >= knee) == (knee if knee <= top else None)
    assert greatest(0, top, lambda n: n < knee) == min(knee - 1, top)


@given(st.floats(0.01, 500), st.floats(0.001, 0.2))
def test_bisection_finds_a_planted_knee(knee: float, tolerance: float) -> None:
    found = sustainable(lambda factor: factor <= knee, tolerance=tolerance)
    assert found <= knee <= found * (1 + tolerance) * (1 + 1e-9)


def test_bisection_gives_up_far_below() -> None:
    assert sustainable(lambda _: False) == 0.0
    assert sustainable(lambda _: True) >= 1024


def test_two_replicas_sustain_twice_the_rate_of_one() -> None:
    """Random routing of identical adapters, each replica a stream of its own; the promise is on a mean, for less noise."""
    promise = parse_slo("ttft_mean<=60ms")

    def rate(replicas: int) -> float:
        seeds = [traffic(s, 20.0 * replicas, 150 * replicas, adapters=4) for s in range(2)]
        tried = deployment(replicas, router="random")
        factor = sustainable(lambda f: attempt(tried, seeds, promise, factor=f).kept)
        return 20.0 * replicas * factor

    assert rate(2) == pytest.approx(2 * rate(1), rel=0.12)


@pytest.mark.parametrize(("seed", "prices"), [(0, (2.0, 1.0)), (1, (1.0, 1.5))])
def test_the_search_agrees_with_exhaustive_search(seed: int, prices: tuple[float, float]) -> None:
    promise = parse_slo("ttft_p90<=150ms, tpot_p90<=40ms")
    seeds = [traffic(seed, 60, 80), traffic(seed + 50, 60, 80)]
    grid = [
        Candidate(deployment(profile=profile, router=router, max_loras=slots, max_num_seqs=4), price)
        for profile, price in zip((H100, VLLM), prices, strict=True)
        for slots in (2, 4)
        for router in ("least_outstanding", "adapter_affinity")
    ]
    judge = Judge(seeds, promise)
    found = search(grid, lambda some, best: [improve(c, best, judge, 5) for c in some])
    pruned = judge.trials
    assert found is not None
    assert found.replicas > 1
    assert found == exhaustive(grid, judge, 5)
    assert pruned < judge.trials, "nothing was pruned"


def test_large_ranks_apart_where_they_would_take_the_memory_of_all() -> None:
    """128 busy adapters of rank 8 and two of rank 256: slots for all at rank 256 do not fit, so each kind gets a GPU of its own."""
    rng = np.random.default_rng(0)
    count = 450
    requests = RequestTable(
        rng.exponential(1 / 30, count).cumsum(), rng.integers(20, 100, count), np.full(count, 400),
        np.where(rng.random(count) < 0.03, rng.integers(129, 131, count), rng.integers(1, 129, count)),
    )  # fmt: skip
    small = Catalogue.uniform(128, [8])
    both = Catalogue((*small, *(replace(small[1], adapter_id=i, name=f"large-{i}", rank=256) for i in (129, 130))))
    grid = Grid(routes=(("least_outstanding", "everywhere"), ("least_outstanding", "packed")), most_replicas=8, jobs=1)
    scenario = load_scenario("demo-plan")
    with joblib.Parallel(n_jobs=1) as pool:

        def best(grid: Grid) -> tuple[Part, ...]:
            searcher = Searcher(scenario, parse_slo("ttft_p90<=1s"), grid, {H100: 1.0}, pool)
            found = searcher.best((Traffic(requests, both),))
            assert found is not None
            return found

        apart, whole = best(grid), best(replace(grid, splits=()))
    assert [part.name for part in apart] == ["ranks up to 8", "ranks above 8"]
    assert [part.found.deployment.engine.max_lora_rank for part in apart] == [8, 256]
    assert len(whole) == 1
    assert sum(part.found.cost for part in apart) < whole[0].found.cost


def test_faster_traffic_is_the_same_requests() -> None:
    slow = traffic(3)
    fast = slow.faster(2.0)
    assert fast.rate_rps == pytest.approx(2 * slow.rate_rps)
    assert np.array_equal(fast.requests.adapter, slow.requests.adapter)


def test_ranks_apart_are_all_of_the_traffic() -> None:
    whole = traffic(4)
    small, large = keep_ranks(whole, 0, 8, base=True), keep_ranks(whole, 8, 999, base=False)
    assert len(small.requests) + len(large.requests) == len(whole.requests)
    assert {a.rank for a in small.catalogue} == {8}
    assert {a.rank for a in large.catalogue} == {16}
    ranks = [0 if a == 0 else small.catalogue[a].rank for a in small.requests.adapter.tolist()]
    assert set(ranks) == {0, 8}
    names = {small.catalogue[a].name for a in small.requests.adapter.tolist() if a}
    assert names <= {whole.catalogue[a].name for a in whole.requests.adapter.tolist() if a}


@pytest.mark.parametrize(("times", "more"), [(1.5, 6), (2.0, 12)])
def test_twins_share_what_one_had(times: float, more: int) -> None:
    one = traffic(5)
    two = more_adapters(one, times, 0)
    n = len(one.catalogue)
    assert len(two.catalogue) == n + more
    names = [two.catalogue[a].name.removesuffix("-twin") if a else "" for a in two.requests.adapter.tolist()]
    assert names == [one.catalogue[a].name if a else "" for a in one.requests.adapter.tolist()]
    assert (two.requests.adapter > n).any()
    ranks = {a.name: a.rank for a in two.catalogue}
    assert all(rank == ranks[name.removesuffix("-twin")] for name, rank in ranks.items())


def test_reliefs_relieve() -> None:
    promise = parse_slo("ttft_p50<=1s")
    seeds = [traffic(6, 60, 100)]

    def ttft(relief: Relief) -> float:
        return attempt(deployment(), seeds, promise, relief=relief, to_the_end=True).values["ttft_p50"]

    plain = ttft(Relief())
    assert ttft(Relief(steps=0.5)) < plain < ttft(Relief(steps=1.5))
    assert ttft(Relief(max_loras=12)) < plain
    assert (
        attempt(deployment(), seeds, promise, relief=Relief(free_loads=True, free_stages=True)).facts["load_share"] == 0
    )


def test_an_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-3)
    assert math.isnan(interval([1.0])[1])


def test_the_command_line_says_what_differs_from_vllm() -> None:
    assert "--max-loras 4 --max-cpu-loras 12 --max-lora-rank 16" in vllm_command(deployment())
    odd = replace(ENGINE, scheduling_policy="sjf", enable_prefix_caching=False)
    assert unlike_vllm(odd) == ["scheduling_policy = sjf"]
    assert "--no-enable-prefix-caching" in vllm_command(replace(deployment(), engine=odd))


def test_candidates_have_a_rank_that_vllm_takes() -> None:
    scenario = load_scenario("demo-plan")
    odd = Traffic(traffic(1).requests, Catalogue.uniform(12, [8, 24]))
    made = candidates_of(scenario, odd, Grid(), {H100: 1.0})
    assert {c.deployment.engine.max_lora_rank for c in made} == {32}
    assert all(c.deployment.engine.host_loras >= c.deployment.engine.max_loras for c in made)
    assert {c.deployment.engine.host_loras - c.deployment.engine.max_loras for c in made} == {0, 8, 4}, (
        "vLLM's, and all"
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_adapters_have_candidates_too(count: int) -> None:
    few = Traffic(traffic(1).requests, Catalogue.uniform(count, [8]))
    slots = {c.deployment.engine.max_loras for c in candidates_of(load_scenario("demo-plan"), few, Grid(), {H100: 1.0})}
    assert slots
    assert min(slots) <= 4


SCENARIO = """
[model]
geometry = "llama-3.1-8b"
[engine]
max_num_seqs = 8
max_model_len = 2048
[adapters]
count = 12
ranks = [8, 64]
[workload]
kind = "synthetic"
rate_rps = 30
duration_s = 5
prompt = { kind = "fixed", tokens = 60 }
output = { kind = "lognormal", median = 20, sigma = 0.6 }
popularity = { kind = "zipf", s = 1.0 }
[backend]
kind = "profile"
profile = "h100-llama-3.1-8b"
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    file = tmp_path / "s.toml"
    file.write_text(SCENARIO)
    return file


def test_a_plan_from_the_command_line(scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = ["plan", str(scenario), "--slo", "ttft_p90<=0.2s, tpot_p90<=40ms", "--max-loras", "2", "8", "--seeds", "2"]
    what += ["--gpu-hour-usd", f"{H100}=2.5", f"{VLLM}=2", "--profile", H100, VLLM, "--split", "8", "--replicas", "6"]
    assert main([*what, "--jobs", "1", "--out", str(tmp_path / "one")]) == 0
    printed = capsys.readouterr().out
    for word in (
        "plan  ",
        "binds  ",
        "headroom",
        "runners-up",
        "vllm serve MODEL",
        "USD per million tokens",
        "±",
        "MAPE",
        "P99 TTFT (ms): * the plan",
        "  replicas ",
    ):
        assert word in printed
    assert (tmp_path / "one" / "pareto.svg").is_file()
    assert main([*what, "--jobs", "2", "--out", str(tmp_path / "two")]) == 0
    one, two = (json.loads((tmp_path / name / "plan.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert sum(1 for part in one["parts"] for _ in range(part["fleet"]["replicas"])) * 2 <= one["cost_per_hour"] * 1.01
    for part in one["parts"]:
        assert part["values_s"]["ttft_p90"] <= 0.2
        assert part["values_s"]["tpot_p90"] <= 0.04


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--slo", "ttft<=1"], "--slo"),
        (["--slo", "ttft_p99<=1s", "--attainment", "2"], "--attainment is 2.0"),
        (["--slo", "ttft_p99<=1s", "--seeds", "0"], "--seeds is 0"),
        (["--slo", "ttft_p99<=1s", "--gpu-hour-usd", "x"], "--gpu-hour-usd x"),
        (["--slo", "ttft_p99<=1s", "--profile", H100, VLLM], "cost.gpu_hour_usd: needs a price for"),
        (["--slo", "ttft_p99<=1s", "--profile", "none"], "profile none"),
        (
            ["--slo", "tpot_p50<=1ms", "--replicas", "2", "--max-loras", "4", "--jobs", "1"],
            "no deployment of the grid keeps",
        ),
    ],
)
def test_plans_that_cannot_be(
    more: list[str], says: str, scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    assert main(["plan", str(scenario), "--out", str(out), *more]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()
