"""Nsight Compute's text output as a table: `python -m benchmarks.ncu_table FILE.txt`.

FILE.txt is what `ncu --cache-control none --clock-control none --section SpeedOfLight --section WarpStateStats --section
Occupancy -k "regex:shrink|expand|linear|nvjet" python -m benchmarks.sgmv --cell …` printed. Columns: the cell, its kernel, microseconds,
per cent of the peak throughput of device memory, L2 cache and multiprocessors, per cent of warps resident, per cent of the time
in which a multiprocessor had any (the rest are launch and end), and what warps mostly waited for with its share of their time.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

METRICS = {
    "us": "Duration",
    "dram_pct": "DRAM Throughput",
    "l2_pct": "L2 Cache Throughput",
    "sm_pct": "Compute (SM) Throughput",
    "warps_pct": "Achieved Occupancy",
}
KERNEL = re.compile(r"^  (?:void )?(\S+?)(?:<.*)? \(\d+, \d+, \d+\)x\(\d+, \d+, \d+\)")
PROFILED = re.compile(r'^==PROF== Profiling "(\S+)"')
CELL = re.compile(r"^(\w+,\d+,\w+,\d+,\d+): relative error")
STALL = re.compile(r"being stalled waiting for (.+?)\. .*?represents about ([\d.]+)%")


def cells(lines: list[str]) -> Iterator[str]:
    """The cell of each profiled kernel, in order; a cell's line follows its kernels'."""
    waiting = 0
    for line in lines:
        waiting += bool(PROFILED.match(line))
        if cell := CELL.match(line):
            yield from [cell[1]] * waiting
            waiting = 0
    yield from [""] * waiting


def sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each kernel's name and the lines about it."""
    starts = [(i, match[1]) for i, line in enumerate(lines) if (match := KERNEL.match(line))]
    ends = [*(i for i, _ in starts), len(lines)][1:]
    for (start, name), end in zip(starts, ends, strict=True):
        yield name.rsplit("::", 1)[-1], lines[start + 1 : end]


def metric(lines: list[str], name: str) -> float:
    """The value of the first line that begins with `name`; NaN if ncu did not print it."""
    found = next((line for line in lines if line.strip().startswith(name + "  ")), None)
    return float(found.split()[-1].replace(",", "")) if found else float("nan")


def table(text: str) -> pd.DataFrame:
    """A row a kernel launch, from ncu's text."""
    lines = text.splitlines()
    rows = []
    for cell, (kernel, about) in zip(cells(lines), sections(lines), strict=True):
        values = {column: metric(about, name) for column, name in METRICS.items()}
        values["active_pct"] = 100 * metric(about, "SM Active Cycles") / metric(about, "Elapsed Cycles")
        stall = STALL.search(" ".join(" ".join(about).split()))
        waits = {
            "waits_for": stall[1].removeprefix("a ") if stall else "",
            "wait_pct": float(stall[2]) if stall else None,
        }
        rows.append({"cell": cell, "kernel": kernel} | values | waits)
    return pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ncu_table", description=__doc__)
    parser.add_argument("file", type=Path, help="ncu's text output")
    path = parser.parse_args(argv).file
    try:
        found = table(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        print(f"error: {path}: must be ncu's text output ({error})", file=sys.stderr)
        return 2
    if found.empty:
        print(f"error: {path}: has no kernel sections of ncu", file=sys.stderr)
        return 2
    print(found.round(1).to_string(index=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
