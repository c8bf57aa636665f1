"""`multilora copies` on the command line: N deltas beside N whole copies, where sharing starts to pay, and a figure."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import joblib

from backend.geometry import load_geometry
from sim import run_dir
from sim.copies import ARMS, ROUTES, Arm, Cell, Question, Table, check_tenants
from sim.errors import ScenarioError
from sim.flags import whole
from sim.plan_cli import check_counts, prices, with_duration
from sim.plan_grid import Grid, prices_of
from sim.scenario import load_scenario
from sim.slo import parse_slo
from sim.swapping import model_load_bytes_per_s
from sim.traffic import traffic_of
from workloads.adapters import Catalogue

NAMES = {"deltas": "base + deltas", "dedicated": "dedicated copies", "time_shared": "time-shared copies"}


def add_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The verb `copies`."""
    verb = verbs.add_parser("copies", help="what N fine-tunes cost as deltas of one base, and as N whole copies")
    verb.add_argument("scenario", help="a TOML file, or a shipped scenario")
    verb.add_argument("--slo", required=True, help='such as "ttft_p99<=1.0s, tpot_p99<=60ms"')
    verb.add_argument("--attainment", type=float, help="share of requests within all bounds at once")
    verb.add_argument(
        "--tenants", type=whole, nargs="+", help="numbers of fine-tunes (default: powers of two, and all)"
    )
    verb.add_argument(
        "--rate-factor", type=float, nargs="+", default=[1.0], help="times the scenario's rate (default 1)"
    )
    verb.add_argument("--profile", nargs="+", default=[], help="GPU kinds to choose from (default: the scenario's)")
    verb.add_argument(
        "--gpu-hour-usd", nargs="+", default=[], metavar="[PROFILE=]PRICE", help="instead of cost.gpu_hour_usd"
    )
    verb.add_argument("--model-load-gb-s", type=float, help="host to GPU, instead of the profile's measured bandwidth")
    verb.add_argument("--max-loras", type=whole, nargs="+", default=[], help="values to try for the deltas")
    verb.add_argument("--replicas", type=whole, default=256, help="most GPUs of a deployment (default 256)")
    verb.add_argument("--seeds", type=whole, default=2, help="seeds that are judged together (default 2)")
    verb.add_argument("--duration-s", type=float, help="seconds of arrivals, instead of the scenario's")
    verb.add_argument("--jobs", type=whole, default=-1, help="processes (default: one a core)")
    verb.add_argument("--out", type=Path, help="the directory to make (default: a new one under runs/)")


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    started = time.monotonic()
    promise = parse_slo(args.slo, args.attainment)
    scenario = with_duration(prices(args.gpu_hour_usd, load_scenario(args.scenario)), args.duration_s)
    check_counts({"--max-loras": args.max_loras, "--replicas": [args.replicas], "--seeds": [args.seeds]}, args.jobs)
    profiles = tuple(args.profile) or ((scenario.profile,) if scenario.profile else ())
    if not profiles:
        raise ScenarioError("copies needs a profile: --profile or backend.profile")
    given = args.model_load_gb_s
    if given is not None and not 0 < given < float("inf"):
        raise ScenarioError(f"--model-load-gb-s is {given}, must be finite and > 0")
    given = scenario.cost.model_load_gb_s if given is None else given
    costs, priced = prices_of(scenario, profiles)
    speeds = {profile: model_load_bytes_per_s(profile, given) for profile in profiles}
    traffic = [traffic_of(scenario, scenario.seed + i) for i in range(args.seeds)]
    count = len(traffic[0].catalogue)
    tenants = args.tenants or powers(count)
    check_tenants(tenants, args.rate_factor, count)
    out = run_dir.choose(f"copies-{scenario.name}", args.out)
    grid = Grid(profiles, tuple(args.max_loras), routes=ROUTES, most_replicas=args.replicas)
    question = Question(scenario, promise, grid, costs, speeds, args.replicas)
    with joblib.Parallel(n_jobs=args.jobs) as pool:
        table = Table(question, traffic, pool)
        table.fill([(f, n) for f in args.rate_factor for n in tenants])
        evens = {f: {arm: table.break_even(f, arm) for arm in ARMS[1:]} for f in args.rate_factor}
        table.fill([(f, n) for f, found in evens.items() for n in found.values() if n])
    source = "given" if given is not None else "measured, pinned host memory to GPU"
    lines = list(text(table, evens, traffic[0].catalogue, "USD/h" if priced else "GPUs", source))
    run_dir.publish(out, lambda folder: _write(folder, table, evens, lines, priced=priced))
    print("\n".join(lines))
    print(f"answered in {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(out)


def powers(count: int) -> list[int]:
    """1, 2, 4, … below `count`, and `count`."""
    return [2**i for i in range(count.bit_length()) if 2**i < count] + [count]


Evens = dict[float, dict[str, int | None]]


def text(table: Table, evens: Evens, catalogue: Catalogue, unit: str, source: str) -> Iterator[str]:
    """The printed answer."""
    question = table.question
    geometry = load_geometry(question.scenario.geometry)
    yield f"promise   {question.promise}; the same {len(table.traffic[0].requests)} requests (first of {len(table.traffic)} seeds)"
    for profile, speed in question.load_bytes_per_s.items():
        yield (
            f"copies    {geometry.weights_bytes / 1e9:.1f} GB each; on {profile} {speed / 1e9:.1f} GB/s ({source}):"
            f" {geometry.weights_bytes / speed:.2f} s to bring one in"
        )
    yield (
        f"{'tenants':>9}{'req/s each':>12}"
        + "".join(f"{NAMES[arm] + ', ' + unit:>28}" for arm in ARMS)
        + "  time-shared how"
    )
    for factor in dict.fromkeys(key[0] for key in table.cells):
        yield f"rate x{factor:g}: {table.row(factor)[0].rate_rps:.2f} req/s in all"
        yield from (_row(some) for some in table.row(factor))
        for arm in ARMS[1:]:
            yield "  " + _even(table, factor, arm, evens[factor][arm])
    deltas = sum(geometry.lora_bytes(a.rank) for a in catalogue)
    yield (
        f"memory    host holds all copies ({len(catalogue) * geometry.weights_bytes / 1e9:.0f} GB for {len(catalogue)}), or all"
        f" adapters ({deltas / 1e9:.1f} GB)"
    )


def _row(some: Cell) -> str:
    arms = "".join(f"{_arm(some.arms[arm]):>28}" for arm in ARMS)
    shared = some.arms["time_shared"]
    return f"{some.tenants:9}{some.tenant_rps:12.3g}{arms}  {'' if shared is None else shared.how}"


def _arm(arm: Arm | None) -> str:
    return "none keeps it" if arm is None else f"{arm.cost:.2f} ({arm.gpus} GPUs)"


def _even(table: Table, factor: float, arm: str, even: int | None) -> str:
    row = table.row(factor)
    if even is None:
        return f"{NAMES[arm]}: base + deltas never cost less, up to {row[-1].tenants} tenants"
    first = next(c for c in row if c.tenants == even)
    if even == row[0].tenants:
        return (
            f"{NAMES[arm]}: base + deltas cost less from the first, {even} tenants ({first.tenant_rps:.3g} req/s each)"
        )
    return f"{NAMES[arm]}: base + deltas cost less from {even} tenants on ({first.tenant_rps:.3g} req/s each, or less)"


def _write(folder: Path, table: Table, evens: Evens, lines: Sequence[str], *, priced: bool) -> None:
    from sim.copies_plots import copies_panels
    from sim.panels import sheet

    (folder / "copies.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    cells = [asdict(c) for key in sorted(table.cells) for c in [table.cells[key]]]
    data: dict[str, Any] = {
        "promise": str(table.question.promise),
        "unit": "USD/h" if priced else "GPUs",
        "load_bytes_per_s": table.question.load_bytes_per_s,
        "cells": cells,
        "break_even": [{"factor": f, **found} for f, found in evens.items()],
    }
    (folder / "copies.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    caption = f"least cost that keeps {data['promise']}"
    sheet(copies_panels(data), caption, [folder / f"copies.{kind}" for kind in ("png", "svg")])
