"""Where a benchmark writes: a CSV file, with what it was measured on as JSON of the same name beside it."""

from __future__ import annotations

import argparse
from pathlib import Path


def csv_file(text: str) -> Path:
    """The path of `--out`. Raises `ArgumentTypeError` if it would be overwritten by the JSON beside it, or is no CSV."""
    path = Path(text)
    if path.suffix != ".csv":
        raise argparse.ArgumentTypeError(f"{text} must end in .csv; facts of the measurement go to a .json beside it")
    return path
