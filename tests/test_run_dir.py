"""The run directory: whole or not there, and enough to run again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_sweep import SCENARIO as SWEEP_SCENARIO
from worlds import WorldBackend

import sim.run
from sim import row_file, run_dir
from sim.cli import main
from sim.errors import ScenarioError
from sim.row_file import RowFile, thinned
from sim.run import RunResult, run_scenario

FILES = {
    "scenario.toml",
    "summary.json",
    "requests.parquet",
    "steps.parquet",
    "adapters.parquet",
    "moves.parquet",
    "figure.png",
}
SCENARIO = """
[model]
geometry = "tiny"
[engine]
max_loras = 2
max_lora_rank = 16
max_model_len = 64
[adapters]
count = 5
ranks = [8, 16]
[workload]
kind = "synthetic"
rate_rps = 20.0
duration_s = 2.0
prompt = { kind = "fixed", tokens = 12 }
output = { kind = "fixed", tokens = 6 }
popularity = { kind = "uniform" }
[backend]
kind = "cpu"
"""


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scenario whose backend costs what `WorldBackend` says."""
    monkeypatch.setattr(sim.run, "open_backend", lambda *_, limits, **__: WorldBackend(40, limits.max_loras))
    file = tmp_path / "small.toml"
    file.write_text(SCENARIO)
    return file


def test_a_run_leaves_all_its_files_and_nothing_else(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    result = run_scenario(scenario, out=out)
    assert isinstance(result, RunResult)
    assert result.out == out
    assert {f.name for f in out.iterdir()} == FILES
    assert [f.name for f in out.parent.iterdir()] == ["run"]
    assert json.loads((out / "summary.json").read_text()) == result.summary
    for name in ("requests", "steps", "adapters"):
        pd.testing.assert_frame_equal(pd.read_parquet(out / f"{name}.parquet"), getattr(result.tables, name))
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_written_back_scenario_runs_to_the_same_tables(scenario: Path, tmp_path: Path) -> None:
    """I7, through the files."""
    first = run_scenario(scenario, out=tmp_path / "a", duration_s=1.0)
    again = run_scenario(tmp_path / "a" / "scenario.toml", out=tmp_path / "b")
    for name in ("requests", "steps", "adapters"):
        assert (tmp_path / "a" / f"{name}.parquet").read_bytes() == (tmp_path / "b" / f"{name}.parquet").read_bytes()
    assert len(first.tables.requests) == len(again.tables.requests) > 0
    assert first.tables.requests["arrival_s"].max() < 1.0


def test_an_existing_directory_is_left_alone(scenario: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(ScenarioError, match="exists already"):
        run_scenario(scenario, out=tmp_path / "run")
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_place_that_cannot_be_written_is_told_before_simulating(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim.run, "simulate", lambda *_, **__: pytest.fail("simulated first"))
    (tmp_path / "file").touch()
    with pytest.raises(ScenarioError, match="no directory that can be written to"):
        run_scenario(scenario, out=tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("raised", "seen"), [(OSError("disk full"), ScenarioError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_an_interrupted_write_leaves_nothing(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, seen: type[BaseException]
) -> None:
    """The figure is the last file: by then all others lie in the partial directory."""

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(run_dir, "run_figure", fail)
    with pytest.raises(seen):
        run_scenario(scenario, out=tmp_path / "run")
    assert [f.name for f in tmp_path.iterdir()] == ["small.toml"]


def test_what_a_killed_run_left_is_replaced(scenario: Path, tmp_path: Path) -> None:
    (tmp_path / ".run.partial").mkdir()
    (tmp_path / ".run.partial" / "old").touch()
    run_scenario(scenario, out=tmp_path / "run")
    assert {f.name for f in (tmp_path / "run").iterdir()} == FILES
    assert not (tmp_path / ".run.partial").exists()


def test_a_killed_run_leaves_nothing_that_looks_like_one(tmp_path: Path) -> None:
    """kill -9 at random moments, some while its files are written; then the same command leaves a whole directory."""
    (tmp_path / "s.toml").write_text(SWEEP_SCENARIO)
    out, partial = tmp_path / "run", tmp_path / ".run.partial"
    command = [sys.executable, "-m", "sim.cli", "run", str(tmp_path / "s.toml"), "--out", str(out)]
    rng, while_writing = np.random.default_rng(0), 0
    for attempt in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if attempt % 2:
            while process.poll() is None and not partial.exists():
                time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.3 if attempt % 2 else 3.0))
        process.kill()
        process.wait()
        if out.exists():
            assert {file.name for file in out.iterdir()} == FILES
            shutil.rmtree(out)
        while_writing += partial.exists()
    assert while_writing
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert {file.name for file in out.iterdir()} == FILES
    assert not partial.exists()
    requests = pd.read_parquet(out / "requests.parquet")
    assert len(requests) == json.loads((out / "summary.json").read_text())["requests"]


def test_rows_come_in_groups_whatever_the_pieces(tmp_path: Path) -> None:
    """The file of a run that streams its rows is that of one which had them all."""
    rows = pd.DataFrame({"start_s": np.arange(1000.0), "kind": pd.Series(["load", "evict"] * 500, dtype="str")})
    contents = []
    for name, sizes in (("whole", [1000]), ("pieces", [1, 0, 299, 700]), ("grouped", [64] * 15 + [40])):
        file = RowFile(tmp_path / name)
        at = 0
        for size in sizes:
            file.write(rows.iloc[at : at + size])
            at += size
        file.close()
        contents.append((tmp_path / name).read_bytes())
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / name), rows)
    assert contents[0] == contents[1] == contents[2]


def test_a_figure_sees_every_load_of_a_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_file, "LOOKED_AT", 100)
    monkeypatch.setattr(row_file, "GROUP", 64)
    names = ("start_s", "end_s", "running", "waiting", "used_blocks", "free_blocks", "activations", "stages")
    steps = pd.DataFrame({name: np.arange(1001) for name in names})
    file = RowFile(tmp_path / "steps.parquet")
    file.write(steps)
    file.close()
    seen = thinned(tmp_path / "steps.parquet")
    assert len(seen) <= 130
    assert seen["activations"].sum() == steps["activations"].sum()
    assert seen["end_s"].iloc[-1] == steps["end_s"].iloc[-1]


@pytest.mark.parametrize("scenario", ["demo-azure", "demo-fleet"])
def test_without_step_rows_a_run_says_the_same(tmp_path: Path, scenario: str) -> None:
    summaries = []
    for out, more in (("with", []), ("without", ["--no-step-rows"])):
        assert main(["run", scenario, "--duration-s", "20", "--out", str(tmp_path / out), *more]) == 0
        summaries.append((tmp_path / out / "summary.json").read_bytes())
    assert summaries[0] == summaries[1]
    assert len(pd.read_parquet(tmp_path / "with" / "steps.parquet")) > 100
    assert len(pd.read_parquet(tmp_path / "without" / "steps.parquet")) == 0
    assert main(["report", str(tmp_path / "without")]) == 0
    assert (tmp_path / "without" / "report.html").read_text().count("<figure>") == 2
    assert pd.read_parquet(tmp_path / "without" / "tenants.parquet")["cost_share"].isna().all()


def test_a_run_step_by_step_writes_the_same_files(tmp_path: Path) -> None:
    """I8, through the command line and `run.fast_forward`."""
    scenario = (files("sim") / "scenarios" / "demo-azure.toml").read_text()
    folders = []
    for name, more in (("fast", "fast_forward = true"), ("slow", "fast_forward = false")):
        file = tmp_path / f"{name}.toml"
        file.write_text(scenario + f"\n[run]\n{more}\n")
        folders.append(tmp_path / name)
        assert main(["run", str(file), "--duration-s", "20", "--out", str(folders[-1])]) == 0
    for table in ("requests", "steps", "adapters", "moves"):
        assert (folders[0] / f"{table}.parquet").read_bytes() == (folders[1] / f"{table}.parquet").read_bytes()


def test_a_replay_imports_neither_torch_nor_scipy(tmp_path: Path) -> None:
    """Start-up counts: a profile is replayed without what measures or fits one."""
    code = (
        "import sys; from sim.cli import main; assert main(sys.argv[1:]) == 0;"
        " slow = {'torch', 'scipy', 'joblib', 'matplotlib.pyplot'} & sys.modules.keys(); assert not slow, slow"
    )
    run = ["run", "demo-azure", "--duration-s", "5", "--out", str(tmp_path / "run")]
    subprocess.run([sys.executable, "-c", code, *run], check=True, capture_output=True, cwd=tmp_path)
