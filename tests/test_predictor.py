"""What a predictor sees of a step, and that a fit gives planted costs back."""

from __future__ import annotations

from dataclasses import astuple, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.base import StepBatch
from backend.errors import BackendError
from backend.features import DECODES_AT_ONCE, FEW_DECODES, FILLING_DECODES, PREFILL_TILE, TILES_AT_ONCE, StepFeatures
from backend.fitting import accuracy, composition, features_of, with_features
from backend.measure import refit_profile
from backend.profile import load_profile, measured_steps
from backend.regression import Engine, Measured, fit_predictor
from sim.cli import main

MEASURED = Path(str(files("backend"))) / "profiles" / "h100-llama-3.1-8b"
RANKS = {0: 8, 1: 64}


def step(query: list[int], context: list[int], slots: list[int] | None = None) -> StepFeatures:
    slots = [-1] * len(query) if slots is None else slots
    return StepFeatures.of(StepBatch(tuple(query), tuple(context), tuple(slots), (True,) * len(query)), RANKS)


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=64), st.integers(1, 500))
def test_decodes_that_grow_together_keep_their_tail(contexts: list[int], more: int) -> None:
    before, after = (step([1] * len(contexts), [c + n for c in contexts]) for n in (0, more))
    assert after.kv_tail == before.kv_tail
    assert after.kv_tokens == before.kv_tokens + more * len(contexts)
    assert after.max_kv == before.max_kv + more


def test_the_tail_counts_the_longest_that_run_at_a_time() -> None:
    assert step([1] * 2, [9, 99]).kv_tail == 0  # two decodes are split so far that one fills the processors
    assert step([1] * 8, [99] * 4 + [49] * 4).kv_tail == 0  # four at a time: the four longest are alike
    assert step([1] * 8, [99] * 3 + [49] * 5).kv_tail == 50
    many = step([1] * 200, [999] + [499] * 199)
    assert many.kv_tail == (DECODES_AT_ONCE - 1) * 500
    for count in (FILLING_DECODES, FEW_DECODES):  # whose programs are so quick that fewer fill the memory's bandwidth
        assert step([1] * count, [999] + [499] * (count - 1)).kv_tail == (FILLING_DECODES - 1) * 500


@given(st.integers(2, 3000), st.integers(0, 3000))
def test_prefill_keys_are_those_of_each_tile(query: int, context: int) -> None:
    ends = [context + min(query, start + PREFILL_TILE) for start in range(0, query, PREFILL_TILE)]
    features = step([query], [context])
    assert features.prefill_keys == sum(ends)
    longest = sorted(ends, reverse=True)[:TILES_AT_ONCE]
    assert features.prefill_tail == TILES_AT_ONCE * longest[0] - sum(longest)
    assert not features.decode_only


def test_adapters_are_counted_once() -> None:
    features = step([1, 1, 20, 1], [5, 6, 0, 8], [0, 0, 1, -1])
    assert (features.active_adapters, features.rank_sum, features.max_rank) == (2, 72, 64)
    assert (features.lora_rows, features.lora_tiles, features.row_rank) == (22, 1 + 2, 2 * 8 + 20 * 64)


def test_planted_attention_comes_back() -> None:
    """Keys at a rate, the longest alone: contexts far apart are predicted from a fit to others."""
    rng = np.random.default_rng(1)
    steps = []
    for size in (8, 32, 64):
        for i in range(40):
            contexts = [300] * size if i < 10 else rng.integers(1, 8000, size).tolist()
            steps.append(step([1] * size, contexts))
    steps += [step([2000 + 500 * i], [0]) for i in range(4)]

    def device(f: StepFeatures) -> float:
        idle = max(0, FILLING_DECODES - f.decodes) * f.max_kv if f.decodes > 16 else 0
        return 5e-3 + 1e-5 * f.rows + 4e-8 * f.kv_tokens + 2e-8 * (f.kv_tail + idle) + 9e-8 * f.prefill_keys

    device_s = np.array([device(f) for f in steps])
    host_s = np.full(len(steps), 1e-3)
    predictor = fit_predictor(Measured(tuple(steps), device_s, host_s, 0 * host_s), Engine((8, 32, 64)))
    for f in (step([1] * 64, [8000] + [10] * 63), step([1] * 32, [4000] * 16 + [30] * 16), step([1] * 8, [7777] * 8)):
        assert sum(predictor.predict(f)[:2]) == pytest.approx(device(f) + 1e-3, rel=0.01)


def test_captured_steps_of_many_rows_are_a_regime_of_their_own() -> None:
    """Planted: microseconds of a step by the rows it is executed at, and of one that is launched kernel by kernel."""
    planted = {64: 64, 700: 1024, 1024: 1024, 1100: 4096, 2048: 4096, 3000: 18000, 4000: 24000}
    steps = tuple(step([rows], [0]) for rows in planted for _ in range(3))
    took_s = np.array([1e-6 * us for us in planted.values() for _ in range(3)])
    predictor = fit_predictor(Measured(steps, took_s, 0 * took_s, 0 * took_s), Engine((64, 1024, 2048)))
    named = [predictor.regime(step([rows], [0])) for rows in (60, 1024, 1025, 2048, 2049)]
    assert named == [("mixed", 64), ("mixed", 1024), ("long", 2048), ("long", 2048), ("eager", 2049)]
    for rows, us in ((1000, 1024), (1500, 4096), (3500, 21000)):
        assert predictor.predict(step([rows], [0]))[0] == pytest.approx(1e-6 * us, rel=0.01)
    lora = tuple(
        step([rows], [0], [0] if rows == 1500 else None) for rows in (64, 700, 1024, 1500, 3000, 4000) for _ in range(3)
    )
    few_s = np.full(len(lora), 1e-3)
    merged = fit_predictor(Measured(lora, few_s, 0 * few_s, 0 * few_s), Engine((64, 1024, 2048)))
    assert set(merged.regimes) == {"mixed", "eager"}
    fewer = replace(predictor, regimes={k: r for k, r in predictor.regimes.items() if k != "long"})
    assert fewer.split(step([1500], [0]))[0] is predictor.regimes["mixed"], (
        "of an engine whose steps do not tell it apart"
    )


def test_a_table_of_steps_gives_its_features_back() -> None:
    batch = StepBatch((1, 30), (7, 0), (1, -1), (True, True))
    table = pd.DataFrame([{"kind": "grid", **composition(batch, RANKS)}])
    assert features_of(table) == [StepFeatures.of(batch, RANKS)]
    assert with_features(table)["rows"].tolist() == [31]


@pytest.mark.parametrize("name", ["h100-llama-3.1-8b", "h100-llama-3.2-1b", "h200-llama-3.1-8b"])
def test_the_shipped_profiles_are_what_their_steps_fit(name: str, tmp_path: Path) -> None:
    made = refit_profile(MEASURED.with_name(name), tmp_path / name)
    shipped = load_profile(name)
    assert made.accuracy == pytest.approx(shipped.accuracy, rel=1e-6)
    assert made.accuracy["steps"] == 300
    assert astuple(made.predictor.heat) == pytest.approx(astuple(shipped.predictor.heat), rel=1e-6)
    assert made.accuracy["mape"] <= 0.03
    assert made.accuracy["p95"] <= 0.08
    steps = pd.read_parquet(measured_steps(name) or "")
    assert accuracy(shipped.predictor, steps[steps["kind"] == "held_out"]) == pytest.approx(made.accuracy, rel=1e-6)


def test_a_refit_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match=r"has no profile\.json"):
        refit_profile(tmp_path, tmp_path / "new")
    with pytest.raises(BackendError, match="exists already"):
        refit_profile(MEASURED, tmp_path)
    vllm = measured_steps("vllm-0.24-h100-llama-3.1-8b")
    assert vllm is not None
    with pytest.raises(BackendError, match="from-steps"):
        refit_profile(vllm.parent, tmp_path / "new")
    assert main(["measure", "--refit", str(MEASURED), "--quick", "--out", str(tmp_path / "new")]) == 2
    assert "--refit takes only --out" in capsys.readouterr().err
    assert main(["measure", "--out", str(tmp_path / "new")]) == 2
    assert "needs --geometry" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
