"""Rows of trace files, each with the line it stands in, and the numbers in them; every error names the place."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workloads.errors import WorkloadError
from workloads.reader import LARGEST


def csv_rows(path: Path, want: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of a CSV file, its header first, then as many fields in each row; blank lines are left out."""
    if not path.is_file():
        raise WorkloadError(f"{path}: no such file; workload.path must name {want}")
    read, fields = 0, 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)  # else an open quote swallows the rest of the file
            for row in rows:
                if not row:
                    continue
                fields = fields or len(row)
                if len(row) != fields:
                    raise WorkloadError(f"{path}:{rows.line_num}: {len(row)} fields, must be {fields}")
                yield rows.line_num, row
                read += 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{path}: cannot be read ({error}), must be CSV in UTF-8") from error
    if read < 2:
        what = "a header and no rows" if read else "an empty file"
        raise WorkloadError(f"{path}: {what}, must be {want} with at least one row")


def json_objects(path: Path, want: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a file with one JSON object a line; blank lines are left out."""
    if not path.is_file():
        raise WorkloadError(f"{path}: no such file; workload.path must name {want}")
    empty = True
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    empty = False
                    yield line, _object(text, f"{path}:{line}")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: cannot be read ({error}), must be text in UTF-8") from error
    if empty:
        raise WorkloadError(f"{path}: an empty file, must be {want} with at least one request")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WorkloadError(f"{where}: not JSON ({error}), must be one object a line") from error
    if not isinstance(row, dict):
        raise WorkloadError(f"{where}: is a JSON {type(row).__name__}, must be an object")
    return row


def whole(value: object, where: str, least: int = 0, limit: int = LARGEST) -> int:
    """A JSON whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < limit:
        raise WorkloadError(f"{where} is {str(value)[:80]}, must be a whole number >= {least} and < {limit}")
    return value


def whole_text(text: str, where: str, least: int = 0) -> int:
    """A whole number written in plain digits, from `least` on."""
    good = text.isascii() and text.isdigit() and len(text) < 12
    if not good or not least <= int(text) < LARGEST:
        raise WorkloadError(f"{where} is {text!r}, must be a whole number >= {least} and < {LARGEST}")
    return int(text)


def seconds(text: str, where: str) -> float:
    """A finite number from zero on."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf") or "_" in text:
        raise WorkloadError(f"{where} is {text!r}, must be a number of seconds >= 0")
    return value
