"""Cost against P99 TTFT of the deployments that a plan looked at: which are worth their price, as a picture for terminals and pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sim.panels import BLUE, GREEN, ORANGE, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 60, 12
"""Characters of the picture in a terminal."""


@dataclass(frozen=True, slots=True)
class Point:
    """A deployment: what it is, its cost per hour, its P99 TTFT, and whether it keeps the promise."""

    label: str
    cost: float
    p99_ttft_s: float
    kept: bool


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in cost and P99 TTFT at once, by rising cost; of equals the first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.p99_ttft_s)):
        if not best or point.p99_ttft_s < best[-1].p99_ttft_s:
            best.append(point)
    return best


def points_of(plan: Mapping[str, Any]) -> list[Point]:
    """The plan first, then what it was compared with, from what `plan.json` holds."""
    found = max(part["p99_ttft_s"] for part in plan["parts"])
    own = Point("the plan", plan["cost_per_hour"], found, kept=True)
    others = [Point(r["change"], r["cost_per_hour"], r["p99_ttft_s"], r["kept"]) for r in plan["runners_up"]]
    return [own, *others]


def picture(points: Sequence[Point], unit: str) -> Iterator[str]:
    """Lines of text: cost to the right, P99 TTFT upwards on a logarithmic scale. The first point is the plan (`*`)."""
    lengths = np.log10([max(1e-6, p.p99_ttft_s) for p in points])
    low, high = math.floor(min(lengths) * 4) / 4, math.ceil(max(lengths) * 4) / 4
    high = high if high > low else low + 0.25
    dearest = max(p.cost for p in points)
    field = [[" "] * WIDTH for _ in range(HEIGHT)]
    best = front(points)
    for point, length in sorted(zip(points, lengths, strict=True), key=lambda pair: pair[0] is points[0]):
        row = HEIGHT - 1 - round((length - low) / (high - low) * (HEIGHT - 1))
        column = round(point.cost / dearest * (WIDTH - 1))
        mark = ("O" if point in best else "o") if point.kept else "x"
        if not (field[row][column] == "O" and mark != "O"):  # what is worth its price is never hidden
            field[row][column] = mark
        if point is points[0]:
            field[row][column] = "*"
    yield "P99 TTFT (ms): * the plan, O none is cheaper and faster, o kept, x broken"
    for i, row_of_marks in enumerate(field):
        value = 1e3 * 10 ** (high - i / (HEIGHT - 1) * (high - low))
        yield f"{value:10.3g} |{''.join(row_of_marks)}".rstrip()
    yield f"{'':10} +{'-' * WIDTH}"
    yield f"{'':10}  0{f'{dearest:.2f} {unit}':>{WIDTH - 1}}"


def pareto_panel(points: Sequence[Point], unit: str) -> Panel:
    """The same as a panel of a figure, with the front as a staircase."""
    return Panel("Cost against P99 TTFT", partial(_draw, points, unit))


def _draw(points: Sequence[Point], unit: str, axis: Axes) -> None:
    best = front(points)
    steps = [p.cost for p in best], [1e3 * p.p99_ttft_s for p in best]
    axis.step(*steps, where="post", color=GREEN, label="none is cheaper and faster")
    for kept, colour, marker, label in ((True, BLUE, "o", "keeps the promise"), (False, ORANGE, "X", "breaks it")):
        some = [p for p in points[1:] if p.kept == kept]
        axis.scatter([p.cost for p in some], [1e3 * p.p99_ttft_s for p in some], c=colour, marker=marker, label=label)
    own = points[0]
    axis.scatter([own.cost], [1e3 * own.p99_ttft_s], c="black", marker="*", s=160, label="the plan", zorder=3)
    for i, point in enumerate(best):  # above and below the front by turns: no name lies over the next
        place, shift = (point.cost, 1e3 * point.p99_ttft_s), (5, -11 if i % 2 else 5)
        axis.annotate(point.label, place, xytext=shift, textcoords="offset points", fontsize=7)
    lengths = [p.p99_ttft_s for p in points]
    if max(lengths) > 5 * min(lengths):
        axis.set_yscale("log")
    axis.margins(0.2, 0.1)
    axis.set(xlabel=unit, ylabel="P99 TTFT (ms)", xlim=(0, None))
    axis.legend(fontsize=8)
