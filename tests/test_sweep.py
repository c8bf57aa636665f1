"""Sweeps: the grid, rows that survive a kill, the same table from any number of processes, and the planner's sentence."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from backend.profile import profile_folder
from sim.cli import main
from sim.errors import ScenarioError
from sim.sweep import Point, grid, parse_sets, sweep, with_settings
from sim.verdict import THROUGHPUT, TPOT, TTFT, verdicts

SCENARIO = """
[model]
geometry = "llama-3.1-8b"
[engine]
max_cpu_loras = 16
max_model_len = 2048
[adapters]
count = 8
rank = 16
[workload]
kind = "synthetic"
rate_rps = 20
duration_s = 8
prompt = { kind = "fixed", tokens = 60 }
output = { kind = "lognormal", median = 20, sigma = 0.6 }
popularity = { kind = "zipf", s = 1.0 }
[backend]
kind = "profile"
profile = "h100-llama-3.1-8b"
"""
SETS = {"engine.max_loras": [1, 2, 8], "workload.rate_rps": [10, 30]}


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    file = tmp_path / "s.toml"
    file.write_text(SCENARIO)
    return file


def test_sets_are_toml_values_or_texts() -> None:
    assert parse_sets(["engine.max_loras=1,2", "engine.scheduling_policy=fcfs,sjf", "engine.watermark=0.5"]) == {
        "engine.max_loras": [1, 2],
        "engine.scheduling_policy": ["fcfs", "sjf"],
        "engine.watermark": [0.5],
    }
    assert parse_sets(
        ["adapters.ranks=[8, 16],[32]", "adapters.pinned=['a,b'],[]", "engine.lora_loading=blocking,x y"]
    ) == {
        "adapters.ranks": [[8, 16], [32]],
        "adapters.pinned": [["a,b"], []],
        "engine.lora_loading": ["blocking", "x y"],
    }


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["engine.max_loras"], "must be TABLE.KEY=VALUE"),
        (["max_loras=1"], "must be TABLE.KEY=VALUE"),
        (["engine.max_loras="], "must be TABLE.KEY=VALUE"),
        (["engine.max_loras=1,1"], "a value comes twice"),
        (["engine.max_loras=1", "engine.max_loras=2"], "given twice"),
        (["adapters.ranks=[8],[8]"], "a value comes twice"),
        (["run.seed=1,2"], "seeds are counted by --seeds"),
    ],
)
def test_sets_that_cannot_be(texts: list[str], says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        parse_sets(texts)


def test_the_grid_has_every_combination_once() -> None:
    points = grid(SETS, [3, 4])
    assert len(points) == len({p.name for p in points}) == 12
    assert points[0] == Point((("engine.max_loras", 1), ("workload.rate_rps", 10)), 3)
    assert points[1].seed == 4


def test_settings_reach_nested_tables_and_leave_the_original_alone() -> None:
    tables = {"workload": {"popularity": {"kind": "zipf", "s": 1.0}}}
    changed = with_settings(tables, Point((("workload.popularity.s", 2.0), ("slo.p99_ttft_ms", 5)), 7))
    assert changed == {
        "workload": {"popularity": {"kind": "zipf", "s": 2.0}}, "slo": {"p99_ttft_ms": 5}, "run": {"seed": 7},
    }  # fmt: skip
    assert tables["workload"]["popularity"]["s"] == 1.0
    with pytest.raises(ScenarioError, match="no table"):
        with_settings({"engine": 3}, Point((("engine.max_loras", 1),), 0))


def test_rows_of_an_older_profile_are_not_mixed_with_new_ones(scenario: Path, tmp_path: Path) -> None:
    shutil.copytree(profile_folder("h100-llama-3.1-8b"), tmp_path / "mine")
    scenario.write_text(SCENARIO.replace('"h100-llama-3.1-8b"', '"mine"'))
    one = sweep(str(scenario), {"engine.max_loras": [2]}, out=tmp_path / "o", jobs=1)
    pd.testing.assert_frame_equal(sweep(str(scenario), {"engine.max_loras": [2]}, out=tmp_path / "o", jobs=1), one)
    file = tmp_path / "mine" / "profile.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ScenarioError, match="exists already and is not this sweep"):
        sweep(str(scenario), {"engine.max_loras": [2]}, out=tmp_path / "o", jobs=1)


def test_a_sweep_killed_while_it_began_is_taken_up(scenario: Path, tmp_path: Path) -> None:
    """kill -9 between its first calls leaves an empty folder, or half of `sweep.toml`."""
    for name, left in (("empty", None), ("half", "sweep.partial")):
        (tmp_path / name).mkdir()
        if left:
            (tmp_path / name / left).write_text("half of i")
        sweep(str(scenario), {"engine.max_loras": [2]}, out=tmp_path / name, jobs=1)
        assert {f.name for f in (tmp_path / name).iterdir()} == {"rows", "results.parquet", "sweep.toml"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ScenarioError, match="exists already and is not this sweep"):
        sweep(str(scenario), {"engine.max_loras": [2]}, out=tmp_path / "mine", jobs=1)
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_any_number_of_processes_gives_the_same_table(scenario: Path, tmp_path: Path) -> None:
    one = sweep(str(scenario), SETS, out=tmp_path / "one", seeds=2, jobs=1)
    two = sweep(str(scenario), SETS, out=tmp_path / "two", seeds=2, jobs=2)
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert len(one) == 12
    assert (one["status"] == "ok").all()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "one" / "results.parquet"), one)
    slow = one[one["engine.max_loras"] == 1][TTFT].mean()
    assert slow > 3 * one[one["engine.max_loras"] == 8][TTFT].mean()


def test_rows_that_cannot_be_served_are_kept_as_such(scenario: Path, tmp_path: Path) -> None:
    table = sweep(str(scenario), {"engine.max_loras": [8, 32]}, out=tmp_path / "o", jobs=1)
    assert table["status"].tolist() == ["ok", "refused"]
    assert "max_cpu_loras is 16, must be >= engine.max_loras (32)" in table["error"][1]
    with pytest.raises(ScenarioError, match="not one of 1 runs can be served"):
        sweep(str(scenario), {"engine.max_loras": [32]}, out=tmp_path / "p", jobs=1)


def test_another_sweep_is_not_taken_up(scenario: Path, tmp_path: Path) -> None:
    sweep(str(scenario), {"engine.max_loras": [2]}, out=tmp_path / "o", jobs=1)
    with pytest.raises(ScenarioError, match="exists already and is not this sweep"):
        sweep(str(scenario), {"engine.max_loras": [4]}, out=tmp_path / "o", jobs=1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_sweep_goes_on_and_loses_and_doubles_nothing(scenario: Path, tmp_path: Path, jobs: int) -> None:
    """kill -9 of all its processes, just after a row and at any moment, also while it starts."""
    whole = sweep(str(scenario), SETS, out=tmp_path / "whole", seeds=6, jobs=1)
    out = tmp_path / "killed"
    sets = [f"--set={key}={','.join(map(str, values))}" for key, values in SETS.items()]
    command = [
        sys.executable,
        "-m",
        "sim.cli",
        "sweep",
        str(scenario),
        *sets,
        "--seeds=6",
        f"--jobs={jobs}",
        f"--out={out}",
    ]
    rng, kept, half_way = np.random.default_rng(jobs), {}, 0
    for attempt in range(4):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        after_a_row, deadline = attempt % 2 == 0, time.monotonic() + 60
        while (
            after_a_row
            and process.poll() is None
            and len(list(out.glob("rows/*.json"))) <= len(kept)
            and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.05 if after_a_row else 2.0))
        with contextlib.suppress(ProcessLookupError):  # it had ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        rows = {f.name: (f.stat().st_mtime_ns, json.loads(f.read_text())) for f in out.glob("rows/*.json")}
        assert len(rows) > len(kept) or len(kept) == len(whole) or not after_a_row
        half_way += 0 < len(rows) < len(whole)
        assert all(rows[name] == row for name, row in kept.items()), "a finished row was lost or run again"
        kept = rows
    assert len(kept) <= len(whole)
    assert half_way, "every kill came too late or too early"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert all((out / "rows" / name).stat().st_mtime_ns == at for name, (at, _) in kept.items())
    assert len(list(out.glob("rows/*.json"))) == len(whole)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "results.parquet"), whole, check_exact=True)


def test_a_sweep_on_a_local_ray(scenario: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed (the extra [ray])")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    except (RuntimeError, OSError, TimeoutError) as error:
        pytest.skip(f"Ray does not start on this machine: {error}")
    try:
        there = sweep(str(scenario), {"engine.max_loras": [1, 8]}, out=tmp_path / "ray", jobs=2, executor="ray")
    finally:
        ray.shutdown()
    here = sweep(str(scenario), {"engine.max_loras": [1, 8]}, out=tmp_path / "here", jobs=1)
    pd.testing.assert_frame_equal(there, here, check_exact=True)


def test_the_command_starts_a_ray_where_none_runs(scenario: Path, tmp_path: Path) -> None:
    """From a shell, with nothing started before: as a user calls it."""
    ray = pytest.importorskip("ray", reason="ray is not installed (the extra [ray])")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    except (RuntimeError, OSError, TimeoutError) as error:
        pytest.skip(f"Ray does not start on this machine: {error}")
    ray.shutdown()
    command = [sys.executable, "-m", "sim.cli", "sweep", str(scenario), "--set=engine.max_loras=1,8", "--jobs=2"]
    command += ["--executor=ray", f"--out={tmp_path / 'ray'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert pd.read_parquet(tmp_path / "ray" / "results.parquet")["status"].tolist() == ["ok", "ok"]


def test_live_runs_on_ray_take_a_gpu_each(scenario: Path, tmp_path: Path) -> None:
    """A cluster that claims one GPU runs them one by one; that none is really there is what each row says."""
    ray = pytest.importorskip("ray", reason="ray is not installed (the extra [ray])")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    sets = {"engine.max_loras": [1, 2, 8]}
    for gpus, says in ((0, "this Ray cluster has no GPU"), (1, "not one of 3 runs can be served; .* no CUDA device")):
        try:
            ray.init(num_cpus=2, num_gpus=gpus, include_dashboard=False, log_to_driver=False)
        except (RuntimeError, OSError, TimeoutError) as error:
            pytest.skip(f"Ray does not start on this machine: {error}")
        try:
            with pytest.raises(ScenarioError, match=says):
                sweep(str(scenario), sets, out=tmp_path / str(gpus), jobs=-1, executor="ray", backend="cuda")
        finally:
            ray.shutdown()


def test_arrays_are_settings_too(scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--set", "engine.max_loras=1,8", "--set", "adapters.ranks=[8],[8, 16]", "--set", "workload.duration_s=2"]
    scenario.write_text(SCENARIO.replace("rank = 16", ""))
    assert main(["sweep", str(scenario), *sets, "--jobs", "1", "--out", str(tmp_path / "o")]) == 0
    said = capsys.readouterr().out
    assert "\nadapters.ranks = [8, 16]: best: engine.max_loras = " in said
    assert "\ns, workload.duration_s = 2, profile h100-llama-3.1-8b (MAPE " in said
    assert pd.read_parquet(tmp_path / "o" / "results.parquet")["adapters.ranks"].unique().tolist() == ["[8]", "[8, 16]"]


def results(rows: list[tuple[int, float, float, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["engine.max_loras", THROUGHPUT, TTFT, TPOT])
    return table.assign(status="ok", error=None)


def refused(*values: int) -> pd.DataFrame:
    nothing = dict.fromkeys((THROUGHPUT, TTFT, TPOT), float("nan"))
    return pd.DataFrame([{"engine.max_loras": v, **nothing, "status": "refused", "error": "no room"} for v in values])


def test_the_verdict_by_hand() -> None:
    """Throughput alone would hide the disaster: 8 slots give 98 % of the best throughput and a hundred times the wait."""
    table = results(
        [(8, 3062, 78_000, 30), (16, 3100, 20_000, 31), (32, 3128, 4000, 33), (64, 3120, 200, 36), (128, 2496, 150, 60)]
    )
    (sentence,) = verdicts(table, ["engine.max_loras"], {})
    assert sentence == (
        "best: engine.max_loras = 64 with 3120 output tok/s, P99 TTFT 200 ms, P99 TPOT 36.0 ms."
        " Half of it (32) gives 0.3% more throughput, 20 times the P99 TTFT (4000 ms), 0.917 times the P99 TPOT (33.0 ms)."
        " Twice of it (128) gives 20.0% less throughput, 0.75 times the P99 TTFT (150 ms), 1.67 times the P99 TPOT (60.0 ms)."
    )
    (sentence,) = verdicts(table, ["engine.max_loras"], {"p99_ttft_ms": 160.0})
    assert sentence.startswith("best under p99_ttft_ms <= 160: engine.max_loras = 128")
    assert (
        "1.33 times the P99 TTFT (200 ms), 0.6 times the P99 TPOT (36.0 ms) and breaks p99_ttft_ms <= 160." in sentence
    )
    assert sentence.endswith("Twice of it was not tried.")
    (sentence,) = verdicts(table, ["engine.max_loras"], {"p99_ttft_ms": 500.0, "p99_tpot_ms": 20.0})
    assert sentence.startswith(
        "no engine.max_loras keeps p99_ttft_ms <= 500 and p99_tpot_ms <= 20; the lowest P99 TTFT has"
    )


def test_the_verdict_takes_what_is_nearest_to_a_factor_of_two_and_says_so() -> None:
    table = results([(16, 100, 900, 9), (32, 100, 50, 9), (48, 100, 40, 9), (52, 90, 400, 9)])
    (sentence,) = verdicts(pd.concat([table, refused(64, 128)]), ["engine.max_loras"], {})
    assert "best: engine.max_loras = 48" in sentence
    assert "Half of it (nearest tried: 32) gives 1.25 times the P99 TTFT (50 ms)." in sentence
    assert (
        "Twice of it cannot be served (128 is refused); the nearest that can, 52, gives 10.0% less throughput, 10 times"
        in sentence
    )
    (sentence,) = verdicts(pd.concat([table.head(3), refused(64)]), ["engine.max_loras"], {})
    assert sentence.endswith("Twice of it cannot be served (64 is refused).")
    same = results([(8, 100, 40, 9), (16, 100, 40, 9)])
    assert "Twice of it (16) changes nothing." in verdicts(same, ["engine.max_loras"], {})[0]


def test_the_verdict_counts_seeds_and_says_where_nothing_can_be_served() -> None:
    """A value that one seed was refused at is not the best, however fast the other was."""
    two = results([(8, 100, 60, 9), (8, 120, 80, 9), (16, 200, 1, 1)])
    (sentence,) = verdicts(pd.concat([two, refused(16)]), ["engine.max_loras"], {})
    assert sentence.startswith(
        "best: engine.max_loras = 8 with 110 output tok/s, P99 TTFT 70 ms (60 to 80 over 2 seeds)"
    )
    both = pd.concat([two.head(1).assign(**{"adapters.rank": 8}), refused(8, 16).assign(**{"adapters.rank": 256})])
    sentences = verdicts(both, ["engine.max_loras", "adapters.rank"], {})
    assert sentences[1] == "adapters.rank = 256: no engine.max_loras can be served: no room"


def test_both_ends_hurt_where_memory_is_short(tmp_path: Path) -> None:
    """Few slots make requests queue, many leave no KV blocks: the optimum between is nowhere put in."""
    text = SCENARIO.replace("max_cpu_loras = 16", "max_cpu_loras = 64\nmax_lora_rank = 64").replace(
        "count = 8", "count = 64"
    )
    text = text.replace("rate_rps = 20", "rate_rps = 30").replace("duration_s = 8", "duration_s = 12")
    text = text.replace("tokens = 60", "tokens = 300").replace("median = 20", "median = 80")
    (tmp_path / "s.toml").write_text(text + "gpu_memory_gib = 40\n")
    table = sweep(str(tmp_path / "s.toml"), {"engine.max_loras": [8, 32, 53, 64]}, out=tmp_path / "o", jobs=2)
    assert table["status"].tolist() == ["ok", "ok", "ok", "refused"]
    assert table["num_gpu_blocks"].dropna().is_monotonic_decreasing
    few, best, many = table[TTFT][:3]
    assert few > 10 * best
    assert many > 10 * best
    (sentence,) = verdicts(table, ["engine.max_loras"], {})
    assert sentence.startswith("best: engine.max_loras = 32 with")
    assert "Twice of it cannot be served (64 is refused); the nearest that can, 53, gives" in sentence


def test_the_command_draws_and_says(scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sweep", str(scenario), "--set", "engine.max_loras=1,8", "--set", "workload.rate_rps=10,30", "--jobs", "1"]
    assert main([*argv, "--out", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert sum("best: engine.max_loras = " in line for line in out) == 2
    assert out[-1] == str(tmp_path / "o")
    for name in ("lines.png", "lines.svg", "heat_maps.png", "heat_maps.svg"):
        assert (tmp_path / "o" / name).stat().st_size > 5000


@pytest.mark.parametrize("adapter", ["a", ""])
def test_what_no_run_measured_is_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: str) -> None:
    """One output token has no TPOT, the base model no hit rate; policies are drawn without a line between them."""
    (tmp_path / "t.csv").write_text(
        f"arrival_s,prompt_tokens,output_tokens,adapter\n0,10,1,{adapter}\n1,10,1,{adapter}\n"
    )
    text = '[model]\ngeometry = "llama-3.1-8b"\n[workload]\nkind = "table"\npath = "t.csv"\n'
    (tmp_path / "s.toml").write_text(text + '[backend]\nprofile = "h100-llama-3.1-8b"\n[slo]\np99_tpot_ms = 9\n')
    for key, values in (("engine.max_loras", "1,2"), ("engine.scheduling_policy", "fcfs,sjf")):
        argv = ["sweep", str(tmp_path / "s.toml"), f"--set={key}={values}", "--jobs=1", f"--out={tmp_path / key}"]
        assert main(argv) == 0
        svg = (tmp_path / key / "lines.svg").read_text()
        assert "P99 TTFT" in svg
        assert "P99 TPOT" not in svg
        assert ("adapter hit rate" in svg) == bool(adapter)
    assert "best under p99_tpot_ms <= 9: engine.max_loras = 1 with" in capsys.readouterr().out


def test_bad_flags(scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, says in (
        (["--set", "engine.max_lora=1"], "engine.max_lora: unknown key"),
        (["--set", "x"], "must be TABLE.KEY"),
        (["--set", "engine.max_loras=1", "--seeds", "0"], "seeds >= 1"),
    ):
        assert main(["sweep", str(scenario), *more, "--jobs", "1", "--out", str(tmp_path / "o")]) == 2
        assert says in capsys.readouterr().err
