"""Describing traffic, and imitating it: statistics by hand, fits that reproduce what they were fitted to."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from benchmarks import workload_fits
from sim.cli import main
from workloads import fitting, locality, popularity, reuse
from workloads.build import build_workload
from workloads.describe import describe, dispersion
from workloads.fit import compare, fit, worst
from workloads.requests import RequestTable
from workloads.traces.formats import OPENERS, open_trace, recognise

DATA = Path(__file__).parents[1] / "workloads" / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "traces"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_statistics_by_hand() -> None:
    arrival = np.array([0.0, 1.0, 2.0, 4.0])
    adapter = np.array([1, 2, 0, 1])
    facts = describe(RequestTable(arrival, np.array([2, 4, 6, 8]), np.array([1, 1, 1, 5]), adapter))
    assert facts["requests"] == 4
    assert facts["rate_rps"] == pytest.approx(3 / 4)
    assert facts["gap_cv"] == pytest.approx(np.std([1, 1, 2]) / np.mean([1, 1, 2]))
    assert (facts["base_share"], facts["adapters_used"]) == (0.25, 2)
    assert facts["top1_share"] == pytest.approx(2 / 3)
    assert facts["effective_adapters"] == pytest.approx(1 / (4 / 9 + 1 / 9))
    assert (facts["lru_hit_1"], facts["lru_hit_2"]) == (0.0, pytest.approx(1 / 3))
    assert (facts["mean_prompt_tokens"], facts["p50_output_tokens"]) == (5.0, 1.0)
    assert dispersion(np.array([0.5, 0.6, 1.5, 3.5, 5.0]), 1) == pytest.approx(np.var([2, 1, 0, 1, 0], ddof=1) / 0.8)


def made(seed: int = 0) -> RequestTable:
    """Twenty minutes of bursty, skewed, local traffic whose rate changes."""
    table = {
        "kind": "synthetic", "duration_s": 1200, "arrival": "gamma", "cv": 2.0,
        "rate": {"kind": "piecewise", "start_s": [0, 600], "rps": [6, 14]},
        "prompt": {"kind": "lognormal", "median": 200, "sigma": 0.8}, "output": {"kind": "lognormal", "median": 90, "sigma": 0.5},
        "popularity": {"kind": "zipf_mandelbrot", "s": 1.6, "q": 3.0},
        "locality": {"kind": "repeat", "share": 0.65, "mean_gap": 3.0}, "base_share": 0.1,
    }  # fmt: skip
    return build_workload(table, adapter_count=60, seed=seed, base_dir=Path()).requests


def test_a_fit_reproduces_what_it_was_fitted_to() -> None:
    requests = made()
    count, table = fit(requests)
    off = worst(compare(requests, count, table, seed=3))
    assert table["cv"] == pytest.approx(2.0, rel=0.1)
    assert off["rate_rel"] < 0.05
    assert off["gap_cv_rel"] < 0.1
    assert off["share_abs"] < 0.05
    assert off["hit_abs"] < 0.06
    assert off["mean_length_rel"] < 0.05


def test_the_fitted_stack_has_the_hit_curve() -> None:
    drawn = locality.repeat(popularity.draw(popularity.zipf_mandelbrot(80, 1.0), 30_000, rng(1)), 0.7, 4.0, rng(2))
    weights = fitting.stack(drawn + 1)
    again = locality.lru_stack(80, 30_000, weights, rng(3))
    slots = np.array([1, 2, 4, 8, 16, 32, 64])
    real, synthetic = (reuse.hit_curve(reuse.stack_distances(a), slots) for a in (drawn, again))
    np.testing.assert_allclose(synthetic, real, atol=0.012)
    count, table = fit(made(), "lru_stack")
    assert worst(compare(made(), count, table))["hit_abs"] < 0.03


@pytest.mark.parametrize(
    ("name", "kind"),
    [("azure_conv_sample.csv", "azure_llm"), ("servegen_m_large", "servegen"), ("mooncake_conversation_sample.jsonl", "mooncake"),
     ("vtc_arena_sample.jsonl", "vtc"), ("azure_functions_2019_sample.csv", "azure_functions_2019"),
     ("azure_functions_2021_sample.csv", "azure_functions_2021")],
)  # fmt: skip
def test_every_format_is_recognised(name: str, kind: str) -> None:
    assert recognise(DATA / name) == kind
    assert kind in OPENERS
    requests = open_trace(DATA / name, duration_s=600).requests
    assert len(requests)
    assert requests.arrival_s[-1] < 600


def test_describe_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "d"
    assert main(["workload", "describe", str(DATA / "vtc_arena_sample.jsonl"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    facts = json.loads((out / "statistics.json").read_text())
    assert f"requests{facts['requests']:>34}" in printed
    assert "LRU hits with k slots" in printed
    assert printed.splitlines()[-1] == str(out)
    assert (out / "figure.png").stat().st_size > 10_000
    assert main(["workload", "describe", "demo-azure", "--duration-s", "60", "--out", str(tmp_path / "s")]) == 0
    assert "zipf_mandelbrot_s" in json.loads((tmp_path / "s" / "statistics.json").read_text())


def test_describe_without_lengths_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = DATA / "azure_functions_2021_sample.csv"
    assert main(["workload", "describe", str(file), "--out", str(tmp_path / "d")]) == 0
    printed = capsys.readouterr().out
    assert "note: the trace has no token counts" in printed
    assert "prompt_tokens" not in printed


def test_a_fitted_scenario_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fitted.toml"
    assert main(["workload", "fit", str(DATA / "vtc_arena_sample.jsonl"), "--out", str(file)]) == 0
    assert "worst: rate_rel" in capsys.readouterr().out
    scenario = tomllib.loads(file.read_text())
    assert scenario["adapters"]["count"] == 22 or scenario["adapters"]["count"] > 5
    assert main(["run", str(file), "--duration-s", "20", "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["describe", "nowhere.csv"], "nowhere.csv: no such file"),
        (["describe", "x.csv"], "x.csv:1: no known trace format begins so; name it with --from"),
        (["describe", "."], ".: a folder without chunk-N-trace.csv"),
        (["describe", "demo-azure", "--duration-s", "0"], "--duration-s is 0.0, must be finite and > 0"),
        (["fit", "f.csv", "--out", "s.toml"], "f.csv: the trace has no token counts, so no scenario can be fitted"),
        (["fit", "x.csv", "--out", "x.csv"], "--out x.csv: exists already"),
        (
            ["convert", "f.csv", "--to", "table", "--out", "o.csv"],
            "the trace has no token counts; give lengths in a scenario",
        ),
        (["convert", "x.csv", "--to", "nothing", "--out", "o"], "--to nothing: unknown, must be one of table, "),
    ],
)
def test_bad_input_is_refused(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "f.csv").write_bytes((DATA / "azure_functions_2021_sample.csv").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    assert main(["workload", *argv]) == 2
    assert says in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_trace_that_cannot_be_read_ends_the_table_of_all_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50.99,396,x\n"
    )
    assert workload_fits.main(["--data", str(tmp_path), "--out", str(tmp_path / "rows.csv")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{trace}:3: GeneratedTokens is 'x'" in said
    assert not (tmp_path / "rows.csv").exists()
