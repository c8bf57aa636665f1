"""`python -m benchmarks.live_vs_replay`: a scenario executed step by step on the GPU, and replayed from a profile.

Prints both beside each other and writes them, with GPU and versions, as JSON (`--out`). `--again FILE` executes nothing: it replays
beside the live figures of such a file, for a profile that was fitted again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from backend.errors import BackendError
from backend.measure import describe_device
from backend.profile import load_profile
from sim.errors import ScenarioError
from sim.run import RunResult, run_scenario

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


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("scenarios", nargs="*", default=["demo-azure", "demo-servegen"])
    flags.add_argument("--profile", required=True, help="a shipped profile or a profile folder")
    flags.add_argument("--backend", default="cuda", choices=("cuda", "cpu"))
    flags.add_argument("--duration-s", type=float, default=60.0, help="seconds of arrivals")
    flags.add_argument("--out", type=Path, help="write the comparison there")
    flags.add_argument("--again", type=Path, help="an earlier comparison, whose live figures are taken")
    flags.add_argument("--keep", type=Path, help="keep the run directories in this folder")
    return flags


def show(name: str, live: Mapping[str, object], replay: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Print the two summaries beside each other; returns them with their relative difference."""
    rows: dict[str, dict[str, object]] = {}
    print(f"\n{name}: {live['steps']} steps executed")
    for key in KEYS:
        a, b = live[key], replay[key]
        ratio = float(b) / float(a) - 1 if isinstance(a, int | float) and isinstance(b, int | float) and a else None
        rows[key] = {"live": a, "replay": b, "difference": ratio}
        print(f"{key:22}{a:14.3f}{b:14.3f}" + ("" if ratio is None else f"{ratio:+10.2%}"))
    return rows


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
    found: list[dict[str, object]] = []
    for name, *which in KINDS:
        row: dict[str, object] = {"kind": name}
        for side, steps in (("live", live), ("replay", replay)):
            mine = _kind(steps, *which)
            row |= {f"{side}_steps": len(mine), f"{side}_tokens": float(mine["tokens"].mean())}
            row |= {f"{side}_{part}_ms": float(mine[f"{part}_s"].mean() * 1e3) for part in ("device", "host", "load")}
            row[f"{side}_load_most_ms"] = float(mine["load_s"].max() * 1e3)
        if row["live_steps"] and row["replay_steps"]:
            found.append(row)
    return found


def measured_when(profile: str) -> dict[str, object]:
    """What tells one measurement of a profile from another."""
    meta = load_profile(profile).meta
    return {key: meta[key] for key in ("date", "gpu", "measuring_s") if key in meta}


def _replay(name: str, args: argparse.Namespace, folder: Path) -> RunResult:
    out = folder / f"{Path(name).stem}-replay"
    return run_scenario(name, backend="profile", profile=args.profile, duration_s=args.duration_s, out=out)


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
        shown = show(name, live.summary, replay.summary)
        kinds = by_kind(live.tables.steps, replay.tables.steps)
        print(pd.DataFrame(kinds).round(3).to_string(index=False))
        report[Path(name).stem] = {"live_wall_s": wall_s, **shown, "by_kind": kinds}
    return report


def _again(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The scenarios of an earlier comparison replayed once more."""
    report: dict[str, object] = json.loads(args.again.read_text())
    args.duration_s = report["duration_s"]
    report |= {"profile": Path(args.profile).name, "profile_measured": measured_when(args.profile)}
    for name, rows in report.items():
        if isinstance(rows, dict) and "live_wall_s" in rows:
            live = {key: rows[key]["live"] for key in KEYS}
            report[name] = {"live_wall_s": rows["live_wall_s"], **show(name, live, _replay(name, args, folder).summary)}
    return report


def main() -> int:
    """Run each scenario both ways; the exit code."""
    args = parser().parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = args.keep or Path(scratch)
            report = _again(args, folder) if args.again else _executed(args, folder)
    except (BackendError, ScenarioError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out:
        args.out.write_text(json.dumps(report, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
