"""CSV tables that others wrote: read, and their columns checked; every error is one sentence that names file and line."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from backend.errors import BackendError


def read_csv(path: Path, error: type[ValueError] = BackendError) -> pd.DataFrame:
    """The table in `path`. Raises `error` where there is none."""
    try:
        return pd.read_csv(path)
    except FileNotFoundError as cause:
        raise error(f"{path}: no such file") from cause
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as cause:
        raise error(f"{path}: not a CSV table ({str(cause).strip()})") from cause


def check_column(
    path: Path,
    table: pd.DataFrame,
    column: str,
    *,
    whole: bool = False,
    least: float = 0,
    above: float = -1,
    below: float = 2**31,
    optional: bool = False,
) -> None:
    """Make a column numbers (`optional`: where it is not empty).

    Raises `BackendError` naming the line of a value that is none, or is not at least `least`, above `above` and below `below`.
    """
    values = pd.to_numeric(table[column], errors="coerce")
    right = (values >= least) & (values > above) & (values < below) & ((values % 1 == 0) | (not whole))
    wrong = table.index[~right & (values.notna() | table[column].notna() | (not optional))]
    if len(wrong):
        value, kind = table.loc[wrong[0], column], "whole number" if whole else "number"
        limit = f"> {above:g}" if above >= least else f">= {least:g}"
        raise BackendError(f"{path}:{wrong[0] + 2}: {column} is {value}, must be a {kind} {limit} and < {below}")
    table[column] = values.astype("int64") if whole and not optional else values
