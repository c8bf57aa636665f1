"""The command line: `multilora run | sweep | plan | copies | effects | curve | report | measure | validate | workload`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import BackendError
from sim.errors import ScenarioError
from sim.flags import whole
from workloads.errors import WorkloadError

if TYPE_CHECKING:
    from backend.profile import Profile


ELSEWHERE = ("curve", "plan", "copies", "effects", "validate", "workload")
"""Verbs with a module of their own, `sim/VERB_cli.py`, which is imported for them alone: start-up counts."""


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """The verbs and their flags; with `only`, of those with a module of their own no other than that one."""
    top = argparse.ArgumentParser(prog="multilora", description="Plan multi-LoRA LLM serving on measured costs.")
    verbs = top.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="simulate a scenario and write a run directory")
    run.add_argument("scenario", help="a TOML file, or a shipped scenario (demo-servegen, demo-azure)")
    run.add_argument("--backend", choices=("profile", "cuda", "cpu"), help="instead of the scenario's")
    run.add_argument("--profile", help="a shipped profile or a profile folder, instead of the scenario's")
    run.add_argument("--duration-s", type=float, help="seconds of arrivals, instead of the scenario's")
    run.add_argument(
        "--no-step-rows", action="store_true", help="keep no row a step and adapter move, only what they come to"
    )
    run.add_argument(
        "--verify",
        type=whole,
        nargs="?",
        const=100,
        metavar="EVERY",
        help="live: compute every EVERY-th step (default 100) again, adapter by adapter, and compare",
    )
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="live: what a request gets does not depend on what it is batched with; slow",
    )
    run.add_argument("--out", type=Path, help="the run directory to make (default: a new one under runs/)")
    measure = verbs.add_parser("measure", help="measure step and load costs on a device and write a profile")
    measure.add_argument("--geometry", help="a shipped geometry or a Hugging Face config.json")
    measure.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    measure.add_argument("--out", type=Path, required=True, help="the profile folder to make")
    measure.add_argument("--quick", action="store_true", help="a coarse grid, for a first look")
    measure.add_argument(
        "--refit",
        metavar="PROFILE",
        help="fit the steps again of a shipped profile or a profile folder; nothing is executed",
    )
    logs = measure.add_argument_group("from another engine's logs, with nothing executed")
    logs.add_argument(
        "--from-steps", type=Path, nargs="+", metavar="FILE", help="its step logs and timing tables (CSV)"
    )
    logs.add_argument(
        "--hold-out", type=Path, nargs="+", default=[], metavar="FILE", help="logs that only check the fit"
    )
    logs.add_argument(
        "--online", type=Path, nargs="+", default=[], metavar="FILE", help="step logs of live runs, for the host's part"
    )
    logs.add_argument("--online-max-loras", type=whole, nargs="+", default=[], help="of each of these runs, or of all")
    logs.add_argument("--engine", type=Path, metavar="JSON", help="what ran: gpu, capture_sizes")
    logs.add_argument("--rank", type=whole, help="rank of the adapters in the logs")
    logs.add_argument("--gpu-memory-gib", type=float, help="memory of the GPU that the logs come from")
    logs.add_argument(
        "--bandwidth-gb-s", type=float, help="its bandwidth, where all logs have one context and one rank"
    )
    logs.add_argument(
        "--slot-tile-us", type=float, default=0.0, help="what a slot costs in all LoRA kernels for 64 rows of a step"
    )
    sweep = verbs.add_parser("sweep", help="run a scenario over a grid of settings; the same command takes it up again")
    sweep.add_argument("scenario", help="a TOML file, or a shipped scenario (demo-servegen, demo-azure)")
    sweep.add_argument("--set", action="append", required=True, metavar="TABLE.KEY=V1,V2,…", help="values to try")
    sweep.add_argument("--seeds", type=whole, default=1, help="seeds a setting (default 1)")
    sweep.add_argument("--jobs", type=whole, default=-1, help="processes (default: one a core)")
    sweep.add_argument("--executor", choices=("local", "ray"), default="local")
    sweep.add_argument("--backend", choices=("profile", "cuda", "cpu"), help="instead of the scenario's")
    sweep.add_argument("--out", type=Path, required=True, help="the directory to make, or to take up again")
    report = verbs.add_parser("report", help="a run, a sweep or a plan as one HTML page; a run's timeline for Perfetto")
    report.add_argument("directory", type=Path, help="the directory of a run, a sweep, a plan or copies")
    for verb in ELSEWHERE:
        if only in (None, verb):
            _module(verb).add_verb(verbs)
    return top


def _module(verb: str) -> Any:
    return import_module(f"sim.{verb}_cli")


def _run(args: argparse.Namespace) -> None:
    from sim.run import run_scenario

    result = run_scenario(
        args.scenario,
        backend=args.backend,
        profile=args.profile,
        out=args.out,
        duration_s=args.duration_s,
        step_rows=False if args.no_step_rows else None,
        deterministic=args.deterministic,
        verify=args.verify,
    )
    for note in result.notes:
        print(f"note: {note}")
    print(table(result.summary))
    print(result.out)


def _measure(args: argparse.Namespace) -> None:
    from backend.profile_quality import quality

    profile = _refitted(args) if args.refit else _measured(args)
    for line in quality(profile):
        print(line)
    print(args.out)


def _refitted(args: argparse.Namespace) -> Profile:
    from backend.measure import refit_profile
    from backend.profile import profile_folder

    if args.geometry or args.from_steps or args.quick:
        raise BackendError("--refit takes only --out beside it: everything else stands in the profile folder")
    return refit_profile(profile_folder(args.refit), args.out)


def _measured(args: argparse.Namespace) -> Profile:
    from backend.geometry import load_geometry

    if args.geometry is None:
        raise BackendError("measure needs --geometry, a shipped geometry or a Hugging Face config.json")
    geometry = load_geometry(args.geometry)
    if args.from_steps:
        from backend.from_steps import profile_from_steps

        needed = {"engine": args.engine, "rank": args.rank, "gpu_memory_gib": args.gpu_memory_gib}
        for name, value in needed.items():
            if value is None or (name != "engine" and not value > 0):
                raise BackendError(
                    f"--from-steps needs --{name.replace('_', '-')}, greater than 0 where it is a number"
                )
        if args.bandwidth_gb_s is not None and not args.bandwidth_gb_s > 0:
            raise BackendError(f"--bandwidth-gb-s is {args.bandwidth_gb_s}, must be > 0")
        if not 0 <= args.slot_tile_us < float("inf"):
            raise BackendError(f"--slot-tile-us is {args.slot_tile_us}, must be finite and >= 0")
        return profile_from_steps(
            args.from_steps,
            args.hold_out,
            geometry=geometry,
            bandwidth_gb_s=args.bandwidth_gb_s,
            out=args.out,
            slot_tile_us=args.slot_tile_us,
            online=_online(args.online, args.online_max_loras),
            **needed,
        )
    from backend.measure import measure_profile
    from sim.background import BackgroundEngine

    between = BackgroundEngine().step
    return measure_profile(geometry=geometry, device=args.device, out=args.out, quick=args.quick, between=between)


def _online(logs: list[Path], max_loras: list[int]) -> list[tuple[Path, int]]:
    if not logs and not max_loras:
        return []
    if len(max_loras) not in (1, len(logs)) or min(max_loras) < 1 or not logs:
        raise BackendError("--online needs --online-max-loras, >= 1: one for each of its logs, or one for all")
    return list(zip(logs, max_loras * (len(logs) if len(max_loras) == 1 else 1), strict=True))


def _report(args: argparse.Namespace) -> None:
    import pandas as pd

    from sim.report import report
    from sim.tenants import tenant_lines

    files = report(args.directory)
    for file in files:
        if file.name == "tenants.parquet":
            print("\n".join(tenant_lines(pd.read_parquet(file))))
    for file in files:
        print(file)


def _sweep(args: argparse.Namespace) -> None:
    from sim.scenario import load_scenario
    from sim.sweep import parse_sets, sweep
    from sim.sweep_plots import sweep_caption, sweep_figures
    from sim.verdict import THROUGHPUT, TPOT, TTFT, verdicts

    sets = parse_sets(args.set)
    results = sweep(
        args.scenario,
        sets,
        out=args.out,
        seeds=args.seeds,
        jobs=args.jobs,
        executor=args.executor,
        backend=args.backend,
    )
    shown = [*sets, "seed", "status", THROUGHPUT, TTFT, TPOT, "num_gpu_blocks", "adapter_hit_rate"]
    print(results[shown].to_string(index=False, float_format=lambda v: f"{v:.3g}" if v < 10 else f"{v:.0f}"))
    for message in results["error"].dropna().unique():
        print(f"refused: {message}")
    caption = sweep_caption(results, Path(args.scenario).stem, list(sets))
    print(caption)
    for sentence in verdicts(results, list(sets), load_scenario(args.scenario).slo):
        print(sentence)
    sweep_figures(results, list(sets), caption, args.out)
    print(args.out)


def table(summary: dict[str, object]) -> str:
    """The short table at the end of a run."""

    def show(key: str, form: str = ".1f") -> str:
        value = summary.get(key)
        return "–" if value is None else format(value, form)

    lines = [f"{summary['scenario']} on {summary['backend']}, seed {summary['seed']}"]
    lines.append(f"{'ms':8}{'mean':>12}{'p50':>12}{'p90':>12}{'p99':>12}")
    for name, key in (("TTFT", "ttft"), ("TPOT", "tpot"), ("E2E", "e2el")):
        cells = [show(f"{s}_{key}_ms") for s in ("mean", "p50", "p90", "p99")]
        lines.append(f"{name:8}" + "".join(f"{c:>12}" for c in cells))
    lines += [
        (
            f"requests  {show('completed', 'd')} of {show('requests', 'd')} finished in {show('duration_s')} s simulated,"
            f" {show('request_throughput', '.2f')} req/s, {show('output_throughput')} output tok/s"
        ),
        (
            f"adapters  hit rate {show('adapter_hit_rate', '.1%')}, loads disk→host {show('adapter_stages', 'd')},"
            f" host→slot {show('adapter_activations', 'd')}, evictions {show('adapter_evictions', 'd')}"
        ),
        (
            f"KV        {show('num_gpu_blocks', 'd')} blocks, use mean {show('mean_kv_usage', '.1%')}"
            f" max {show('max_kv_usage', '.1%')}, preemptions {show('preemptions', 'd')}"
        ),
        f"steps     {show('steps', 'd')}, executed on a device {show('steps_executed_on_device', 'd')}",
    ]
    if isinstance(found := summary.get("verified"), dict):
        lines.append(
            f"verified  {found['steps']} steps again, adapter by adapter: {found['lora_rows']} rows of LoRA products with the"
            f" same bits; {found['tokens_that_differ']} of {found['tokens']} tokens differ, logits by at most"
            f" {found['largest_logit_error']:.1e}"
        )
    if "replica_hours" in summary:
        lines.append(
            f"fleet     {show('replicas', 'd')} replicas, {show('replica_hours', '.2f')} replica hours, router"
            f" {summary['router']}, placement {summary['placement']}; requests started over {show('requeues', 'd')}"
            f" with {show('lost_tokens', 'd')} tokens"
        )
    if "cost_usd" in summary:
        lines.append(f"cost      {show('cost_usd', '.2f')} USD")
    if "profile_mape" in summary:
        lines.append(
            f"profile   {summary['profile_gpu']}: MAPE {show('profile_mape', '.1%')}, p95 {show('profile_p95', '.1%')} on"
            f" {show('profile_steps', '.0f')} held-out steps; {show('extrapolated_share', '.1%')} of the steps lie"
            " outside what was measured"
        )
    return "\n".join(lines)


HERE = {"run": _run, "measure": _measure, "sweep": _sweep, "report": _report}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 2 after one sentence on standard error."""
    words = sys.argv[1:] if argv is None else list(argv)
    known = words and words[0] in (*HERE, *ELSEWHERE)
    args = parser(words[0] if known else None).parse_args(words)
    try:
        if args.verb in HERE:
            HERE[args.verb](args)
        else:
            _module(args.verb).run(args)
    except (ScenarioError, WorkloadError, BackendError) as error:
        print(f"multilora: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
