"""`multilora curve`: cost curves from profiles, from measured parts, or measured here and now."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim import run_dir
from sim.errors import ScenarioError
from sim.flags import whole

if TYPE_CHECKING:
    import pandas as pd

BATCHES, RANKS = (32, 128), (16,)
SPREAD = "adapters evenly spread"


def add_verb(verbs: Any) -> None:
    """The flags of `curve`."""
    curve = verbs.add_parser("curve", help="what a decode step and a million tokens cost with N adapters in the batch")
    source = curve.add_argument_group("whose costs (several may be given)")
    source.add_argument("--profile", nargs="+", default=[], help="shipped profiles or profile folders")
    source.add_argument(
        "--points", nargs="+", default=[], help="tables that --live wrote, or shipped profiles that have one"
    )
    source.add_argument("--live", action="store_true", help="measure steps, their parts and the naive loop here")
    source.add_argument("--backend", choices=("cuda", "cpu"), default="cuda", help="where --live measures")
    source.add_argument("--geometry", help="of what model: a shipped geometry or a Hugging Face config.json")
    curve.add_argument("--batch", type=whole, nargs="+", help="requests in the batch (default 32 128)")
    curve.add_argument("--rank", type=whole, nargs="+", help="rank of the adapters (default 16)")
    curve.add_argument("--context", type=whole, default=512, help="keys per request (default 512)")
    curve.add_argument("--max-lora-rank", type=whole, help="show also the step with every adapter padded to this rank")
    curve.add_argument("--gpu-hour-usd", type=float, help="price of a GPU hour, for USD instead of GPU seconds")
    curve.add_argument("--bandwidth-gb-s", type=float, help="memory bandwidth as measured, for a profile's byte floor")
    curve.add_argument("--out", type=Path, help="the directory to make (default: a new one under runs/)")


def run(args: argparse.Namespace) -> None:
    """Measure or look up, draw, print. Raises `ScenarioError` or `BackendError`; then nothing is left."""
    import pandas as pd

    from sim.curve import break_even, described

    out = run_dir.choose("curve", args.out)
    _check(args)
    notes: list[str] = []
    measured = None
    tables = [_profiles(args, notes)] if args.profile else []
    tables += [_points(args, name, notes) for name in args.points]
    if args.live:
        from sim.curve_points import describe, points_curve

        measured = _live(args)
        tables.append(points_curve(measured, f"live, {args.backend}", gpu_hour_usd=args.gpu_hour_usd))
        notes.append(describe(measured))
    table = pd.concat(tables, ignore_index=True)
    points = _measured_points(args)
    _publish(out, table, points, "; ".join(notes), measured)
    shown = table.drop(columns=["context"]).dropna(axis=1, how="all")
    print(shown.to_string(index=False, na_rep="–", float_format=lambda v: f"{v:.3g}" if v < 100 else f"{v:.0f}"))
    for _, group in table.groupby(["profile", "batch", "rank"], sort=False):
        name, batch, rank = (group[column].iloc[0] for column in ("profile", "batch", "rank"))
        said = described(group, points.get((name, batch, rank)))
        print(f"{name}, {batch} requests, rank {rank}: {said}{', ' if said else ''}{break_even(group)}")
    print(out)


def _check(args: argparse.Namespace) -> None:
    if not (args.profile or args.points or args.live):
        raise ScenarioError("curve: whose costs? Give --profile, --points, or --live with --geometry")
    if args.live and args.geometry is None:
        raise ScenarioError("--live needs --geometry: the model whose steps are to be measured")
    for flag in ("gpu_hour_usd", "bandwidth_gb_s"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < float("inf"):
            raise ScenarioError(f"--{flag.replace('_', '-')} is {value}, must be finite and > 0")


def _profiles(args: argparse.Namespace, notes: list[str]) -> pd.DataFrame:
    from backend.profile import load_profile
    from sim.curve import curve

    table = curve(
        args.profile,
        args.batch or BATCHES,
        args.rank or RANKS,
        context=args.context,
        max_lora_rank=args.max_lora_rank,
        gpu_hour_usd=args.gpu_hour_usd,
        bandwidth_gb_s=args.bandwidth_gb_s,
    )
    notes += [f"{name} MAPE {load_profile(name).accuracy['mape']:.1%}" for name in args.profile]
    return table


def _points(args: argparse.Namespace, name: str, notes: list[str]) -> pd.DataFrame:
    from sim.curve_points import chosen, describe, load_points, points_curve

    points = load_points(name)
    notes.append(f"{Path(name).name}: {describe(points)}")
    return chosen(points_curve(points, Path(name).name, gpu_hour_usd=args.gpu_hour_usd), args.batch, args.rank)


def _live(args: argparse.Namespace) -> pd.DataFrame:
    from backend.geometry import load_geometry
    from backend.parts import measure_points
    from sim.curve import DEFAULT_ADAPTERS, check_curve

    batches, ranks = args.batch or BATCHES, args.rank or RANKS
    check_curve(batches, ranks, args.context, args.max_lora_rank)
    return measure_points(
        load_geometry(args.geometry),
        args.backend,
        batches,
        ranks,
        DEFAULT_ADAPTERS,
        context=args.context,
        max_lora_rank=args.max_lora_rank,
    )


def _measured_points(args: argparse.Namespace) -> dict[tuple[str, int, int], pd.DataFrame]:
    """The profiles' own measurements by (profile, batch, rank)."""
    from sim.curve import measured_points

    keys = [(name, b, r) for name in args.profile for b in args.batch or BATCHES for r in args.rank or RANKS]
    return {key: measured_points(*key, args.context) for key in keys}


def _publish(
    out: Path,
    table: pd.DataFrame,
    points: dict[tuple[str, int, int], pd.DataFrame],
    note: str,
    measured: pd.DataFrame | None,
) -> None:
    from sim.curve_plots import curve_figure

    contexts = "/".join(str(c) for c in sorted(table["context"].unique()))

    def fill(folder: Path) -> None:
        table.to_parquet(folder / "curve.parquet", index=False)
        if measured is not None:
            measured.to_parquet(folder / "points.parquet", index=False)
        for suffix in ("png", "svg"):
            curve_figure(
                table, points, f"decode, {contexts} keys a request, {SPREAD}; {note}", folder / f"curve.{suffix}"
            )

    run_dir.publish(out, fill)
