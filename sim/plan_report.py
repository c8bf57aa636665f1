"""The pages of `multilora report` for a plan and for a comparison with whole copies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sim.copies_plots import copies_panels
from sim.errors import ScenarioError
from sim.panels import Panel
from sim.pareto import front, pareto_panel, points_of


@dataclass(frozen=True, slots=True)
class Content:
    """What a page shows: panels with their caption, tables, and the answer as it was printed."""

    promise: str
    caption: str
    panels: list[Panel]
    frames: list[pd.DataFrame]
    said: str = ""


def is_plan(folder: Path) -> bool:
    """Whether `multilora plan` or `multilora copies` wrote this directory."""
    return any((folder / f"{name}.json").is_file() for name in ("plan", "copies"))


def plan_content(folder: Path) -> Content:
    """What the page of such a directory shows. Raises `ScenarioError` for a directory of another version."""
    name = "plan" if (folder / "plan.json").is_file() else "copies"
    try:
        data = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        said = (folder / f"{name}.txt").read_text(encoding="utf-8")
        return replace((_plan if name == "plan" else _copies)(data), said=said)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScenarioError(f"{folder}: not a {name} of this version ({error}); make it again") from error


def _plan(data: Mapping[str, Any]) -> Content:
    points, unit = points_of(data), data["unit"]
    caption = f"{data['cost_per_hour']:.2f} {unit} keeps {data['promise']}"
    worth = {id(point) for point in front(points)}
    rows = [
        (
            p.label,
            f"{p.cost:.2f}",
            f"{1e3 * p.p99_ttft_s:.1f}",
            "kept" if p.kept else "broken",
            "yes" * (id(p) in worth),
        )
        for p in points
    ]
    stands = [
        (case, "nothing left" if k is None else "kept" if k else "broken") for case, k in data["headroom"].items()
    ]
    frames = [
        pd.DataFrame(rows, columns=["deployment", unit, "P99 TTFT (ms)", "promise", "none is cheaper and faster"]),
        pd.DataFrame(stands, columns=["headroom", "promise"]),
        pd.DataFrame(
            [(name, f"{gain:+.2%}") for name, gain in data["relief"].items()],
            columns=["relieved, 10 % above the sustainable rate", "more requests within bounds"],
        ),
    ]
    return Content(data["promise"], caption, [pareto_panel(points, unit)], frames)


def _copies(data: Mapping[str, Any]) -> Content:
    caption = f"least {data['unit']} that keeps {data['promise']}; the same requests in every column"
    rows = [
        (
            c["tenants"],
            f"{c['rate_rps']:.2f}",
            *(_arm(c["arms"][arm]) for arm in ("deltas", "dedicated", "time_shared")),
        )
        for c in data["cells"]
    ]
    names = ["fine-tunes", "req/s in all", "base + deltas", "dedicated copies", "time-shared copies"]
    return Content(data["promise"], caption, copies_panels(data), [pd.DataFrame(rows, columns=names)])


def _arm(arm: Mapping[str, Any] | None) -> str:
    return "none keeps it" if arm is None else f"{arm['cost']:.2f} ({arm['gpus']} GPUs)"
