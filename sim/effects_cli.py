"""`multilora effects` on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from backend.geometry import load_geometry
from backend.profile import load_profile
from sim import run_dir
from sim.deployment import Deployment
from sim.effects import KINDS, Effect, effects, of_rank
from sim.errors import ScenarioError
from sim.flags import whole
from sim.plan_cli import check_counts, with_duration
from sim.plan_grid import vllm_rank
from sim.scenario import load_scenario
from sim.traffic import traffic_of


def add_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The verb `effects`."""
    verb = verbs.add_parser("effects", help="one change at a time on the same requests: loads, base requests, ranks")
    verb.add_argument("scenario", help="a TOML file, or a shipped scenario")
    verb.add_argument("--of", choices=tuple(KINDS), required=True, help="what is changed")
    verb.add_argument("--max-loras", type=whole, help="instead of engine.max_loras")
    verb.add_argument("--base-share", type=float, default=0.0, help="share of the requests to send to the base model")
    verb.add_argument("--rank", type=whole, help="of every adapter, instead of the scenario's ranks")
    verb.add_argument("--profile", help="a shipped profile or a profile folder, instead of the scenario's")
    verb.add_argument("--seeds", type=whole, default=3, help="seeds that are counted together (default 3)")
    verb.add_argument("--duration-s", type=float, help="seconds of arrivals, instead of the scenario's")
    verb.add_argument("--out", type=Path, help="the directory to make (default: a new one under runs/)")


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    scenario = with_duration(load_scenario(args.scenario), args.duration_s)
    check_counts({"--seeds": [args.seeds], "--max-loras": [] if args.max_loras is None else [args.max_loras]}, 1)
    if not 0 <= args.base_share <= 1:
        raise ScenarioError(f"--base-share is {args.base_share}, must be from 0 to 1")
    profile = args.profile or scenario.profile
    if profile is None:
        raise ScenarioError("effects needs a profile: --profile or backend.profile")
    traffic = tuple(traffic_of(scenario, scenario.seed + i) for i in range(args.seeds))
    if args.rank is not None:
        traffic = tuple(replace(t, catalogue=of_rank(t.catalogue, args.rank)) for t in traffic)
    slots = args.max_loras or scenario.engine.max_loras
    host = scenario.engine.max_cpu_loras
    engine = replace(
        scenario.engine, max_loras=slots, max_cpu_loras=None if host is None else max(host, slots),
        max_lora_rank=max(scenario.engine.max_lora_rank, vllm_rank(traffic[0].catalogue)),
    )  # fmt: skip
    deployment = Deployment(scenario.geometry, profile, engine, replace(scenario.fleet, events=()))
    out = run_dir.choose(f"effects-{args.of}-{scenario.name}", args.out)
    rows = list(effects(KINDS[args.of](deployment, traffic, args.base_share)))
    lines = [*_costs(deployment, sorted({a.rank for a in traffic[0].catalogue})), *text(rows)]

    def fill(folder: Path) -> None:
        (folder / "effects.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        pd.DataFrame([asdict(row) for row in rows]).to_parquet(folder / "effects.parquet", index=False)

    run_dir.publish(out, fill)
    print("\n".join(lines))
    print(out)


def _costs(deployment: Deployment, ranks: list[int]) -> Iterator[str]:
    """What a cold start is made of, by rank."""
    profile, geometry = load_profile(deployment.profile), load_geometry(deployment.geometry)
    yield f"{deployment.replicas} x {deployment.profile}, max_loras {deployment.engine.max_loras}; profile MAPE {profile.accuracy['mape']:.1%}"
    for rank in ranks:
        nbytes = geometry.lora_bytes(rank)
        disk, slot = (1e3 * curve.seconds(nbytes) for curve in (profile.stage, profile.load))
        yield f"an adapter of rank {rank} ({nbytes / 1e6:.0f} MB): disk to host {disk:.2f} ms, host to slot {slot:.2f} ms"


def text(rows: list[Effect]) -> Iterator[str]:
    """The printed table."""
    wide = max(len(row.name) for row in rows) + 2
    head = (
        "requests",
        "TTFT mean",
        "TTFT p99",
        "TPOT mean",
        "disk loads",
        "slot loads",
        "load share",
        "KV blocks",
        "unmeasured",
    )
    yield f"{'latencies in ms':{wide}}" + "".join(f"{name:>12}" for name in head)
    for r in rows:
        yield (
            f"{r.name:{wide}}{r.requests:12}{r.mean_ttft_ms:12.1f}{r.p99_ttft_ms:12.1f}{r.mean_tpot_ms:12.2f}"
            f"{r.disk_loads:12}{r.slot_loads:12}{r.load_share:12.1%}{r.num_gpu_blocks:12}{r.extrapolated_share:12.1%}"
        )
