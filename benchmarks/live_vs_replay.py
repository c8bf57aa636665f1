"""`python -m benchmarks.live_vs_replay`: a scenario executed step by step on the GPU, and replayed from a profile.

Prints both beside each other and writes them, with GPU and versions, as JSON (`--out`); how far the replay would move if every
step took 1 % longer, for where requests queue a small error of the steps is a large one of their waiting; and between which it lies in
eight of ten replays whose loads take, each, one of the times measured instead of their mean (`--draws` of them); and how far a replay is
off that has the live run's own loads and a host as fast as its was, which are its machine's by chance. `--lives 2` executes the scenario
twice, and says how far the second run lies from the first: no replay can be expected to be nearer. `--again FILE` executes nothing: it replays
beside the live figures of such a file, for a profile that was fitted again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from backend.base import Backend
from backend.errors import BackendError
from backend.gpu_watch import watching
from backend.measure import describe_device
from backend.profile import load_profile, measured_loads
from backend.replay import ReplayBackend
from benchmarks.as_it_was import AsItWas, host_factor
from benchmarks.drawn_loads import DrawnLoads
from benchmarks.live_tables import tables_again, tables_of
from sim.deployment import Relief, WhatIf
from sim.engine import simulate
from sim.errors import ScenarioError
from sim.metrics import summarise
from sim.run import RunResult, open_engine, run_scenario
from sim.scenario import load_scenario
from sim.traffic import traffic_of

KEYS = (
    "completed",
    "duration_s",
    "steps",
    "request_throughput",
    "output_throughput",
    "mean_ttft_ms",
    "p50_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "p50_tpot_ms",
    "p99_tpot_ms",
    "mean_e2el_ms",
    "p50_e2el_ms",
    "p99_e2el_ms",
    "adapter_hit_rate",
    "adapter_activations",
    "load_share",
)


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {least} or more")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("scenarios", nargs="*", default=["demo-azure", "demo-servegen"])
    flags.add_argument("--profile", required=True, help="a shipped profile or a profile folder")
    flags.add_argument("--backend", default="cuda", choices=("cuda", "cpu"))
    flags.add_argument("--duration-s", type=float, default=60.0, help="seconds of arrivals")
    flags.add_argument("--out", type=Path, help="write the comparison there")
    flags.add_argument("--again", type=Path, help="an earlier comparison, whose live figures are taken")
    flags.add_argument(
        "--keep", type=Path, help="keep the run directories in this folder; with --again take live ones from it"
    )
    flags.add_argument(
        "--lives", type=partial(_count, least=1), default=1, help="how often to execute a scenario (default 1)"
    )
    flags.add_argument("--draws", type=_count, default=20, help="replays with loads drawn at random; 0: none")
    return flags


LONGER = 0.01
"""How much longer every step of the third run takes."""


Figures = Mapping[str, object]
"""A run's summary."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What a comparison shows beside a live run and its replay: the replay with longer steps, replays with loads drawn at random, the replay
    with the live run's own loads and host (None: not known), and further live runs.
    """

    longer: Figures
    drawn: Sequence[Figures] = ()
    as_it_was: Figures | None = None
    lives: Sequence[Figures] = ()


def show(name: str, live: Figures, replay: Figures, beside: Beside) -> dict[str, dict[str, object]]:
    """Print live and replay beside each other, and what is `beside` them; returns them with their relative differences."""
    rows: dict[str, dict[str, object]] = {}
    heads = (
        f"{'live':>14}{'replay':>14}{'':10}{'steps +1 %':>12}{'loads drawn, p10 to p90' if beside.drawn else '':>26}"
    )
    heads += "" if beside.as_it_was is None else "its loads, host".rjust(17)
    heads += "live again".rjust(12) * len(beside.lives)
    print(f"\n{name}: {live['steps']} steps executed\n{'':22}{heads}")
    for key in KEYS:
        row, told = _row(key, live, replay, beside)
        rows[key] = row
        texts = "".join(" " * n if c is None else f"{c:+{n}.2%}" for c, n in told)
        print(f"{key:22}{live[key]:14.3f}{replay[key]:14.3f}{texts}")
    return rows


def _row(
    key: str, live: Figures, replay: Figures, beside: Beside
) -> tuple[dict[str, object], list[tuple[float | None, int]]]:
    """One figure's differences, by name, and as they are printed with their widths."""
    difference, more = _change(live[key], replay[key]), _change(replay[key], beside.longer[key])
    row: dict[str, object] = {"live": live[key], "replay": replay[key], "difference": difference, "longer_steps": more}
    told: list[tuple[float | None, int]] = [(difference, 10), (more, 12)]
    changes = [change for run in beside.drawn if (change := _change(replay[key], run[key])) is not None]
    if changes:
        edges = [float(edge) for edge in np.quantile(changes, (0.1, 0.9))]
        row |= zip(("drawn_loads_p10", "drawn_loads_p90"), edges, strict=True)
        told += zip(edges, (16, 10), strict=True)
    if beside.as_it_was is not None:
        row["as_it_was"] = _change(live[key], beside.as_it_was[key])
        told.append((_change(live[key], beside.as_it_was[key]), 17))
    if again := [_change(live[key], other[key]) for other in beside.lives]:
        row["live_again"] = again
        told += ((change, 12) for change in again)
    return row, told


def _change(a: object, b: object) -> float | None:
    return float(b) / float(a) - 1 if isinstance(a, int | float) and isinstance(b, int | float) and a else None


def measured_when(profile: str) -> dict[str, object]:
    """What tells one measurement of a profile from another."""
    meta = load_profile(profile).meta
    return {key: meta[key] for key in ("date", "gpu", "measuring_s") if key in meta}


def _replay(name: str, args: argparse.Namespace, folder: Path) -> RunResult:
    out = folder / f"{Path(name).stem}-replay"
    return run_scenario(name, backend="profile", profile=args.profile, duration_s=args.duration_s, out=out)


def _other(name: str, args: argparse.Namespace, changed: Callable[[ReplayBackend], Backend]) -> Figures:
    """The replay on what `changed` makes of its backend."""
    scenario = load_scenario(name)
    workload = {**scenario.workload, "duration_s": args.duration_s}
    scenario = replace(scenario, backend="profile", profile=args.profile, workload=workload)
    traffic, replayed = traffic_of(scenario, scenario.seed), open_engine(scenario)
    assert isinstance(replayed, ReplayBackend)
    tables = simulate(
        traffic.requests,
        traffic.catalogue,
        scenario.engine,
        changed(replayed),
        pinned=traffic.pinned,
        horizon_s=scenario.horizon_s,
        step_rows=False,
    )
    return summarise(tables)


def _longer(name: str, args: argparse.Namespace) -> Figures:
    """The replay, had every step taken `LONGER` more."""
    return _other(name, args, lambda replayed: WhatIf(replayed, Relief(steps=1 + LONGER)))


def _as_it_was(
    name: str, args: argparse.Namespace, steps: pd.DataFrame, moves: pd.DataFrame, replayed: pd.DataFrame
) -> Figures:
    """The replay with loads and host of the live run, whose tables these are."""
    return _other(name, args, lambda inner: AsItWas(inner, moves, host_factor(steps, replayed)))


def _drawn(name: str, args: argparse.Namespace) -> list[Figures]:
    """Replays with loads drawn at random, `--draws` of them."""
    file = measured_loads(args.profile)
    if not args.draws or file is None:
        return []
    loads = pd.read_parquet(file)
    return [_other(name, args, partial(DrawnLoads, loads=loads, seed=seed)) for seed in range(args.draws)]


def _executed(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Each scenario executed, and replayed."""
    report: dict[str, object] = {
        "device": describe_device(args.backend),
        "duration_s": args.duration_s,
        "profile": Path(args.profile).name,
        "profile_measured": measured_when(args.profile),
    }
    for name in args.scenarios:
        stem = Path(name).stem
        with watching(enabled=args.backend == "cuda") as watch:
            (live, wall_s), *others = [
                _live(name, args, folder / f"{stem}-live{n}") for n in ("", *range(2, args.lives + 1))
            ]
        replay = _replay(name, args, folder)
        steps, moves = live.tables.steps, live.tables.moves
        was = _as_it_was(name, args, steps, moves, replay.tables.steps)
        beside = Beside(_longer(name, args), _drawn(name, args), was, [other.summary for other, _ in others])
        shown = show(name, live.summary, replay.summary, beside)
        tables = tables_of(steps, replay.tables.steps)
        print(pd.DataFrame(tables["by_kind"]).round(3).to_string(index=False))
        report[stem] = {"live_wall_s": wall_s, **watch.facts, **shown, **tables}
    return report


def _live(name: str, args: argparse.Namespace, out: Path) -> tuple[RunResult, float]:
    """A run that executes every step, and how long it took."""
    started = time.perf_counter()
    run = run_scenario(name, backend=args.backend, duration_s=args.duration_s, out=out)
    assert run.summary["steps_executed_on_device"] == len(run.tables.steps)
    return run, time.perf_counter() - started


def _again(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The scenarios of an earlier comparison replayed once more."""
    report: dict[str, object] = json.loads(args.again.read_text())
    args.duration_s = report["duration_s"]
    report |= {"profile": Path(args.profile).name, "profile_measured": measured_when(args.profile)}
    for name, rows in report.items():
        if isinstance(rows, dict) and "live_wall_s" in rows:
            live, replay = {key: rows[key]["live"] for key in KEYS}, _replay(name, args, folder)
            was = None
            if args.keep:
                steps, moves = (
                    pd.read_parquet(args.keep / f"{name}-live" / f"{t}.parquet") for t in ("steps", "moves")
                )
                if len(steps) != live["steps"]:
                    raise ScenarioError(f"--keep {args.keep}: {name}-live is not the run of --again {args.again}")
                tables = tables_of(steps, replay.tables.steps)
                was = _as_it_was(name, args, steps, moves, replay.tables.steps)
            else:
                tables = tables_again(rows, replay.tables.steps)
            shown = show(name, live, replay.summary, Beside(_longer(name, args), _drawn(name, args), was))
            for key in KEYS:
                shown[key] |= {"live_again": rows[key]["live_again"]} if "live_again" in rows[key] else {}
            known = {key: rows[key] for key in ("live_wall_s", "clocks") if key in rows}
            report[name] = {**known, **shown, **tables}
    return report


def main() -> int:
    """Run each scenario both ways; the exit code."""
    args = parser().parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            report = _again(args, Path(scratch)) if args.again else _executed(args, args.keep or Path(scratch))
    except (BackendError, ScenarioError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out:
        args.out.write_text(json.dumps(report, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
