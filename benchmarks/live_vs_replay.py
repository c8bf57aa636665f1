"""`python -m benchmarks.live_vs_replay`: a scenario executed step by step on the GPU, and replayed from a profile.

Prints both beside each other and writes them, with GPU and versions, as JSON (`--out`); how far the replay would move if every
step took 1 % longer, for where requests queue a small error of the steps is a large one of their waiting; and between which it lies in
eight of ten replays whose adapters take, each, one of the times measured instead of their mean (`--draws` of them). `--again FILE`
executes nothing: it replays beside the live figures of such a file, for a profile that was fitted again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from backend.base import Backend
from backend.errors import BackendError
from backend.measure import describe_device
from backend.profile import load_profile, measured_loads
from backend.replay import ReplayBackend
from benchmarks.drawn_loads import DrawnLoads
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


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, 0 or more")
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
    flags.add_argument("--draws", type=_count, default=20, help="replays with loads drawn at random; 0: none")
    return flags


LONGER = 0.01
"""How much longer every step of the third run takes."""


Figures = Mapping[str, object]
"""A run's summary."""


def show(
    name: str, live: Figures, replay: Figures, longer: Figures, drawn: Sequence[Figures]
) -> dict[str, dict[str, object]]:
    """Print live and replay beside each other, `longer` and `drawn` beside the replay; returns them with their relative differences."""
    rows: dict[str, dict[str, object]] = {}
    heads = f"{'live':>14}{'replay':>14}{'':10}{'steps +1 %':>12}{'loads drawn, p10 to p90' if drawn else '':>26}"
    print(f"\n{name}: {live['steps']} steps executed\n{'':22}{heads}")
    for key in KEYS:
        difference, more = _change(live[key], replay[key]), _change(replay[key], longer[key])
        rows[key] = {"live": live[key], "replay": replay[key], "difference": difference, "longer_steps": more}
        changes = [_change(replay[key], run[key]) for run in drawn]
        known = [change for change in changes if change is not None]
        edges = [float(edge) for edge in np.quantile(known, (0.1, 0.9))] if known else []
        rows[key] |= zip(("drawn_loads_p10", "drawn_loads_p90"), edges, strict=False)
        told = zip((difference, more, *edges), (10, 12, 16, 10), strict=False)
        texts = "".join(" " * n if c is None else f"{c:+{n}.2%}" for c, n in told)
        print(f"{key:22}{live[key]:14.3f}{replay[key]:14.3f}{texts}")
    return rows


def _change(a: object, b: object) -> float | None:
    return float(b) / float(a) - 1 if isinstance(a, int | float) and isinstance(b, int | float) and a else None


KINDS = (
    ("decodes, up to 8", 0, 0, 8),
    ("decodes, 9 to 32", 0, 9, 32),
    ("decodes, more", 0, 33, None),
    ("with prompts, up to 256 tokens", 1, 1, 256),
    ("with prompts, 257 to 1024 tokens", 1, 257, 1024),
    ("with prompts, more", 1, 1025, None),
)
"""Kinds of steps: name, whether prompts are among them, least and most tokens."""


def _kind(steps: pd.DataFrame, prompts: int, least: int, most: int | None) -> pd.DataFrame:
    tokens = steps["tokens"]
    inside = (tokens >= least) & (tokens <= (tokens.max() if most is None else most))
    return steps[((steps["prefill_tokens"] > 0) == bool(prompts)) & inside & (tokens > 0)]


def by_kind(live: pd.DataFrame, replay: pd.DataFrame) -> list[dict[str, object]]:
    """How long steps of each kind take, live and replayed, and how many tokens they have: where the two part.

    `load_most_ms`: what the slowest of them waited for adapters; live, one slow read delays all that are waiting.
    """
    rows = ({"kind": name, **_means("live", live, which), **_means("replay", replay, which)} for name, *which in KINDS)
    return [row for row in rows if row["live_steps"] and row["replay_steps"]]


def _means(side: str, steps: pd.DataFrame, which: list[Any]) -> dict[str, object]:
    mine = _kind(steps, *which)
    means = {f"{side}_{part}_ms": float(mine[f"{part}_s"].mean() * 1e3) for part in ("device", "host", "load")}
    most = {f"{side}_load_most_ms": float(mine["load_s"].max() * 1e3)}
    return {f"{side}_steps": len(mine), f"{side}_tokens": float(mine["tokens"].mean()), **means, **most}


def measured_when(profile: str) -> dict[str, object]:
    """What tells one measurement of a profile from another."""
    meta = load_profile(profile).meta
    return {key: meta[key] for key in ("date", "gpu", "measuring_s") if key in meta}


WINDOW_S = 10.0
"""Of `host_by_time`."""


def host_by_time(live: pd.DataFrame, replay: pd.DataFrame) -> list[dict[str, float]]:
    """Milliseconds of the host's part of decodes in windows of `WINDOW_S`: a shared machine's host is now faster, now slower,
    of which a profile knows the mean while it was measured.
    """
    return _beside(_host_ms(live), _host_ms(replay))


def _host_ms(steps: pd.DataFrame) -> dict[float, float]:
    decodes = steps[(steps["prefill_tokens"] == 0) & (steps["tokens"] > 0)]
    means = decodes.groupby(decodes["start_s"] // WINDOW_S * WINDOW_S)["host_s"].mean() * 1e3
    return {float(start_s): float(mean) for start_s, mean in zip(means.index, means, strict=True)}


def _beside(live: Mapping[float, float], replay: Mapping[float, float]) -> list[dict[str, float]]:
    both = (start_s for start_s in live if start_s in replay)
    return [{"start_s": s, "live_host_ms": live[s], "replay_host_ms": replay[s]} for s in both]


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
        started, out = time.perf_counter(), folder / f"{Path(name).stem}-live"
        live = run_scenario(name, backend=args.backend, duration_s=args.duration_s, out=out)
        wall_s = time.perf_counter() - started
        assert live.summary["steps_executed_on_device"] == len(live.tables.steps)
        replay = _replay(name, args, folder)
        shown = show(name, live.summary, replay.summary, _longer(name, args), _drawn(name, args))
        tables = _tables(live.tables.steps, replay.tables.steps)
        print(pd.DataFrame(tables["by_kind"]).round(3).to_string(index=False))
        report[Path(name).stem] = {"live_wall_s": wall_s, **shown, **tables}
    return report


def _again(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The scenarios of an earlier comparison replayed once more."""
    report: dict[str, object] = json.loads(args.again.read_text())
    args.duration_s = report["duration_s"]
    report |= {"profile": Path(args.profile).name, "profile_measured": measured_when(args.profile)}
    for name, rows in report.items():
        if isinstance(rows, dict) and "live_wall_s" in rows:
            live, replay = {key: rows[key]["live"] for key in KEYS}, _replay(name, args, folder)
            if args.keep:
                steps = pd.read_parquet(args.keep / f"{name}-live" / "steps.parquet")
                if len(steps) != live["steps"]:
                    raise ScenarioError(f"--keep {args.keep}: {name}-live is not the run of --again {args.again}")
                tables = _tables(steps, replay.tables.steps)
            else:
                tables = _tables_again(rows, replay.tables.steps)
            shown = show(name, live, replay.summary, _longer(name, args), _drawn(name, args))
            report[name] = {"live_wall_s": rows["live_wall_s"], **shown, **tables}
    return report


def _tables(live: pd.DataFrame, replay: pd.DataFrame) -> dict[str, Any]:
    return {"by_kind": by_kind(live, replay), "host_by_time": host_by_time(live, replay)}


def _tables_again(rows: Mapping[str, Any], replay: pd.DataFrame) -> dict[str, Any]:
    """The live figures of an earlier comparison's tables, those that it has, beside a new replay."""
    which = {kind: rest for kind, *rest in KINDS}
    tables: dict[str, Any] = {
        "by_kind": [row | _means("replay", replay, which[row["kind"]]) for row in rows.get("by_kind", [])]
    }
    if waves := {row["start_s"]: row["live_host_ms"] for row in rows.get("host_by_time", [])}:
        tables["host_by_time"] = _beside(waves, _host_ms(replay))
    return tables


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
