"""Cost against P99 TTFT: which deployments are worth their price, and how both pictures show them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cli import main
from sim.pareto import HEIGHT, WIDTH, Point, front, picture, points_of

POINTS = st.lists(
    st.builds(Point, st.just("p"), st.floats(0.5, 50), st.floats(1e-3, 100), st.booleans()), min_size=1, max_size=30
)
PLAN = {
    "promise": "ttft_p99<=1s",
    "cost_per_hour": 5.0,
    "unit": "USD/h",
    "parts": [{"p99_ttft_s": 0.2}, {"p99_ttft_s": 0.3}],
    "runners_up": [
        {"change": "replicas 1", "cost_per_hour": 2.5, "p99_ttft_s": 9.0, "kept": False},
        {"change": "max_loras 8 & <more>", "cost_per_hour": 5.0, "p99_ttft_s": 0.8, "kept": True},
        {"change": "replicas 3", "cost_per_hour": 7.5, "p99_ttft_s": 0.1, "kept": True},
    ],
    "headroom": {"rate x2": True, "one replica lost": None, "adapters x2": False},
    "relief": {"KV": 0.1, "compute": 0.0},
}


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[Point]) -> None:
    places = [(p.cost, p.p99_ttft_s) for p in points]
    best = [(p.cost, p.p99_ttft_s) for p in front(points)]
    for p in places:
        beaten = any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in places)
        assert (p in best) == (not beaten)
    assert len(set(best)) == len(best)


@given(POINTS)
def test_a_picture_has_its_size_and_one_plan(points: list[Point]) -> None:
    lines = list(picture(points, "USD/h"))
    field = [line.split("|", 1)[1] for line in lines if "|" in line]
    assert len(field) == HEIGHT
    assert max(map(len, field)) <= WIDTH
    assert "".join(field).count("*") == 1
    assert sum(mark in "*Oox" for mark in "".join(field)) <= len(points)


def test_dearer_is_right_and_slower_is_up() -> None:
    marks = {}
    for i, line in enumerate(picture(points_of(PLAN), "USD/h")):
        for mark in "*Oox":
            if "|" in line and mark in line.split("|", 1)[1]:
                marks[mark] = (line.split("|", 1)[1].index(mark), i)
    assert marks["x"][0] < marks["*"][0] < marks["O"][0]
    assert marks["x"][1] < marks["o"][1] < marks["*"][1] < marks["O"][1]


def test_a_plan_of_two_parts_is_as_slow_as_its_slower_one() -> None:
    assert points_of(PLAN)[0] == Point("the plan", 5.0, 0.3, kept=True)


def test_the_report_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    (tmp_path / "plan.txt").write_text("promise   ttft_p99<=1s\n")
    assert main(["report", str(tmp_path)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.name for file in written] == ["report.html"]
    page = (tmp_path / "report.html").read_text()
    for word in ("<svg", "max_loras 8 &amp; &lt;more&gt;", "nothing left", "+10.00%", "promise   ttft_p99&lt;=1s"):
        assert word in page


def test_half_a_plan_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text('{"unit": "USD/h"}')
    (tmp_path / "plan.txt").write_text("")
    assert main(["report", str(tmp_path)]) == 2
    assert "not a plan of this version" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
