"""`python -m benchmarks.workload_fits --data DIR [--out FILE]`: every real trace under DIR described, and imitated by a fit.

DIR holds traces in any format that `multilora workload describe` opens; ServeGen folders are drawn for their first
600 s, Azure Functions counts for their first hour. Prints, per trace, each statistic of the trace and of synthetic
traffic of the same length made from the fit, and the worst differences; `--out` writes the rows as CSV.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from workloads.errors import WorkloadError
from workloads.fit import compare, fit, worst
from workloads.traces.formats import NO_LENGTHS, open_trace, recognise

FIRST_S = {"servegen": 600.0, "azure_functions_2019": 3600.0}
"""Seconds of a format that are looked at; all, where it is not named."""


def traces(root: Path) -> list[tuple[Path, str]]:
    """Files and folders under `root` whose format is recognised, with it."""
    found = []
    for path in sorted([root, *root.rglob("*")]):
        try:
            name = recognise(path)
        except (WorkloadError, OSError):
            continue
        if not path.name.startswith("chunk-"):
            found.append((path, name))
    return found


def rows(path: Path, name: str, root: Path) -> pd.DataFrame:
    """One row per statistic: the trace's value, the fit's, and their difference."""
    workload = open_trace(path, name, FIRST_S.get(name))
    count, table = fit(workload.requests)
    compared = compare(workload.requests, count, table)
    if NO_LENGTHS in workload.notes:
        compared = [row for row in compared if "_tokens" not in row[0]]
    out = pd.DataFrame(compared, columns=["statistic", "trace_value", "synthetic_value"])
    out.insert(0, "trace", str(path.relative_to(root)) or path.name)
    summary = ", ".join(f"{key} {value:.3f}" for key, value in worst(compared).items() if value is not None)
    shown = {key: table[key] for key in ("arrival", "cv", "locality") if key in table}
    print(
        f"{path.relative_to(root)} ({name}, {len(workload.requests)} requests, {count} adapters) {shown}\n  {summary}"
    )
    return out


def main(argv: list[str] | None = None) -> int:
    """Print the fits of all traces; 2 if there is none, or one that cannot be read."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.workload_fits", description=__doc__)
    flags.add_argument("--data", type=Path, required=True, help="folder with traces")
    flags.add_argument("--out", type=Path, help="write the rows there as CSV")
    args = flags.parse_args(argv)
    found = traces(args.data) if args.data.is_dir() else []
    if not found:
        print(f"workload_fits: --data {args.data}: no trace of a known format in it", file=sys.stderr)
        return 2
    try:
        table = pd.concat([rows(path, name, args.data) for path, name in found])
    except WorkloadError as error:
        print(f"workload_fits: {error}", file=sys.stderr)
        return 2
    if args.out is not None:
        table.to_csv(args.out, index=False, float_format="%.6g", lineterminator="\n")
        print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
