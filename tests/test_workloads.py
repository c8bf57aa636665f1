"""Arrivals, popularity, lengths: seeded, and with the statistics they promise."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workloads import lengths, popularity, sessions
from workloads.build import build_workload
from workloads.errors import WorkloadError

HERE = Path(__file__).parent
SLACK = 2  # a busy machine


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_base_share() -> None:
    drawn = popularity.with_base(np.ones(100_000, dtype=np.int64), 0.25, rng())
    assert (drawn == 0).mean() == pytest.approx(0.25, abs=0.01)


def test_lengths() -> None:
    assert set(lengths.fixed(7, 5)) == {7}
    drawn = lengths.lognormal(200, 0.5, 20, 900, 100_000, rng())
    assert np.median(drawn) == pytest.approx(200, rel=0.02)
    assert drawn.min() >= 20
    assert drawn.max() <= 900
    spread = lengths.quantiles(np.array([1.0, 11.0, 101.0]), 100_000, rng())
    assert np.quantile(spread, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([1, 6, 11, 56, 101], abs=1)
    assert lengths.empirical({5: 1.0, 9: 3.0}, 100_000, rng()).mean() == pytest.approx(8.0, abs=0.05)


def synthetic(**changes: object) -> dict[str, object]:
    table = {
        "kind": "synthetic",
        "rate_rps": 5,
        "duration_s": 20,
        "prompt": {"kind": "fixed", "tokens": 9},
        "output": {"kind": "lognormal", "median": 20, "sigma": 0.3},
        "popularity": {"kind": "uniform"},
    } | changes
    return {key: value for key, value in table.items() if value is not None}


def build(table: dict[str, object], count: int | None = 4, folder: Path = HERE) -> object:
    return build_workload(table, adapter_count=count, seed=1, base_dir=folder)


def test_the_same_seed_gives_the_same_requests() -> None:
    one, two = build(synthetic()), build(synthetic())
    assert one.requests.arrival_s.tolist() == two.requests.arrival_s.tolist()
    assert one.requests.adapter.tolist() == two.requests.adapter.tolist()


def test_a_million_requests_in_seconds() -> None:
    started = time.perf_counter()
    workload = build(synthetic(rate_rps=10_000, duration_s=100), count=10_000)
    assert len(workload.requests) == pytest.approx(1_000_000, rel=0.01)
    assert time.perf_counter() - started < 5 * SLACK


def test_a_million_requests_with_runs_and_drift_in_seconds() -> None:
    started = time.perf_counter()
    many = synthetic(
        rate_rps=10_000, duration_s=100, arrival="gamma", cv=3, locality={"kind": "repeat", "share": 0.8, "mean_gap": 4}
    )
    workload = build(many | {"drift": {"period_s": 10, "top": 10, "keep": 0.5}}, count=10_000)
    assert len(workload.requests) == pytest.approx(1_000_000, rel=0.02)
    assert time.perf_counter() - started < 5 * SLACK


def test_a_million_requests_from_parquet_in_seconds(tmp_path: Path) -> None:
    n = 1_000_000
    names = np.array([f"adapter-{i}" for i in range(10_000)])[np.arange(n) % 10_000]
    columns = {
        "arrival_s": np.arange(n) * 0.01,
        "prompt_tokens": np.full(n, 9),
        "output_tokens": np.full(n, 5),
        "adapter": names,
    }
    pd.DataFrame(columns).to_parquet(tmp_path / "t.parquet")
    started = time.perf_counter()
    workload = build({"kind": "table", "path": "t.parquet"}, count=None, folder=tmp_path)
    assert time.perf_counter() - started < 5 * SLACK
    assert len(workload.requests) == n
    assert len(workload.adapter_names) == 10_000


def test_sessions_repeat_what_was_said() -> None:
    turns, said, output = np.array([3, 1]), np.array([10, 20, 30, 7]), np.array([5, 6, 7, 8])
    table = sessions.unfold(
        np.array([0.0, 1.0]), np.array([2, 2]), turns, said, output,
        think_s=0.1, system_tokens=4, max_tokens=1000, rng=rng(),
    )  # fmt: skip
    requests = {r.arrival_s: r for r in table}
    first = [r for r in requests.values() if r.prefix[-1][1] == table.prefix_id[0]]
    assert [r.prompt_tokens for r in first] == [14, 39, 75]
    assert [r.prefix for r in first] == [((4, 2), (total, 3)) for total in (19, 45, 82)]
    assert requests[1.0].prompt_tokens == 11
    assert requests[1.0].prefix == ((4, 2), (19, 4))


def test_sessions_end_before_they_are_too_long() -> None:
    sizes = np.full(10, 10)
    table = sessions.unfold(
        np.zeros(1), np.ones(1, dtype=np.int64), np.array([10]), sizes, sizes,
        think_s=1.0, system_tokens=0, max_tokens=65, rng=rng(),
    )  # fmt: skip
    assert (table.prompt_tokens + table.output_tokens).tolist() == [20, 40, 60]


def test_sessions_have_their_mean_turns() -> None:
    assert sessions.turn_counts(100_000, 4.0, rng()).mean() == pytest.approx(4.0, rel=0.02)
    chat = synthetic(
        duration_s=2000, sessions={"turns": 4.0, "think_s": 5.0, "system_tokens": 100, "max_tokens": 100_000}
    )
    workload = build(chat)
    assert len(workload.requests) == pytest.approx(2000 * 5 * 4, rel=0.06)
    later = workload.requests.prompt_tokens > 109
    assert later.mean() == pytest.approx(0.75, abs=0.02)


def test_clients_each_have_their_stream() -> None:
    fixed = {"kind": "fixed", "tokens": 7}
    steady = {"name": "steady", "rate_rps": 30, "prompt": fixed, "output": fixed}
    bursty = {
        "name": "bursty",
        "rate_rps": 10,
        "arrival": "weibull",
        "cv": 3.0,
        "prompt": fixed | {"tokens": 9},
        "output": fixed,
    }
    base = {"name": "", "rate_rps": 5, "prompt": fixed, "output": fixed}
    workload = build({"kind": "clients", "duration_s": 1000, "clients": [steady, base, bursty]}, count=None)
    assert workload.adapter_names == ("steady", "bursty")
    r = workload.requests
    counts = np.bincount(r.adapter)
    assert counts == pytest.approx([5000, 30_000, 10_000], rel=0.1)
    gaps = {a: np.diff(r.arrival_s[r.adapter == a]) for a in (1, 2)}
    assert gaps[1].std() / gaps[1].mean() == pytest.approx(1.0, rel=0.05)
    assert gaps[2].std() / gaps[2].mean() == pytest.approx(3.0, rel=0.15)
    assert set(r.prompt_tokens[r.adapter == 2]) == {9}


def test_a_changing_catalogue() -> None:
    """Drift keeps ids, churn brings new ones; both follow the clock."""
    skewed = {"popularity": {"kind": "punica", "shape": "identical"}, "rate_rps": 50, "duration_s": 100}
    r = build(synthetic(**skewed, churn={"period_s": 10, "share": 1.0, "alive": 2}), count=20).requests
    assert [len(set(r.adapter[(r.arrival_s // 10) == k])) for k in range(10)] == [1] * 10
    assert len(set(r.adapter)) == 10
    r = build(synthetic(**skewed, drift={"period_s": 50, "top": 1, "keep": 0.0}), count=20).requests
    assert len(set(r.adapter)) == 2


def test_thinning_and_the_window_of_a_trace(tmp_path: Path) -> None:
    rows = ["arrival_s,prompt_tokens,output_tokens,adapter", *(f"{i / 10},5,5,a" for i in range(10_000))]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    table = {"kind": "table", "path": "t.csv", "start_s": 100, "duration_s": 200, "rate_scale": 2.0}
    r = build(table, count=None, folder=tmp_path).requests
    assert (len(r), r.arrival_s[0], r.arrival_s[-1]) == (4000, 0.0, 199.95)
    thinned = build(table | {"thin": 0.25}, count=None, folder=tmp_path).requests
    assert len(thinned) == pytest.approx(1000, abs=100)


@pytest.mark.parametrize(
    ("sample", "kind", "count"),
    [("mooncake_conversation", "mooncake", 8), ("vtc_arena", "vtc", None), ("azure_conv", "azure_llm", 8),
     ("azure_functions_2019", "azure_functions_2019", 4), ("azure_functions_2021", "azure_functions_2021", None)],
)  # fmt: skip
def test_shipped_samples_become_workloads(sample: str, kind: str, count: int | None) -> None:
    table: dict[str, object] = {"kind": kind, "sample": sample}
    if kind.startswith("azure_functions"):
        table |= {"prompt": {"kind": "fixed", "tokens": 9}, "output": {"kind": "fixed", "tokens": 5}}
    elif count:
        table |= {"popularity": {"kind": "zipf", "s": 1.0}}
    workload = build(table, count=count)
    assert len(workload.requests) > 90
    assert workload.requests.adapter.max() <= len(workload.adapter_names)
    assert len(list(workload.requests)) == len(workload.requests)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"speed": 5}, "workload.speed: unknown key"),
        ({"rate": {"kind": "constant"}}, "give one of them"),
        ({"rate_rps": None, "rate": {"kind": "piecewise", "start_s": [1], "rps": [1]}}, "start_s must rise from 0"),
        ({"rate_rps": None, "rate": {"kind": "diurnal", "rps": 1, "amplitude": 2}}, "amplitude from 0 to 1"),
        ({"rate_rps": None, "rate": {"kind": "mmpp", "rps": "a"}}, "workload.rate.rps is 'a', must be a list"),
        ({"arrival": "poisson", "cv": 2}, "workload.arrival is poisson"),
        ({"popularity": {"kind": "empirical", "weights": [1, 2]}}, "has 2 weights, there are 4 adapters"),
        ({"popularity": {"kind": "punica", "shape": "x"}}, "punica's shape is x"),
        ({"locality": {"kind": "lru_stack", "distances": [1]}}, "workload.popularity has no say under lru_stack"),
        ({"locality": {"kind": "repeat", "share": 0.5}}, "workload.locality.mean_gap is missing"),
        ({"drift": {"period_s": 5, "top": 2, "keep": 0.5}, "churn": {"period_s": 5}}, "give one of them"),
        ({"churn": {"period_s": 5, "share": 0.5, "alive": 4}}, "adapters.count is 4"),
        ({"sessions": {"turns": 0.5, "think_s": 1, "max_tokens": 99}}, "sessions.turns is 0.5"),
        ({"sessions": 3}, "workload.sessions is 3, must be a table"),
        ({"rate_rps": -3}, "workload.rate_rps is -3"),
        ({"rate_rps": float("inf")}, "workload.rate_rps is inf"),
        ({"prompt": {"kind": "fixed", "tokens": 1.9}}, "workload.prompt.tokens is 1.9"),
        ({"rate_rps": True}, "workload.rate_rps is True"),
        ({"kind": "replay"}, "workload.kind is 'replay'"),
        ({"kind": [1]}, "workload.kind is"),
        ({"prompt": {"kind": "fixed", "token": 9}}, "workload.prompt.token: unknown key"),
        ({"prompt": {"kind": ["x"]}}, "workload.prompt must be a table"),
        ({"popularity": {"kind": "zipf"}}, "workload.popularity.s is missing"),
        ({"base_share": 2.0}, "base_share is 2.0"),
        ({"arrival": "gamma"}, "workload.arrival is gamma, must be poisson"),
        ({"duration_s": 1e-6}, "no request"),
    ],
)
def test_bad_tables_are_named(changes: dict[str, object], says: str) -> None:
    with pytest.raises(WorkloadError, match=says.replace("[", r"\[")):
        build(synthetic(**changes))


def test_empirical_lengths_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("tokens,weight\n5,1\n9,0\n")
    workload = build(synthetic(prompt={"kind": "empirical", "path": "h.csv"}), folder=tmp_path)
    assert set(workload.requests.prompt_tokens) == {5}
    (tmp_path / "h.csv").write_text("tokens,weight\n5,1\nx,0\n")
    with pytest.raises(WorkloadError, match=r"h\.csv:3"):
        build(synthetic(prompt={"kind": "empirical", "path": "h.csv"}), folder=tmp_path)
