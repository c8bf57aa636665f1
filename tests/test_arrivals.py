"""Arrival processes have the rates, the burstiness and the start that theory gives them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from workloads import arrivals
from workloads.describe import dispersion
from workloads.errors import WorkloadError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("process", ["gamma", "weibull"])
@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_their_mean_and_cv(process: str, cv: float) -> None:
    times = arrivals.draw(arrivals.constant(50.0, 4000.0), process, cv, rng())
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert 0 <= times[0] <= times[-1] < 4000
    assert len(times) == pytest.approx(200_000, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.04)


def test_gamma_gaps_are_gamma_and_weibull_gaps_weibull() -> None:
    gaps = np.diff(arrivals.draw(arrivals.constant(1.0, 20_000.0), "gamma", 2.0, rng(1)))
    assert stats.kstest(gaps, stats.gamma(0.25, scale=4.0).cdf).pvalue > 0.01
    shape = arrivals._weibull_shape(2.0)
    gaps = np.diff(arrivals.draw(arrivals.constant(1.0, 20_000.0), "weibull", 2.0, rng(2)))
    law = stats.weibull_min(shape, scale=1 / stats.weibull_min(shape).mean())
    assert law.std() / law.mean() == pytest.approx(2.0, rel=1e-6)
    assert stats.kstest(gaps, law.cdf).pvalue > 0.01


@pytest.mark.parametrize("process", arrivals.PROCESSES)
def test_the_start_is_stationary(process: str) -> None:
    """A short window from the start holds rate x length requests on average, however bursty the process is."""
    cv = 1.0 if process == "poisson" else 3.0
    generator = rng(3)
    counts = [len(arrivals.draw(arrivals.constant(1.0, 2.0), process, cv, generator)) for _ in range(20_000)]
    assert np.mean(counts) == pytest.approx(2.0, abs=0.12)


def test_poisson_counts_are_poisson_and_bursty_ones_overdispersed() -> None:
    poisson = arrivals.draw(arrivals.constant(20.0, 5000.0), "poisson", 1.0, rng())
    assert dispersion(poisson, 1) == pytest.approx(1.0, abs=0.07)
    bursty = arrivals.draw(arrivals.constant(20.0, 5000.0), "gamma", 3.0, rng())
    assert dispersion(bursty, 60) == pytest.approx(9.0, rel=0.4)  # cv² in the long run


def test_piecewise_rates() -> None:
    rate = arrivals.piecewise(np.array([0.0, 100.0, 200.0, 900.0]), np.array([10.0, 0.0, 40.0, 7.0]), 300.0)
    times = arrivals.draw(rate, "poisson", 1.0, rng())
    counts = np.histogram(times, [0, 100, 200, 300])[0]
    assert counts[1] == 0
    assert counts[0] == pytest.approx(1000, abs=130)
    assert counts[2] == pytest.approx(4000, abs=260)


def test_diurnal_rates_swing_by_their_amplitude() -> None:
    rate = arrivals.diurnal(50.0, 0.8, 400.0, 0.0, 4000.0)
    phase = arrivals.draw(rate, "poisson", 1.0, rng()) % 400
    day, night = ((phase >= lo) & (phase < lo + 200) for lo in (0, 200))
    assert len(phase) == pytest.approx(200_000, rel=0.01)
    # Over half a period the sine is 2/π on average.
    assert day.sum() / night.sum() == pytest.approx((1 + 0.8 * 2 / np.pi) / (1 - 0.8 * 2 / np.pi), rel=0.03)


def test_a_flash_crowd_multiplies_the_rate_while_it_lasts() -> None:
    times = arrivals.draw(arrivals.flash_crowd(20.0, 5.0, 300.0, 50.0, 1000.0), "poisson", 1.0, rng())
    inside = (times >= 300) & (times < 350)
    assert inside.sum() == pytest.approx(5000, rel=0.05)
    assert (~inside).sum() == pytest.approx(19_000, rel=0.03)


def test_mmpp_has_its_mean_and_is_overdispersed() -> None:
    """Two states, rates 2 and 30, sojourns 30 and 10 s: mean rate 9; the index of dispersion of long counts is known."""
    times = arrivals.draw(
        arrivals.mmpp(np.array([2.0, 30.0]), np.array([30.0, 10.0]), 200_000.0, rng(5)), "poisson", 1.0, rng(6)
    )
    mean = (2 * 30 + 30 * 10) / 40
    assert len(times) / 200_000 == pytest.approx(mean, rel=0.03)
    # Fischer and Meier-Hellstern 1992: I(∞) = 1 + 2 σ1 σ2 (λ1 - λ2)² / ((σ1 + σ2)² (λ1 σ2 + λ2 σ1)), σ = leaving rates.
    s1, s2 = 1 / 30, 1 / 10
    limit = 1 + 2 * s1 * s2 * (2 - 30) ** 2 / ((s1 + s2) ** 2 * (2 * s2 + 30 * s1))
    assert dispersion(times, 1000) == pytest.approx(limit, rel=0.25)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: arrivals.draw(arrivals.constant(1.0, 1.0), "pareto", 1.0, rng()), "one of poisson, gamma, weibull"),
        (lambda: arrivals.draw(arrivals.constant(1.0, 1.0), "gamma", 0.0, rng()), "cv from 0.01 to 100"),
        (lambda: arrivals.constant(-1.0, 1.0), "finite rates >= 0"),
        (lambda: arrivals.constant(0.0, 1.0), "one of them > 0"),
        (lambda: arrivals.piecewise(np.array([1.0]), np.array([1.0]), 2.0), "rising edges from 0"),
        (lambda: arrivals.diurnal(1.0, 1.5, 10.0, 0.0, 10.0), "amplitude from 0 to 1"),
        (lambda: arrivals.flash_crowd(1.0, 2.0, 20.0, 1.0, 10.0), "start_s within the duration"),
        (lambda: arrivals.mmpp(np.array([1.0]), np.array([1.0]), 10.0, rng()), "at least two states"),
        (
            lambda: arrivals.draw(arrivals.constant(1e30, 1.0), "gamma", 2.0, rng()),
            "asks for 1e.30 requests, must be at most",
        ),
        (lambda: arrivals.diurnal(1.0, 0.5, 1e-9, 0.0, 10.0), "at most 6944 periods"),
        (lambda: arrivals.mmpp(np.ones(2), np.full(2, 1e-9), 10.0, rng()), "at most 10000000 changes of state"),
    ],
)
def test_what_no_process_can_be(call: object, says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        call()  # type: ignore[operator]
