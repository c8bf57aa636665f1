"""Hosts whose speed goes in waves: planted speeds come back, draws are repeatable, and a steady host is the plain replay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from backend.base import StepBatch
from backend.features import StepFeatures
from backend.fitting import composition, measured
from backend.geometry import load_geometry
from backend.host_draw import STRETCH_S, HostDraw, HostOutlook
from backend.host_fit import times, with_host_of, with_time_between
from backend.host_speed import HostSpeed, Ratios
from backend.host_spread import RUN_LAUNCH_MS, Spread
from backend.predictor import HOST_AFTER_PROMPTS, HOST_REQUESTS, HOST_STEP, Predictor
from backend.profile import load_profile
from backend.scattered import ScatteredReplay
from sim.closed_loop import read_trace, replayed
from sim.compiled_inputs import supports
from sim.config import EngineConfig
from sim.run import limits_of

GOLDEN = Path(__file__).parent / "golden" / "vllm_h100"
PROFILE = load_profile("vllm-0.24-h100-llama-3.1-8b")
DECODE = StepBatch((1,) * 20, (500,) * 20, (0,) * 20, (True,) * 20)
PROMPT = StepBatch((600,) + (1,) * 20, (0,) + (500,) * 20, (0,) * 21, (True,) * 21)


def logged(speed: list[float], predictor: Predictor = PROFILE.predictor, after_s: float = 0.0) -> pd.DataFrame:
    """A log of one step a second, a prompt and two decodes by turns, on a host that takes `speed[i]` times the predicted seconds."""
    rows = []
    for at_s, slow in enumerate(speed):
        batch, after = (PROMPT, False) if at_s % 3 == 0 else (DECODE, at_s % 3 == 1)
        features = StepFeatures.of(batch, {0: 16}, after_prompts=after)
        _, device, launch, host = predictor.split(features)
        host, launch = slow * host + (after_s if after else 0.0), slow * launch
        device = 0.002 if launch else device
        between = 0.001 + 0.0001 * len(batch.query_lens)
        rows.append(
            {**composition(batch, {0: 16}), "device_s": device, "host_s": host + max(0.0, launch - device if launch else 0.0),
             "launch_s": max(0.0, launch - device), "elapsed_s": 0.0, "t_s": float(at_s), "after_prompts": after,
             "between_s": between}
        )  # fmt: skip
    return pd.DataFrame(rows)


def steady(ratio: float, end_s: float = 40.0) -> HostSpeed:
    at_s = tuple(np.arange(0.0, end_s, 0.5).tolist())
    ratios = Ratios(at_s, (ratio,) * len(at_s), (1.0,) * len(at_s))
    return HostSpeed(ratios, ratios, end_s)


def test_a_planted_speed_comes_back() -> None:
    speed = HostSpeed.of(PROFILE.predictor, logged([1.0] * 12 + [2.0] * 12 + [1.0] * 6))
    for at_s, launched, expected in ((5.0, False, 1.0), (15.0, True, 2.0), (15.0, False, 2.0), (99.0, False, 1.0)):
        assert speed.at(at_s, launched=launched) == pytest.approx(expected)
    assert speed.level(12.0, 24.0) == pytest.approx(2.0)
    assert speed.level(50.0, 60.0) is None
    assert speed.windows()[0] == pytest.approx(1.0)
    assert speed.windows()[1] > 1.5


def test_a_kind_that_was_not_measured_goes_like_the_other() -> None:
    only_decodes = logged([1.5] * 9).iloc[[1, 2, 4, 5, 7, 8]]
    assert HostSpeed.of(PROFILE.predictor, only_decodes).at(3.0, launched=True) == pytest.approx(1.5)
    nothing = Ratios((), (), ())
    assert HostSpeed(nothing, nothing, 0.0).at(3.0, launched=True) == 1.0


def test_what_a_beginning_says_follows_from_how_far_hosts_lie_apart() -> None:
    two = Spread(0.1, (0.0, float(np.log(2.0))), (0.5, 0.5))
    assert two.expected(None, 10.0) == pytest.approx(1.5)
    assert two.expected(2.0, 10.0) == pytest.approx(2.0)
    # Half way in between nothing is learnt; nor if waves are so large that a beginning means nothing.
    assert two.expected(2.0**0.5, 10.0) == pytest.approx(1.5)
    assert replace(two, windows=1e3).expected(2.0, 10.0) == pytest.approx(1.5, abs=1e-3)
    assert replace(two, windows=0.0).expected(1.9, 10.0) == pytest.approx(2.0)
    # The longer it is known, the more it says.
    assert [round(two.expected(1.6, seconds), 2) for seconds in (0.1, 1.0, 100.0)] == [1.52, 1.7, 2.0]
    assert two.lasting(10.0) == pytest.approx(np.log(2.0) ** 2 / 4 / (np.log(2.0) ** 2 / 4 + 0.01))
    assert [two.quantile(share, None, 0.0) for share in (0.25, 0.75, 1.0)] == pytest.approx([1.0, 2.0, 2.0])
    assert two.quantile(0.01, 2.0, 10.0) == pytest.approx(2.0)


def test_runs_are_like_those_reported_or_unlike_all() -> None:
    waves = Spread.of([HostSpeed.of(PROFILE.predictor, logged(([0.8] * 10 + [1.25] * 10) * 2)) for _ in range(3)])
    # Levels of 0.8 and 1.25 by turns: half of log(1.25 / 0.8) from their mean, one degree of freedom gone of four.
    assert waves.windows == pytest.approx(np.log(1.25 / 0.8) / 2 * (4 / 3) ** 0.5, rel=0.05)
    known = Spread.of([steady(1.0)] * 3)
    assert known.windows == pytest.approx(0.0, abs=1e-9)
    assert sum(known.shares) == pytest.approx(1.0)
    assert list(known.levels) == sorted(known.levels)
    assert known.quantile(0.5, None, 0.0) == pytest.approx(1.0, abs=0.03)
    slow = replace(known, windows=0.12)
    far = max(RUN_LAUNCH_MS) / float(np.median(RUN_LAUNCH_MS))
    # Near the middle little of a beginning is believed, of one like the slowest run most.
    assert abs(slow.expected(1.05, 10.0) - 1.0) < 0.03
    assert 0.6 < (slow.expected(far, 10.0) - 1.0) / (far - 1.0) < 1.0


def test_draws_are_repeatable_and_differ_by_seed() -> None:
    wavy = [HostSpeed.of(PROFILE.predictor, logged([1.0 + (i // 4) % 3 for i in range(40)])) for _ in range(2)]
    outlook = HostOutlook(tuple(wavy), Spread(0.1))

    def drawn(seed: int) -> list[float]:
        host = HostDraw(outlook, seed, 4)
        ratios = []
        for _ in range(60):
            ratios.append(host.ratio(launched=False))
            host.passed(0.5)
        return ratios

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_known_beginning_is_played_and_then_believed_as_far_as_it_is_likely_to_last() -> None:
    def mean_after(windows: float) -> float:
        ratios, spread = [], Spread(windows, (0.0, float(np.log(3.0))), (0.5, 0.5))
        for seed in range(40):
            host = HostDraw(HostOutlook((steady(1.0),), spread, steady(3.0, 10.0), 10.0), seed, 40)
            assert host.ratio(launched=True) == 3.0
            host.passed(9.9)
            assert host.ratio(launched=False) == 3.0
            for _ in range(20):
                host.passed(STRETCH_S)
                ratios.append(host.ratio(launched=True))
        return float(np.mean(ratios))

    assert mean_after(0.1) == pytest.approx(3.0)
    assert mean_after(1e3) == pytest.approx(2.0, abs=0.2)
    alone = HostDraw(HostOutlook((), Spread(0.0), steady(3.0, 10.0), 10.0))
    alone.passed(100.0)
    assert alone.ratio(launched=True) == 3.0


def test_runs_as_a_whole_lie_apart_by_quantiles() -> None:
    spread = Spread(0.1, tuple(np.log([0.8, 1.0, 1.2]).tolist()), (0.25, 0.5, 0.25))
    levels = [HostDraw(HostOutlook((steady(1.0),), spread), seed, 9).ratio(launched=True) for seed in range(9)]
    assert levels == sorted(levels)
    assert levels[4] == pytest.approx(1.0)
    assert levels[0] == pytest.approx(0.8)
    assert levels[-1] == pytest.approx(1.2)


def test_a_live_run_scales_the_grid_s_host_and_tells_what_follows_prompts() -> None:
    plain = with_host_of(PROFILE.predictor, measured(logged([1.0] * 60)))
    slower = with_host_of(PROFILE.predictor, measured(logged([1.5] * 60, after_s=0.004)))
    for batch, launched in ((DECODE, False), (PROMPT, True)):
        features = StepFeatures.of(batch, {0: 16})
        _, device, launch, host = slower.split(features)
        before = plain.split(features)
        assert device == before[1]
        assert host == pytest.approx(1.5 * before[3])
        assert launch == pytest.approx(1.5 * before[2])
        assert bool(launch) == launched
    after = [p.regimes["decode"].host[HOST_AFTER_PROMPTS] for p in (plain, slower)]
    assert after[1] == pytest.approx(1.5 * after[0] + 0.004)
    twice = times(plain, 2.0).split(StepFeatures.of(PROMPT, {0: 16}))
    assert twice[1:] == pytest.approx(
        [plain.split(StepFeatures.of(PROMPT, {0: 16}))[i] * (1, 2, 2)[i - 1] for i in (1, 2, 3)]
    )


def test_launches_that_nobody_timed_are_not_taken_for_fast_ones() -> None:
    untimed = logged([1.5] * 60).assign(launch_s=0.0)
    before, after = PROFILE.predictor, with_host_of(PROFILE.predictor, measured(untimed))
    assert after.regimes["eager"] == before.regimes["eager"]
    assert after.regimes["decode"] != before.regimes["decode"]
    speed = HostSpeed.of(PROFILE.predictor, untimed)
    assert not speed.launched.at_s
    assert speed.at(3.0, launched=True) == pytest.approx(1.5)


def test_time_between_steps_is_the_host_s_in_a_closed_loop() -> None:
    log = logged([1.0] * 60)
    log.loc[0, "between_s"] = np.nan
    with_it = with_time_between(PROFILE.predictor, [log])
    for name, requests in (("decode", 20), ("eager", 21)):
        gained = np.subtract(with_it.regimes[name].host, PROFILE.predictor.regimes[name].host)
        assert gained[HOST_STEP] + requests * gained[HOST_REQUESTS] == pytest.approx(0.001 + 0.0001 * requests)
    without = log.assign(between_s=np.nan)
    assert with_time_between(PROFILE.predictor, [without]) == PROFILE.predictor


def test_a_steady_host_is_the_plain_replay_and_a_slow_one_takes_longer() -> None:
    trace = read_trace(GOLDEN / "ml8_rate8_requests.csv", None)
    trace = replace(trace, requests=trace.requests.iloc[:40])
    config = EngineConfig(max_loras=8, max_cpu_loras=64, enable_prefix_caching=False)
    plain = replayed(trace, PROFILE, config, 2000, 16)
    tables = {
        ratio: replayed(trace, PROFILE, config, 2000, 16, HostDraw(HostOutlook((steady(ratio),), Spread(0.0))))
        for ratio in (1.0, 2.0)
    }
    pd.testing.assert_frame_equal(tables[1.0].requests, plain.requests)
    pd.testing.assert_frame_equal(tables[1.0].steps, plain.steps)
    slow, fast = tables[2.0].steps, plain.steps
    assert (slow["end_s"] - slow["start_s"]).mean() > 1.1 * (fast["end_s"] - fast["start_s"]).mean()


def test_a_host_that_is_drawn_goes_step_by_step() -> None:
    config = EngineConfig(max_loras=8)
    host = HostDraw(HostOutlook((steady(1.0),), Spread(0.0)))
    backend = ScatteredReplay(PROFILE, load_geometry("llama-3.1-8b"), limits_of(config), 100, host)
    assert not supports(config, backend)
