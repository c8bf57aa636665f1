"""Reports: tenants by hand, a timeline in the Chrome trace format, a page that needs nothing but itself."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_sweep import SCENARIO
from worlds import WorldBackend

from sim import plots
from sim.cli import main
from sim.config import EngineConfig
from sim.cost_shares import cost_shares
from sim.engine import simulate
from sim.errors import ScenarioError
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
FIGURES = (6, 12)
"""Of the run's page and of the sweep's."""


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
    steps = pd.DataFrame(columns=["start_s", "end_s", "load_s", "tokens", "prefill_tokens"], dtype=float)
    out = tenant_table(RunTables(requests, steps, adapters, 11.0)).set_index("name")
    assert out.index.tolist() == ["b", "a", "base"]
    assert out["requests"].tolist() == [1, 2, 1]
    assert out["finished"].tolist() == [0, 2, 1]
    assert out.loc["b", "p99_ttft_ms"] == 10_000
    assert out.loc["a", "p50_ttft_ms"] == out.loc["a", "mean_ttft_ms"] == 1500
    assert out.loc["a", "p50_tpot_ms"] == 1000
    assert np.isnan(out.loc["b", "p50_tpot_ms"])
    assert out["longest_wait_s"].tolist() == [10.0, 0.1, 0.0]
    total = (10 + 3) + (20 - 8 + 1) + (40 + 2)
    assert out["token_share"].tolist() == pytest.approx([0.0, 26 / total, 42 / total])
    assert out["starves"].tolist() == [True, False, False]
    assert out.loc["a", ["rank", "stages", "activations"]].tolist() == [8, 1, 2]


def test_shares_of_the_cost_by_hand() -> None:
    """Step 1: 3 s of loads and 4 s for 8 prompt tokens, half a second each. Step 2: 1 s for two tokens.

    Adapter 1: 6 prompt tokens, then one: 3.5 s, and the loads. The base: 2 tokens and one: 1.5 s. Of 8 s.
    """
    requests = pd.DataFrame(
        {
            "arrival_s": [0.0, 0.0], "adapter": [1, 0], "prompt_tokens": [6, 5], "cached_tokens": [0, 3],
            "output_tokens": [2, 2], "first_scheduled_s": [0.0, 0.0], "first_token_s": [7.0, 7.0],
            "finish_s": [8.0, 8.0], "tokens_emitted": [2, 2],
        }
    )  # fmt: skip
    steps = pd.DataFrame(
        {"start_s": [0.0, 7.0], "end_s": [7.0, 8.0], "load_s": [3.0, 0.0], "tokens": [8, 2], "prefill_tokens": [8, 0]}
    )
    moves = pd.DataFrame(
        {"start_s": [0.0, 2.0, 2.0], "end_s": [2.0, 2.0, 3.0], "kind": ["stage", "keep", "load"], "adapter": [1, 1, 1]}
    )
    shares = cost_shares(RunTables(requests, steps, pd.DataFrame(), 8.0, moves))
    assert shares.to_dict() == pytest.approx({0: 1.5 / 8, 1: 6.5 / 8})


def test_an_idle_engine_has_nothing_in_its_batch() -> None:
    """Steps from 0 to 1 and from 3 to 4: a long step keeps its height, the pause between is 0."""
    steps = pd.DataFrame({"start_s": [0.0, 3.0], "end_s": [1.0, 4.0]})
    times, peaks = plots._peaks(steps, pd.Series([5, 7]))
    assert set(peaks[times < 1]) == {5}
    assert set(peaks[(times >= 1) & (times < 2.98)]) == {0}
    assert set(peaks[times >= 3]) == {7}


def test_shares_of_a_run_add_up() -> None:
    tables = small_run()
    out = tenant_table(tables)
    assert out["cost_share"].sum() == pytest.approx(1.0)
    assert (out["cost_share"] > 0).all()
    assert out["token_share"].sum() == pytest.approx(1.0)
    assert out["requests"].sum() == len(tables.requests)
    assert out["activations"].sum() == tables.adapters["activations"].sum() == tables.steps["activations"].sum()


def lanes_of(trace: dict[str, Any]) -> dict[tuple[int, int], list[tuple[float, float, str]]]:
    """Spans by (process, lane), after a check against the Chrome trace format.

    Complete events (X) with ts and dur in µs, counters (C) with ts and numbers, names (M) of each lane that has spans;
    spans of a lane do not overlap.
    """
    lanes, named = defaultdict(list), set()
    for event in trace["traceEvents"]:
        assert isinstance(event["pid"], int)
        assert isinstance(event["name"], str)
        match event["ph"]:
            case "X":
                assert event["ts"] >= 0
                assert event["dur"] >= 0
                place = (event["pid"], event["tid"])
                lanes[place].append((event["ts"], event["ts"] + event["dur"], event["name"]))
            case "C":
                assert event["ts"] >= 0
                assert event["args"]
                assert all(isinstance(v, int | float) for v in event["args"].values())
            case "M":
                assert event["name"] in {"process_name", "thread_name", "thread_sort_index"}
                named |= {(event["pid"], event["tid"])} if event["name"] == "thread_name" else set()
            case other:
                pytest.fail(f"phase {other}")
    assert lanes.keys() <= named
    for spans in lanes.values():
        spans.sort()
        assert all(end <= start + 0.002 for (_, end, _), (start, _, _) in pairwise(spans))
    return lanes


def test_the_timeline_is_a_chrome_trace() -> None:
    tables = small_run()
    trace = json.loads(json.dumps(timeline(tables, 1, "title")))
    lanes = lanes_of(trace)
    assert trace["displayTimeUnit"] in {"ms", "ns"}
    assert len(lanes[1, STEPS]) == len(tables.steps)
    moves = tables.moves
    loaded = moves[moves["kind"] == "load"]["adapter"]
    assert [name for _, _, name in lanes[1, FIRST_SLOT]] == [f"adapter-{i}" for i in loaded]
    assert len(lanes[1, LOADS]) == moves["kind"].isin(["stage", "load"]).sum() >= 6
    named = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M" and "name" in e["args"]}
    assert {"title", "steps", "adapter loads", "slot 0"} <= named
    counters = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "C":
            counters[event["name"]].append(event["args"])
    assert [c["waiting"] for c in counters["requests"]] == tables.steps["waiting"].tolist()
    assert [c["used"] for c in counters["KV blocks used"]] == tables.steps["used_blocks"].tolist()


def test_the_timeline_of_overlapped_loads_and_of_a_fleet(tmp_path: Path) -> None:
    """Loads beside steps go one after the other; each replica is a process with lanes of its own, a failed one, too."""
    overlapped = SCENARIO.replace("[engine]", '[engine]\nmax_loras = 2\nlora_loading = "overlapped"')
    fleet = SCENARIO + '[fleet]\nreplicas = 2\nrouter = "round_robin"\n'
    fleet += '[[fleet.events]]\nat_s = 2\nkind = "fail"\nreplica = 1\n'
    fleet += '[[fleet.events]]\nat_s = 3\nkind = "recover"\nreplica = 1\n'
    for name, text, processes in (("overlapped", overlapped, {1}), ("fleet", fleet, {1, 2})):
        (tmp_path / f"{name}.toml").write_text(text)
        tables = run_scenario(tmp_path / f"{name}.toml", out=tmp_path / name, duration_s=4).tables
        lanes = lanes_of(timeline(tables, 8, name))
        assert {process for process, _ in lanes} == processes
        living = sum(len(spans) for (_, lane), spans in lanes.items() if lane >= FIRST_SLOT)
        assert living == (tables.moves["kind"] == "load").sum() > 0


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
    for folder, figures in zip(folders, FIGURES, strict=True):
        page = (folder / "report.html").read_text()
        assert page.startswith("<!doctype html>")
        assert len(re.findall("<figure><svg role=", page)) == figures
        assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)
        assert "<script" not in page
        assert 'name="viewport"' in page
        assert re.search(r"profile h100-llama-3.1-8b.*MAPE \d.\d% on held-out steps", page)
    run = (folders[0] / "report.html").read_text()
    assert "adapter-1" in run
    assert "Jain" in run
    assert "cost (%)" in run
    assert (folders[0] / "report.html").read_text() == run
    assert "best: engine.max_loras = " in (folders[1] / "report.html").read_text()
    assert json.loads((folders[0] / "timeline.json").read_text())["traceEvents"]
    assert len(pd.read_parquet(folders[0] / "tenants.parquet")) == 8
    assert not list(folders[0].glob("*.partial"))


PROBE = """<script>addEventListener('load', () => {
  const svg = [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width);
  parent.postMessage({figures: svg.length, scale: Math.min(...svg), window: innerWidth,
    page: document.documentElement.scrollWidth, columns: getComputedStyle(document.querySelector('.panels'))
    .gridTemplateColumns.split(' ').length}, '*');
});</script>"""
FRAME = """<body style="margin:0"><script>addEventListener('message', e => document.body.dataset.probe = JSON.stringify(e.data));
</script><iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe></body>"""
"""Chromium's own windows are at least 500 pixels wide: a frame is as narrow as a phone."""


def browse(page: Path, folder: Path, *flags: str) -> str:
    """What headless Chromium prints of a page."""
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    command = [str(CHROMIUM), "--headless", "--no-sandbox", *quiet, f"--user-data-dir={folder / 'profile'}", *flags]
    done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_the_figures_on_a_phone_and_on_a_desk(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing sticks out of the window, and letters of 7 points, the smallest, are at least 6 pixels high on a phone."""
    for folder, figures in zip(folders, FIGURES, strict=True):
        page = tmp_path / f"{folder.name}.html"
        page.write_text((folder / "report.html").read_text().replace("</body>", PROBE + "</body>"))
        for width, columns in ((390, 1), (1280, 2 if folder.name == "run" else 3)):
            frame = tmp_path / f"{width}.html"
            frame.write_text(FRAME.format(page=page.name, width=width))
            dom = browse(frame, tmp_path, "--window-size=1400,1000", "--dump-dom")
            found = re.search('data-probe="([^"]*)"', dom)
            assert found
            said = json.loads(html.unescape(found[1]))
            assert said["figures"] == figures
            assert said["page"] <= said["window"] == width
            assert said["columns"] == columns
            assert said["scale"] * 7 >= 6


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_prints_the_page(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in folders:
        pdf = tmp_path / f"{folder.name}.pdf"
        browse(folder / "report.html", tmp_path, f"--print-to-pdf={pdf}")
        assert pdf.read_bytes().startswith(b"%PDF-")
        assert pdf.stat().st_size > 20_000


def test_an_unfinished_sweep_has_no_report(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[1], tmp_path / "sweep", ignore=shutil.ignore_patterns("results.parquet"))
    with pytest.raises(ScenarioError, match="a sweep that is not finished; its own command takes it up again"):
        report(tmp_path / "sweep")


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
