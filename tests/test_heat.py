"""Heat: planted heat comes back from repeats in random orders, none is found where there is none, and a replay keeps account of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from backend.base import EngineLimits, StepBatch
from backend.errors import BackendError
from backend.features import StepFeatures
from backend.geometry import load_geometry
from backend.heat import Heat, HeatCurve, drive
from backend.heat_fit import NO_HEAT, fit_heat, levels
from backend.measure import profile_from, refit_profile, rested
from backend.predictor import BOUNDED, TERMS, Predictor, Regime
from backend.profile import Profile, load_profile, write_profile
from backend.profile_quality import behind_prompts, quality
from backend.replay import ReplayBackend

TOKENS = [1, 4, 16, 64, 256, 512, 1024, 2048]
REGIMES = ["decode"] * 4 + ["mixed"] * 4
COOL_S = [0.005, 0.005, 0.006, 0.007, 0.011, 0.016, 0.027, 0.052]
USED = [True] * len(TOKENS)


CURVE = HeatCurve(0.05, 250.0)


def executed(curve: HeatCurve, slopes: dict[str, float], *, noise: float = 0.0, rounds: int = 40) -> pd.DataFrame:
    """Rounds of these steps in random orders on a GPU of that heat, with a rest now and then."""
    rng, rows = np.random.default_rng(5), []
    for number in range(rounds):
        heat, now_s = Heat(curve), 100.0 * number
        for i in rng.permutation(np.repeat(np.arange(len(TOKENS)), 3)).tolist():
            rest_s = 0.02 * float(rng.random() < 0.1)
            device_s = heat.step(COOL_S[i], slopes[REGIMES[i]], TOKENS[i], rest_s + 1e-4)
            device_s *= 1 + noise * float(rng.standard_normal())
            rows.append((number, i, now_s + rest_s, 1e-4, device_s))
            now_s += rest_s + 1e-4 + device_s
    return pd.DataFrame(rows, columns=["round", "composition", "start_s", "host_s", "device_s"])


def test_planted_heat_comes_back() -> None:
    planted = {"decode": 3e-5, "mixed": 6e-5}
    steps = executed(CURVE, planted)
    fit = fit_heat(steps, TOKENS, REGIMES, USED)
    assert fit.curve.tau_s == 0.05
    assert fit.curve.spare == pytest.approx(250.0, rel=0.2), "to the nearest share of the steps that is tried"
    assert fit.slopes == pytest.approx(planted, rel=0.05)
    assert fit.explained > 0.99
    cooled = steps["device_s"] / fit.factors(steps, TOKENS, REGIMES)
    assert cooled.to_numpy() == pytest.approx(np.array(COOL_S)[steps["composition"]], rel=3e-3)


def test_heat_up_to_a_level_tells_nothing() -> None:
    plain = fit_heat(executed(HeatCurve(0.05, 0.0), {"decode": 3e-5, "mixed": 6e-5}), TOKENS, REGIMES, USED)
    assert (plain.curve, plain.slopes["mixed"]) == (HeatCurve(0.05, 0.0), pytest.approx(6e-5, rel=1e-3))
    heat = Heat(HeatCurve(0.05, 1e6))
    assert [heat.step(0.052, 6e-5, 2048, 0.0) for _ in range(5)] == [0.052] * 5


def test_noise_hides_no_heat_and_makes_none() -> None:
    noisy = fit_heat(executed(CURVE, {"decode": 3e-5, "mixed": 6e-5}, noise=0.01), TOKENS, REGIMES, USED)
    assert noisy.slopes["mixed"] == pytest.approx(6e-5, rel=0.15)
    assert 0.2 < noisy.explained < 0.95
    assert fit_heat(executed(CURVE, {"decode": 0.0, "mixed": 0.0}, noise=0.01), TOKENS, REGIMES, USED) == NO_HEAT
    same = executed(CURVE, {"decode": 0.0, "mixed": 0.0})
    assert fit_heat(same, TOKENS, REGIMES, USED) == NO_HEAT, "repeats that do not differ say nothing"
    assert NO_HEAT.factors(same, TOKENS, REGIMES).tolist() == [1.0] * len(same)


def test_steps_that_only_check_a_fit_are_not_looked_at() -> None:
    steps = executed(CURVE, {"decode": 3e-5, "mixed": 6e-5})
    odd = steps["composition"] == 5
    steps.loc[odd, "device_s"] *= np.linspace(0.97, 1.03, int(odd.sum()))
    unseen = fit_heat(steps, TOKENS, REGIMES, [i != 5 for i in range(len(TOKENS))])
    assert unseen.slopes["mixed"] == pytest.approx(6e-5, rel=0.03)


def test_heat_rises_with_work_and_falls_with_rest() -> None:
    heat = Heat(CURVE)
    heat.work(2048, 0.052)
    hot = heat.level
    assert 0 < hot < drive(2048, 0.052) == pytest.approx((2048 / 52) ** 2)
    heat.rest(0.05)
    assert heat.level == pytest.approx(hot / math.e)
    assert drive(5, 0.0) == 0.0, "a step that takes no time does no work"


def test_a_step_that_lasts_is_what_many_in_a_row_come_to() -> None:
    heat, device_s = Heat(CURVE), 0.0
    for _ in range(500):
        device_s = heat.step(0.027, 6e-5, 1024, 0.0)
    assert CURVE.lasting_s(0.027, 6e-5, 1024) == pytest.approx(device_s, rel=1e-6)
    assert CURVE.lasting_s(0.027, 0.0, 1024) == 0.027
    assert HeatCurve().lasting_s(0.027, 6e-5, 1024) == 0.027, "where nothing is known of heat"


def predictor() -> Predictor:
    low, high = dict.fromkeys(BOUNDED, 0.0), dict.fromkeys(BOUNDED, 1e9)
    some = Regime(
        (1.0, 4096.0), (1.0,), (0.005, 0.1) + (0.0,) * (1 + len(TERMS)), (1e-4,) + (0.0,) * 6, low, high, heat=5e-5
    )
    return Predictor(
        (1, 64, 4096), {"decode": replace(some, heat=2e-5), "mixed": some, "eager": some}, HeatCurve(0.05, 60.0)
    )


def replay(of: Predictor) -> ReplayBackend:
    shipped = load_profile("h100-llama-3.1-8b")
    profile = Profile("heated", shipped.gpu_bytes, of, shipped.stage, shipped.load, shipped.accuracy, shipped.meta)
    return ReplayBackend(profile, load_geometry("llama-3.1-8b"), EngineLimits(4, 16, 64, 8192, 8192, 16, 0.9), 100)


def batch(query: int, count: int = 1, idle_s: float = 0.0) -> StepBatch:
    return StepBatch((query,) * count, (10,) * count, (-1,) * count, (True,) * count, idle_s=idle_s)


def test_a_replayed_step_takes_longer_behind_long_prompts_until_the_gpu_has_rested() -> None:
    backend = replay(predictor())
    first = backend.execute(batch(1)).device_s
    for _ in range(4):
        backend.execute(batch(2048))
    hot = backend.execute(batch(1)).device_s
    for _ in range(4):
        backend.execute(batch(2048))
    rested_s = backend.execute(batch(1, idle_s=1.0)).device_s
    assert hot > 1.005 * first
    assert rested_s == pytest.approx(first, rel=1e-6)
    cold = replay(replace(predictor(), heat=HeatCurve()))
    cold.execute(batch(2048))
    assert cold.execute(batch(1)).device_s == first, "a profile that knows nothing of heat replays as before"


def test_a_lasting_prediction_is_what_a_replay_comes_to() -> None:
    backend = replay(predictor())
    times = [backend.execute(batch(1, 64)).device_s for _ in range(400)]
    assert predictor().predict_lasting(StepFeatures.of(batch(1, 64), {}))[0] == pytest.approx(times[-1], rel=2e-3)
    assert times[-1] > times[0]


def test_an_idle_time_below_nothing_is_refused() -> None:
    for wrong in (-1.0, math.nan):
        with pytest.raises(BackendError, match="idle_s"):
            batch(1, idle_s=wrong)


def test_a_profile_file_keeps_its_heat() -> None:
    kept = predictor()
    assert Predictor.from_json(kept.to_json()) == kept


def table() -> pd.DataFrame:
    query = [[1] * n for n in TOKENS[:4]] + [[n] for n in TOKENS[4:]]
    rows = [
        {"query_lens": q, "context_lens": [10] * len(q), "slots": [-1] * len(q), "ranks": [0] * len(q)} for q in query
    ]
    return pd.DataFrame(rows).assign(kind="grid")


def test_a_measurement_keeps_rested_steps_and_a_refit_finds_their_heat_again(tmp_path: Path) -> None:
    planted, sizes = {"decode": 3e-5, "mixed": 6e-5}, (1, 4, 16, 64, 256, 512, 1024)
    compositions = pd.concat([table(), table().assign(kind="held_out")], ignore_index=True)
    ran = executed(CURVE, planted).assign(on_end=False)
    ran = pd.concat([ran, ran.assign(round=ran["round"] + 100, composition=ran["composition"] + len(TOKENS))])
    ran = ran.reset_index(drop=True)
    steps, heat = rested(compositions, ran, sizes)
    assert steps["device_s"].to_numpy() == pytest.approx(COOL_S * 2, rel=3e-3)
    assert heat.slopes["mixed"] == pytest.approx(6e-5, rel=0.05)
    loads = pd.DataFrame({"kind": ["stage", "load"], "rank": 8, "nbytes": [10, 10], "elapsed_s": 0.1})
    facts = {"geometry": "llama-3.1-8b", "limits": {}, "heat_explains": round(heat.explained, 3)}
    profile = profile_from("made", 1 << 36, sizes, steps, loads, facts, heat)
    write_profile(profile, steps, loads, tmp_path / "made", ran)
    assert load_profile(str(tmp_path / "made")).predictor.regimes["mixed"].heat == heat.slopes["mixed"]
    again = refit_profile(tmp_path / "made", tmp_path / "again")
    assert again.predictor == profile.predictor and again.meta == profile.meta
    assert pd.read_parquet(tmp_path / "again" / "rounds.parquet").equals(ran)
    (tmp_path / "again" / "rounds.parquet").unlink()
    with pytest.raises(BackendError, match=r"has no rounds\.parquet"):
        refit_profile(tmp_path / "again", tmp_path / "third")


def test_each_round_begins_with_a_rested_gpu() -> None:
    steps = executed(CURVE, {"decode": 3e-5, "mixed": 6e-5}, rounds=3)
    level = levels(steps, TOKENS, 0.05)
    assert level[steps.groupby("round").head(1).index.to_numpy()].tolist() == [0.0] * 3
    assert level.max() > 500


def test_a_profile_tells_of_its_heat() -> None:
    kept = replay(predictor()).profile
    lines = list(quality(replace(kept, meta={**kept.meta, "heat_explains": 0.7})))
    assert "heat: behind prompts of 2048 tokens" in lines[-1] and "70% of the variance" in lines[-1]
    longer = behind_prompts(predictor())
    assert longer["mixed"] == pytest.approx(2.5 * longer["decode"]) != 0
    cold = replace(kept, predictor=replace(predictor(), heat=HeatCurve()))
    assert not any("heat" in line for line in quality(cold))
