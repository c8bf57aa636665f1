"""Arrivals, popularity, lengths: seeded, and with the statistics they promise."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from workloads import arrivals, lengths, popularity
from workloads.build import build_workload
from workloads.errors import WorkloadError

HERE = Path(__file__).parent


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_arrivals_have_their_rate_and_cv(cv: float) -> None:
    times = arrivals.gamma(50.0, 4000.0, cv, rng())
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert times[-1] < 4000
    assert len(times) == pytest.approx(200_000, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_poisson_counts_are_poisson() -> None:
    counts = np.histogram(arrivals.poisson(20.0, 5000.0, rng()), bins=5000)[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.07)


def test_zipf_mandelbrot_follows_its_law() -> None:
    n, s, q = 20, 1.3, 2.0
    drawn = popularity.zipf_mandelbrot(n, 400_000, s, q, rng())
    law = (np.arange(1, n + 1) + q) ** -s
    np.testing.assert_allclose(np.bincount(drawn, minlength=n + 1)[1:] / len(drawn), law / law.sum(), atol=0.003)


def test_slora_power_alpha_one_is_uniform_and_smaller_is_skewed() -> None:
    flat = np.bincount(popularity.slora_power(10, 100_000, 1.0, rng()), minlength=11)[1:]
    assert flat.max() / flat.min() < 1.1
    # P(index = 0) = P(U < (1/n) ** alpha)
    skewed = popularity.slora_power(100, 100_000, 0.3, rng())
    assert (skewed == 1).mean() == pytest.approx(0.01**0.3, abs=0.01)


def test_base_share() -> None:
    drawn = popularity.with_base(np.ones(100_000, dtype=np.int64), 0.25, rng())
    assert (drawn == 0).mean() == pytest.approx(0.25, abs=0.01)


def test_lengths() -> None:
    assert set(lengths.fixed(7, 5)) == {7}
    drawn = lengths.lognormal(200, 0.5, 20, 900, 100_000, rng())
    assert np.median(drawn) == pytest.approx(200, rel=0.02)
    assert drawn.min() >= 20
    assert drawn.max() <= 900
    assert lengths.empirical({5: 1.0, 9: 3.0}, 100_000, rng()).mean() == pytest.approx(8.0, abs=0.05)


def synthetic(**changes: object) -> dict[str, object]:
    return {
        "kind": "synthetic",
        "rate_rps": 5,
        "duration_s": 20,
        "prompt": {"kind": "fixed", "tokens": 9},
        "output": {"kind": "lognormal", "median": 20, "sigma": 0.3},
        "popularity": {"kind": "uniform"},
    } | changes


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
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rate": 5}, "workload.rate: unknown key"),
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
        ({"arrival": "gamma"}, "workload.cv is missing"),
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
