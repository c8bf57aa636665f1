"""`python -m benchmarks.published_runs --data DIR [--fit]`: published runs of vLLM 0.8.5 servers, predicted blind.

DIR has `runs_public.csv`, `lengths_reconstructed.csv` and the micro-measurements. `--fit`: a tenth of the clean rows and the
micro-measurements say what is known of their servers; writes sim/published_costs.json. Then every `--every`-th of the other rows is
predicted for as long as its server ran, with `--seeds` seeds, and written to `--out` (default: benchmarks/results/published_runs.csv).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from backend.errors import BackendError
from sim.errors import ScenarioError
from sim.published import boundary, clean, predictions, read_runs, training
from sim.published_fit import known_of
from sim.published_grids import coverage, decisions, smape
from sim.published_load import read_lengths

KNOWN = Path(__file__).parents[1] / "sim" / "published_costs.json"
RESULTS = Path(__file__).parent / "results" / "published_runs.csv"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published_runs", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--fit", action="store_true", help="make sim/published_costs.json anew")
    parser.add_argument("--every", type=int, default=1, help="predict every N-th row (default 1; 0: none)")
    parser.add_argument("--window-s", type=float, help="seconds of arrivals (default: the row's own)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=-1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.data / "runs_public.csv")
        print(boundary(runs).to_string(index=False))
        lengths = read_lengths(args.data / "lengths_reconstructed.csv")
        if args.fit:
            made = training(clean(runs)).groupby("model")
            known = {str(m): known_of(rows, str(m), args.data, lengths, jobs=args.jobs).to_json() for m, rows in made}
            KNOWN.write_text(json.dumps(known, indent=1) + "\n")
            print(KNOWN.read_text())
        if args.every == 0:
            return 0
        table = predictions(runs, lengths, every=args.every, seeds=args.seeds, window_s=args.window_s, jobs=args.jobs)
    except (BackendError, ScenarioError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for judged in (smape(table), coverage(table), decisions(table)):
        print(judged.round(3).to_string(index=False))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False, float_format="%.6g", lineterminator="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
