"""`python -m benchmarks.published_runs --data DIR --out FILE.csv`: published runs of vLLM 0.8.5 servers, predicted blind.

Writes sim/published_costs.json. DIR has `runs_public.csv` and `lengths_reconstructed.csv`. A tenth of the clean rows says what steps cost; `--every N` predicts
every N-th of the others (1: all, hours), for as long as the servers ran.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from backend.errors import BackendError
from sim.errors import ScenarioError
from sim.published import boundary, clean, costs_of, predictions, read_lengths, read_runs, smape, training

COSTS = Path(__file__).parents[1] / "sim" / "published_costs.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published_runs", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="predict every N-th row (default 1)")
    parser.add_argument("--window-s", type=float, help="seconds of arrivals (default: the row's own)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=-1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.data / "runs_public.csv")
        print(boundary(runs).to_string(index=False))
        rows = clean(runs)
        costs = costs_of(training(rows))
        lengths = read_lengths(args.data / "lengths_reconstructed.csv")
    except (BackendError, ScenarioError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({model: known["costs"] for model, known in costs.items()}, indent=1))
    COSTS.write_text(json.dumps(costs, indent=1) + "\n")
    table = predictions(runs, lengths, every=args.every, seeds=args.seeds, window_s=args.window_s, jobs=args.jobs)
    print(smape(table).round(3).to_string(index=False))
    if args.out:
        table.to_csv(args.out, index=False, float_format="%.6g", lineterminator="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
