"""A figure as panels: all on one sheet for a file, or each alone for a page, where a phone shows them one below another."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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


def sheet(panels: Sequence[Panel], caption: str, files: Sequence[Path], columns: int = 2) -> None:
    """Write all panels as one figure, `caption` above: PNG or SVG by each file's name."""
    from matplotlib import pyplot as plt

    _agg()
    rows = -(-len(panels) // columns)
    size = (WIDTH * 1.1 * columns, (0.3 + HEIGHT * max(panel.tall for panel in panels)) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        _fill(axis, panel)
    figure.suptitle(caption, fontsize=9)
    for file in files:
        _write(figure, file, file.suffix[1:])
    plt.close(figure)


def alone(panel: Panel) -> str:
    """The panel by itself as an SVG element for a page; its title is what a screen reader says."""
    from matplotlib import pyplot as plt

    _agg()
    figure, axis = plt.subplots(figsize=(WIDTH, HEIGHT * panel.tall), constrained_layout=True)
    _fill(axis, panel)
    text = io.StringIO()
    _write(figure, text, "svg", salt=panel.title)
    plt.close(figure)
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


def _agg() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
