"""A figure as panels: all on one sheet for a file, or each alone for a page, where a phone shows them one below another."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
"""Okabe and Ito's palette: told apart by colour-blind readers. Line styles, markers and hatches tell them apart in grey."""

WIDTH, HEIGHT = 5.0, 3.4
"""Inches of a panel: on a phone's 360 pixels its letters are as high as the page's own small print."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing: its `title` says what it shows, its axes carry their units; `tall`: its height over the usual."""

    title: str
    draw: Callable[[Axes], None]
    tall: float = 1.0
    grid: bool = True


def sheet(
    panels: Sequence[Panel], caption: str, files: Sequence[Path], columns: int = 2, *, fixed: bool = False
) -> None:
    """Write all panels as one figure, `caption` above: PNG or SVG by each file's name.

    `fixed`: margins that do for numbers on every axis; finding those that fit takes as long as drawing.
    """
    rows = -(-len(panels) // columns)
    size = (WIDTH * 1.1 * columns, (0.3 + HEIGHT * max(panel.tall for panel in panels)) * rows)
    figure = _figure(size, None if fixed else "constrained")
    if fixed:
        width, height = size
        figure.subplots_adjust(
            left=0.75 / width, right=1 - 0.2 / width, bottom=0.6 / height, top=1 - 0.75 / height,
            wspace=1.0 / (width / columns), hspace=1.1 / (height / rows),
        )  # fmt: skip
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        _fill(axis, panel)
    figure.suptitle(caption, fontsize=9)
    for file in files:
        _write(figure, file, file.suffix[1:])


def alone(panel: Panel) -> str:
    """The panel by itself as an SVG element for a page; its title is what a screen reader says."""
    figure = _figure((WIDTH, HEIGHT * panel.tall), "constrained")
    _fill(figure.subplots(), panel)
    text = io.StringIO()
    _write(figure, text, "svg", salt=panel.title)
    # Without its XML head, which has no place inside a page.
    drawing = text.getvalue()
    return f'<svg role="img" aria-label="{html.escape(panel.title)}"' + drawing[drawing.index("<svg") + 4 :]


def _fill(axis: Axes, panel: Panel) -> None:
    panel.draw(axis)
    axis.set_title(panel.title, fontsize=11)
    if panel.grid:
        axis.grid(visible=True, alpha=0.3)


def _write(figure: Figure, file: Path | io.StringIO, kind: str, salt: str = "") -> None:
    import matplotlib as mpl

    # The salt makes names inside the drawing its own on a page, and the same again each time.
    with mpl.rc_context({"svg.hashsalt": salt or "sheet"}):
        figure.savefig(file, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)


def _figure(size: tuple[float, float], layout: Literal["constrained"] | None) -> Figure:
    """Without pyplot: nothing to close, and less to import."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout=layout)
