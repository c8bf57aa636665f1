"""Popularity, locality, drift and churn: the laws they promise, and fits that find them again."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads import dynamics, fitting, locality, popularity, reuse
from workloads.errors import WorkloadError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


LAWS = {
    "uniform": popularity.zipf_mandelbrot(50, 0.0),
    "zipf": popularity.zipf_mandelbrot(50, 1.1),
    "zipf_mandelbrot": popularity.zipf_mandelbrot(50, 2.3, 5.2),
    "slora_power": popularity.slora_power(50, 0.3),
    **{shape: popularity.punica(50, shape) for shape in popularity.PUNICA},
}


@pytest.mark.parametrize("name", LAWS)
def test_draws_follow_their_law(name: str) -> None:
    p = LAWS[name]
    assert p.sum() == pytest.approx(1.0)
    assert (np.diff(p) <= 1e-15).all(), "rank 1 is the most popular"
    drawn = popularity.draw(p, 400_000, rng())
    np.testing.assert_allclose(np.bincount(drawn, minlength=50) / len(drawn), p, atol=0.003)


def test_slora_power_is_its_generator() -> None:
    """P(index < i) = P(n U^(1/α) < i) = (i/n)^α, and α = 1 is uniform."""
    n, alpha = 100, 0.3
    drawn = np.floor(n * rng().random(400_000) ** (1 / alpha)).astype(int)
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=n) / len(drawn), popularity.slora_power(n, alpha), atol=0.003
    )
    np.testing.assert_allclose(popularity.slora_power(n, 1.0), 1 / n)


def test_punica_shapes() -> None:
    assert popularity.punica(49, "uniform").tolist() == [1 / 7] * 7 + [0.0] * 42
    skewed = popularity.punica(20, "skewed")
    np.testing.assert_allclose(skewed[:-1] / skewed[1:], 1.5)
    assert popularity.punica(9, "identical")[0] == 1
    assert popularity.in_turn(3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(("s", "q"), [(0.9, 0.0), (1.14, 3.6), (2.32, 5.2)])
def test_fits_recover_the_exponents(s: float, q: float) -> None:
    counts = np.bincount(popularity.draw(popularity.zipf_mandelbrot(200, s, q), 2_000_000, rng(1)), minlength=200)
    found = fitting.zipf_mandelbrot(counts)
    assert found.s == pytest.approx(s, rel=0.06)
    assert found.q == pytest.approx(q, rel=0.15, abs=0.15)
    assert found.ks < 0.01
    zipf = fitting.zipf(counts)
    if q == 0:
        assert zipf.s == pytest.approx(s, rel=0.03)
    else:
        assert zipf.ks > found.ks


def test_stack_distances_by_hand() -> None:
    assert reuse.stack_distances(np.array([5, 6, 6, 5, 7, 6, 5])).tolist() == [-1, -1, 0, 1, -1, 2, 2]
    curve = reuse.hit_curve(np.array([-1, -1, 0, 1, -1, 2, 2]), np.array([1, 2, 3, 4]))
    np.testing.assert_allclose(curve, [1 / 7, 2 / 7, 4 / 7, 4 / 7])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(1, 10))
def test_the_hit_curve_is_that_of_a_real_lru_cache(adapters: list[int], slots: int) -> None:
    cache: list[int] = []
    hits = 0
    for adapter in adapters:
        hits += adapter in cache
        cache = [a for a in cache if a != adapter][-slots + 1 :] if slots > 1 else []
        cache.append(adapter)
    curve = reuse.hit_curve(reuse.stack_distances(np.array(adapters)), np.array([slots]))
    assert curve[0] == pytest.approx(hits / len(adapters))


@pytest.mark.parametrize("name", ["uniform", "zipf", "zipf_mandelbrot", "slora_power"])
def test_independent_draws_hit_as_che_says(name: str) -> None:
    drawn = popularity.draw(LAWS[name], 60_000, rng(2))
    slots = np.array([1, 2, 4, 8, 16, 32])
    real = reuse.hit_curve(reuse.stack_distances(drawn), slots)
    np.testing.assert_allclose(real, reuse.che(LAWS[name], slots), atol=0.015)


def test_the_stack_model_hits_with_the_weight_of_its_first_positions() -> None:
    distances = np.array([0.3, 0.2, 0.0, 0.1, 0.05, 0.0, 0.35])
    drawn = locality.lru_stack(20, 100_000, distances, rng(3))
    slots = np.arange(1, 8)
    np.testing.assert_allclose(reuse.hit_curve(reuse.stack_distances(drawn), slots), np.cumsum(distances), atol=0.006)


def test_repeats_add_locality_and_leave_popularity_alone() -> None:
    p = popularity.zipf_mandelbrot(200, 1.0)
    drawn = popularity.draw(p, 300_000, rng(4))
    local = locality.repeat(drawn, 0.7, 3.0, rng(5))
    np.testing.assert_allclose(np.bincount(local, minlength=200) / len(local), p, atol=0.006)
    plain, runs = (reuse.hit_curve(reuse.stack_distances(x[:40_000]), np.array([8]))[0] for x in (drawn, local))
    assert runs > plain + 0.3
    assert locality.repeat(drawn, 0.0, 3.0, rng(5)).tolist() == drawn.tolist()


def test_the_repeat_fit_finds_a_hit_curve_again() -> None:
    p = popularity.zipf_mandelbrot(100, 1.0)
    local = locality.repeat(popularity.draw(p, 8_000, rng(6)), 0.65, 3.0, rng(7))
    found = fitting.repeat(local, p, rng(8))
    assert found.error < 0.04
    assert found.share == pytest.approx(0.65, abs=0.2)
    independent = fitting.repeat(popularity.draw(p, 8_000, rng(9)), p, rng(10))
    assert independent.share == 0.0


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(5, 60),
    periods=st.integers(1, 12),
    top=st.integers(1, 4),
    keep=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_drift_keeps_its_share_of_the_top(n: int, periods: int, top: int, keep: float, seed: int) -> None:
    table = dynamics.drift(n, periods, top, keep, rng(seed))
    for before, after in pairwise(table):
        stayed = np.isin(after[:top], before[:top]).sum()
        assert stayed == max(top - (n - top), top - round(top * (1 - keep)))
    assert all(sorted(row) == list(range(1, n + 1)) for row in table.tolist())


@settings(max_examples=50, deadline=None)
@given(periods=st.integers(1, 9), alive=st.integers(1, 20), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_churn_retires_for_good(periods: int, alive: int, share: float, seed: int) -> None:
    born = round(alive * share)
    table = dynamics.churn(alive + born * (periods - 1), periods, alive, share, rng(seed))
    seen = set(table[0].tolist())
    for before, after in pairwise(table.tolist()):
        new = set(after) - set(before)
        assert len(new) == born
        assert not new & seen, "an adapter came back"
        assert len(set(after)) == alive
        seen |= new


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: popularity.zipf_mandelbrot(0, 1.0), "at least one adapter"),
        (lambda: popularity.slora_power(5, 0.0), "alpha > 0"),
        (lambda: popularity.punica(5, "flat"), "one of distinct, uniform, skewed, identical"),
        (lambda: popularity.shares(np.array([0.0, 0.0])), "not all zero"),
        (lambda: locality.lru_stack(2, 5, np.ones(3), rng()), "1 to 2 distances"),
        (lambda: locality.repeat(np.zeros(3, dtype=np.int64), 1.0, 2.0, rng()), "share from 0 to below 1"),
        (lambda: dynamics.drift(5, 2, 5, 0.5, rng()), "top from 1 to below 5"),
        (lambda: dynamics.churn(10, 3, 8, 0.5, rng()), "needs 16 adapters, adapters.count is 10"),
    ],
)
def test_what_no_law_can_be(call: object, says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        call()  # type: ignore[operator]
