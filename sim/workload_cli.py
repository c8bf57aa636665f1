"""`multilora workload describe | fit | convert`: look at traffic, imitate it, hand it to other tools."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sim import run_dir
from sim.errors import ScenarioError
from sim.plots import workload_figure
from workloads.synth import LOCALITY
from workloads.traces.formats import NO_LENGTHS, OPENERS, open_trace
from workloads.workload import Workload

if TYPE_CHECKING:
    from workloads.describe import Statistics

GEOMETRY, PROFILE = "llama-3.1-8b", "h100-llama-3.1-8b"
"""What a fitted scenario runs on, until its reader says otherwise."""


def add_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The verb `workload` with its own verbs."""
    workload = verbs.add_parser("workload", help="describe, imitate or convert traffic").add_subparsers(
        dest="workload_verb", required=True
    )
    describe = workload.add_parser("describe", help="rate, bursts, skew, reuse and lengths, as a table and a figure")
    describe.add_argument("source", help="a trace file or folder, or a scenario (TOML, or a shipped name)")
    describe.add_argument("--out", type=Path, help="the directory to make (default: a new one under runs/)")
    fit = workload.add_parser("fit", help="a scenario whose synthetic traffic is like a trace")
    fit.add_argument("source", help="a trace file or folder")
    fit.add_argument("--out", type=Path, required=True, help="the scenario file to make")
    fit.add_argument(
        "--locality", choices=tuple(LOCALITY), default="repeat", help="repeat keeps popularity, lru_stack the hit curve"
    )
    convert = workload.add_parser("convert", help="the same traffic in another format")
    convert.add_argument("source", help="a trace file or folder, or a scenario (TOML, or a shipped name)")
    convert.add_argument("--to", required=True, help="table, vllm, sglang, mooncake or inference-perf")
    convert.add_argument("--out", type=Path, required=True, help="the file to make")
    for verb in (describe, fit, convert):
        verb.add_argument("--from", dest="format", choices=tuple(OPENERS), help="the format (default: recognised)")
        verb.add_argument("--duration-s", type=float, help="only the first seconds")


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    actions: Mapping[str, Callable[[argparse.Namespace], None]] = {
        "describe": _describe, "fit": _fit, "convert": _convert,
    }  # fmt: skip
    if args.duration_s is not None and not 0 < args.duration_s < float("inf"):
        raise ScenarioError(f"--duration-s is {args.duration_s}, must be finite and > 0")
    actions[args.workload_verb](args)


def traffic(source: str, name: str | None, duration_s: float | None) -> Workload:
    """Requests of a trace, or of a scenario's `[workload]`. Raises `ScenarioError` or `WorkloadError`."""
    from sim.scenario import find, load_scenario
    from workloads.build import build_workload

    path = Path(source)
    if name is not None or (path.exists() and path.suffix != ".toml"):
        return open_trace(path, name, duration_s)
    scenario = load_scenario(str(find(source)))
    table = scenario.workload if duration_s is None else {**scenario.workload, "duration_s": duration_s}
    return build_workload(table, adapter_count=scenario.adapter_count, seed=scenario.seed, base_dir=scenario.base_dir)


def _describe(args: argparse.Namespace) -> None:
    from workloads.describe import describe

    out = run_dir.choose(f"describe-{Path(args.source).stem}", args.out)
    workload = traffic(args.source, args.format, args.duration_s)
    facts = describe(workload.requests)
    if NO_LENGTHS in workload.notes:
        facts = {key: value for key, value in facts.items() if "_tokens" not in key}

    def fill(folder: Path) -> None:
        (folder / "statistics.json").write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
        workload_figure(workload.requests, Path(args.source).name, folder / "figure.png")

    run_dir.publish(out, fill)
    _notes(workload)
    print(table(facts))
    print(out)


def _fit(args: argparse.Namespace) -> None:
    import tomli_w

    from workloads.fit import compare, fit, worst

    if args.out.exists():
        raise ScenarioError(f"--out {args.out}: exists already; name a new file")
    workload = open_trace(Path(args.source), args.format, args.duration_s)
    if NO_LENGTHS in workload.notes:
        raise ScenarioError(f"{args.source}: {NO_LENGTHS}, so no scenario can be fitted to it")
    count, fitted = fit(workload.requests, args.locality)
    rows = compare(workload.requests, count, fitted)
    scenario = {
        "model": {"geometry": GEOMETRY},
        "engine": {"max_loras": min(count, 8), "max_model_len": _model_len(workload)},
        "adapters": {"count": count},
        "workload": fitted,
        "backend": {"kind": "profile", "profile": PROFILE},
    }
    heading = (
        f"# Made from {Path(args.source).name} by `multilora workload fit`; model, engine and backend are stand-ins.\n"
    )
    partial = args.out.with_name(f".{args.out.name}.partial")
    try:
        partial.write_text(heading + tomli_w.dumps(scenario))
        partial.rename(args.out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ScenarioError(f"--out {args.out}: cannot be written ({error})") from error
    _notes(workload)
    print(f"{'statistic':28}{'trace':>14}{'synthetic':>14}")
    for key, real, made in rows:
        print(f"{key:28}{_cell(real):>14}{_cell(made):>14}")
    print("worst: " + ", ".join(f"{key} {_cell(value)}" for key, value in worst(rows).items()))
    print(args.out)


def _model_len(workload: Workload) -> int:
    """A `max_model_len` that the longest request fits into, as it would with prompts and outputs drawn apart."""
    longest = int(workload.requests.prompt_tokens.max() + workload.requests.output_tokens.max())
    return max(2048, 1 << (longest - 1).bit_length())


def _convert(args: argparse.Namespace) -> None:
    from workloads.convert import TARGETS, convert

    if args.to not in TARGETS:
        raise ScenarioError(f"--to {args.to}: unknown, must be one of {', '.join(TARGETS)}")
    workload = traffic(args.source, args.format, args.duration_s)
    if NO_LENGTHS in workload.notes:
        raise ScenarioError(f"{args.source}: {NO_LENGTHS}; give lengths in a scenario and convert that")
    notes = convert(workload, args.to, args.out)
    _notes(workload)
    for note in notes:
        print(f"note: {note}")
    print(args.out)


def _notes(workload: Workload) -> None:
    for note in workload.notes:
        print(f"note: {note}")


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(facts: Statistics) -> str:
    """The statistics, one a line; the two hit curves side by side."""
    lines = [f"{key:28}{_cell(value):>14}" for key, value in facts.items() if not key.startswith("lru_hit")]
    if any(key.startswith("lru_hit") for key in facts):
        lines.append(f"{'LRU hits with k slots':28}{'in order':>14}{'shuffled':>14}")
        for key, value in facts.items():
            if key.startswith("lru_hit") and not key.endswith("shuffled"):
                lines.append(
                    f"{'  k = ' + key.removeprefix('lru_hit_'):28}{_cell(value):>14}{_cell(facts[key + '_shuffled']):>14}"
                )
    return "\n".join(lines)
