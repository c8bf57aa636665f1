"""Tables as Markdown."""

from __future__ import annotations

import math

import pandas as pd


def markdown(table: pd.DataFrame, percent: tuple[str, ...]) -> str:
    """A table as Markdown; columns of `percent` as percentages; what is no number as a dash."""

    def cell(name: str, value: object) -> str:
        if not isinstance(value, float):
            return str(value)
        if not math.isfinite(value):
            return "–"
        return f"{value:.1%}".replace("%", " %") if name in percent else f"{value:.4g}"

    rows = [[cell(str(name), value) for name, value in row.items()] for row in table.to_dict("records")]
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
