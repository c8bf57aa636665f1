"""`multilora validate`: its flags, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

from sim.errors import ScenarioError
from sim.flags import whole


def add_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `validate` to the verbs of the command line."""
    validate = verbs.add_parser(
        "validate", help="hold a profile against measured runs: every step, and in a closed loop"
    )
    validate.add_argument(
        "--profile", default="vllm-0.24-h100-llama-3.1-8b", help="a shipped profile or a profile folder"
    )
    validate.add_argument("--trace", type=Path, nargs="+", default=[], metavar="REQUESTS", help="NAME_requests.csv")
    validate.add_argument(
        "--steps",
        type=Path,
        nargs="+",
        default=[],
        help="NAME_steps.csv of each, beside its schedule; without, a run that the profile was made from is not left out of it",
    )
    validate.add_argument("--max-loras", type=whole, nargs="+", default=[], help="of each run, or of all")
    runs = validate.add_argument_group("published runs of vLLM 0.8.5 servers, predicted blind")
    runs.add_argument("--runs", type=Path, metavar="FILE", help="table of runs; alone: which starts fail for memory")
    runs.add_argument(
        "--lengths", type=Path, metavar="FILE", help="table of prompt and output lengths; with it: what clients saw"
    )
    runs.add_argument("--every", type=whole, default=1, help="predict every N-th run (default 1: all)")
    runs.add_argument("--window-s", type=float, help="seconds of arrivals (default: each run's own)")
    validate.add_argument(
        "--seeds", type=whole, help="simulations of a run (default: 16 of a trace, 1 of a published run)"
    )
    validate.add_argument("--rank", type=whole, default=16, help="of the adapters (default 16)")
    validate.add_argument(
        "--fit-host-s",
        type=float,
        default=10.0,
        help="seconds of a step log that the host's part is fitted to (default 10)",
    )


def run(args: argparse.Namespace) -> None:
    """Carry `multilora validate` out."""
    from backend.online import online_runs
    from backend.profile import load_profile
    from sim.validate import SEEDS, pair, validate

    if not args.trace and args.runs is None:
        raise ScenarioError("validate needs --trace with --max-loras, or --runs")
    if args.trace and not args.max_loras:
        raise ScenarioError("--trace needs --max-loras, of each run or of all")
    if args.seeds is not None and args.seeds < 1:
        raise ScenarioError(f"--seeds is {args.seeds}, must be >= 1")
    if args.runs is not None:
        _validate_runs(args)
    if not 0 < args.fit_host_s < float("inf"):
        raise ScenarioError(f"--fit-host-s is {args.fit_host_s}, must be finite and > 0")
    profile = load_profile(args.profile)
    made_from = online_runs(args.profile, profile)
    for run in pair(args.trace, args.steps, args.max_loras):
        result = validate(
            run, profile, rank=args.rank, runs=made_from, fit_host_s=args.fit_host_s, seeds=args.seeds or SEEDS
        )
        print(f"{result.name}, max_loras {run.max_loras}, profile {args.profile}")
        if result.left_out is not None:
            print(f"the profile was made from this run, too ({result.left_out}): it was made again without it")
        for table in (result.steps, result.loop):
            if table is not None:
                print(table.to_string(index=False, float_format=lambda v: f"{v:.3f}" if abs(v) < 10 else f"{v:.1f}"))


def _validate_runs(args: argparse.Namespace) -> None:
    from sim.published import boundary, predictions, read_runs
    from sim.published_grids import coverage, decisions, smape
    from sim.published_load import read_lengths

    for flag, value in (("every", args.every), ("window-s", args.window_s)):
        if value is not None and not 0 < value < float("inf"):
            raise ScenarioError(f"--{flag} is {value}, must be finite and > 0")
    runs = read_runs(args.runs)
    print(boundary(runs).to_string(index=False))
    if args.lengths is not None:
        table = predictions(
            runs, read_lengths(args.lengths), every=args.every, seeds=args.seeds or 1, window_s=args.window_s
        )
        print(table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
        for judged in (smape(table), coverage(table), decisions(table)):
            if len(judged):
                print(judged.to_string(index=False, float_format=lambda v: f"{v:.3f}"))
