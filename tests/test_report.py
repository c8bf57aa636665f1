"""Reports: tenants by hand, a timeline in the Chrome trace format, a page that needs nothing but itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_sweep import SCENARIO
from worlds import WorldBackend

from sim.cli import main
from sim.config import EngineConfig
from sim.engine import simulate
from sim.report import report
from sim.run import run_scenario
from sim.sweep import sweep
from sim.tables import RunTables
from sim.tenants import tenant_table
from sim.timeline import FIRST_SLOT, LOADS, STEPS, timeline
from workloads.adapters import Catalogue
from workloads.requests import RequestTable

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAN = float("nan")


def small_run() -> RunTables:
    """Three adapters on one slot, and the base model."""
    n = 12
    arrival, adapter = np.arange(n) * 0.003, np.array([1, 2, 3, 0] * 3)
    table = RequestTable(arrival, np.full(n, 5), np.full(n, 4), adapter)
    config = EngineConfig(
        max_loras=1, max_cpu_loras=2, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, block_size=4
    )
    return simulate(table, Catalogue.uniform(3, [8]), config, WorldBackend(64, 1), check=True)


def test_tenants_by_hand() -> None:
    requests = pd.DataFrame(
        {
            "arrival_s": [0.0, 0.0, 1.0, 0.0], "adapter": [1, 1, 2, 0], "prompt_tokens": [10, 20, 30, 40],
            "output_tokens": [3, 1, 5, 2], "first_scheduled_s": [0.0, 0.1, NAN, 0.0], "first_token_s": [1.0, 2.0, NAN, 1.0],
            "finish_s": [3.0, 2.0, NAN, 1.5], "tokens_emitted": [3, 1, 0, 2], "cached_tokens": [0, 8, 0, 0],
        }
    )  # fmt: skip
    adapters = pd.DataFrame(
        {"adapter": [1, 2], "name": ["a", "b"], "rank": [8, 16], "stages": [1, 0], "activations": [2, 0]}
    )
    out = tenant_table(RunTables(requests, pd.DataFrame(), adapters, 11.0)).set_index("name")
    assert out.index.tolist() == ["b", "a", "base"]
    assert out["requests"].tolist() == [1, 2, 1]
    assert out["finished"].tolist() == [0, 2, 1]
    assert out.loc["b", "p99_ttft_ms"] == 10_000
    assert out.loc["a", "p50_ttft_ms"] == 1500
    assert out.loc["a", "p50_tpot_ms"] == 1000
    assert np.isnan(out.loc["b", "p50_tpot_ms"])
    assert out["longest_wait_s"].tolist() == [10.0, 0.1, 0.0]
    total = (10 + 3) + (20 - 8 + 1) + (40 + 2)
    assert out["token_share"].tolist() == pytest.approx([0.0, 26 / total, 42 / total])
    assert out["starves"].tolist() == [True, False, False]
    assert out.loc["a", ["rank", "stages", "activations"]].tolist() == [8, 1, 2]


def test_shares_of_a_run_add_up() -> None:
    tables = small_run()
    out = tenant_table(tables)
    assert out["token_share"].sum() == pytest.approx(1.0)
    assert out["requests"].sum() == len(tables.requests)
    assert out["activations"].sum() == tables.adapters["activations"].sum() == tables.steps["activations"].sum()


def test_the_timeline_is_a_chrome_trace() -> None:
    """Complete events (X) with ts and dur, counters (C) with numbers, names (M); lanes whose spans do not overlap."""
    tables = small_run()
    trace = json.loads(json.dumps(timeline(tables, 1, "title")))
    lanes = defaultdict(list)
    for event in trace["traceEvents"]:
        assert event["pid"] == 1
        assert isinstance(event["name"], str)
        match event["ph"]:
            case "X":
                assert event["ts"] >= 0
                assert event["dur"] >= 0
                lanes[event["tid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
            case "C":
                assert all(isinstance(v, int | float) for v in event["args"].values())
            case "M":
                assert event["name"] in {"process_name", "thread_name", "thread_sort_index"}
            case other:
                pytest.fail(f"phase {other}")
    assert len(lanes[STEPS]) == len(tables.steps)
    for spans in lanes.values():
        ordered = sorted(spans)
        assert all(end <= start + 0.002 for (_, end, _), (start, _, _) in pairwise(ordered))
    moves = tables.moves
    loaded = moves[moves["kind"] == "load"]["adapter"]
    assert [name for _, _, name in sorted(lanes[FIRST_SLOT])] == [f"adapter-{i}" for i in loaded]
    assert len(lanes[LOADS]) == moves["kind"].isin(["stage", "load"]).sum() >= 6
    named = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M" and "name" in e["args"]}
    assert {"title", "steps", "adapter loads", "slot 0"} <= named


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and a sweep, each with its report."""
    folder = tmp_path_factory.mktemp("r")
    (folder / "s.toml").write_text(SCENARIO)
    run_scenario(folder / "s.toml", out=folder / "run")
    sets = {"engine.max_loras": [1, 8], "workload.rate_rps": [10, 30]}
    sweep(str(folder / "s.toml"), sets, out=folder / "sweep", jobs=1)
    report(folder / "run")
    report(folder / "sweep")
    return folder / "run", folder / "sweep"


def test_pages_need_nothing_but_themselves(folders: tuple[Path, Path]) -> None:
    for folder, figures in zip(folders, (2, 2), strict=True):
        page = (folder / "report.html").read_text()
        assert page.startswith("<!doctype html>")
        assert len(re.findall("<figure><svg", page)) == figures
        assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)
        assert "<script" not in page
        assert 'name="viewport"' in page
        assert "profile MAPE" in page
    run = (folders[0] / "report.html").read_text()
    assert "adapter-1" in run
    assert "Jain" in run
    assert "best: engine.max_loras = " in (folders[1] / "report.html").read_text()
    assert json.loads((folders[0] / "timeline.json").read_text())["traceEvents"]
    assert len(pd.read_parquet(folders[0] / "tenants.parquet")) == 8
    assert not list(folders[0].glob("*.partial"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_the_figures(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in folders:
        quiet = [
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-sync",
        ]
        command = [str(CHROMIUM), "--headless", "--no-sandbox", *quiet, f"--user-data-dir={tmp_path / 'profile'}"]
        page = f"file://{folder / 'report.html'}"
        dom = subprocess.run(
            [*command, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True
        ).stdout
        assert len(re.findall("<figure><svg", dom)) == 2
        shot = tmp_path / f"{folder.name}.png"
        subprocess.run(
            [*command, "--window-size=500,1500", f"--screenshot={shot}", page],
            timeout=120,
            check=True,
            capture_output=True,
        )
        assert shot.stat().st_size > 20_000


def test_the_command_names_what_it_wrote(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(folders[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[1:5] == ["of", "8", "adapters", "starve"]
    assert [line.split()[0] for line in lines[1:4]] == list(
        pd.read_parquet(folders[0] / "tenants.parquet").nlargest(3, "longest_wait_s")["name"]
    )
    assert [Path(line).name for line in lines[4:]] == [
        "report.html",
        "timeline.json",
        "tenants.parquet",
        "figure.png",
        "figure.svg",
        "tenants.png",
        "tenants.svg",
    ]
    assert main(["report", str(tmp_path)]) == 2
    assert "not a run directory of this version" in capsys.readouterr().err
