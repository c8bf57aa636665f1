"""SGMV on this GPU over the peers' grid: `python -m benchmarks.sgmv --out FILE.csv [--peers DIR]`.

Writes FILE.csv (microseconds of one fused linear's LoRA part, alone), FILE_layer.csv (with the base products in one
graph), FILE_max_loras.csv, FILE_ranks.csv, FILE_errors.csv (error beside that of the exact result rounded once), FILE.json (GPU,
versions, date) and FILE.png (time over floor). `--peers DIR` prints the comparison with `kernels.csv` and `layer_with_base.csv` of that folder; with `--only compare` nothing is
measured. `--only tune` writes FILE_tilings.csv. `--cell LAYER,T,DISTRIBUTION,ADAPTERS,RANK` (repeatable) only runs that cell
once and prints its error: something for a profiler or compute-sanitizer to look at.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from backend.errors import BackendError
from benchmarks import sgmv_plot
from benchmarks.outputs import csv_file

if TYPE_CHECKING:
    import torch

    from benchmarks.sgmv_cells import Cell, Workbench

COLUMNS = "impl,layer,T,distribution,n_adapters,rank,median_us,min_us,floor_us,base_gemm_us,rel_err".split(",")
KEYS = ["layer", "T", "distribution", "n_adapters", "rank"]
PARTS = ("grid", "layer", "max_loras", "ranks", "errors", "tune", "compare")


def measure_grid() -> pd.DataFrame:
    from benchmarks.sgmv_cells import Workbench, grid, time_graph
    from benchmarks.sgmv_tables import base_gemm_us

    rows, base = [], {}
    for cell in grid():
        if (cell.layer, cell.rows) not in base:
            base[cell.layer, cell.rows] = base_gemm_us(cell.layer, cell.rows)
        bench = Workbench(cell)
        error, _ = bench.errors()
        median, least = time_graph(bench.run_all, len(bench.calls))
        values = (median, least, cell.floor_us(), base[cell.layer, cell.rows], error)
        rows.append(("ours", cell.layer, cell.rows, cell.distribution, cell.adapters, cell.rank, *values))
    return pd.DataFrame(rows, columns=COLUMNS)


def measure_errors() -> pd.DataFrame:
    from benchmarks.sgmv_cells import Workbench, grid

    rows = []
    for cell in grid():
        keys = ("ours", cell.layer, cell.rows, cell.distribution, cell.adapters, cell.rank)
        rows.append((*keys, *Workbench(cell, sets=1).errors()))
    return pd.DataFrame(rows, columns=["impl", *KEYS, "rel_err", "rounding_err"])


def describe() -> dict[str, Any]:
    from backend.measure import describe_device

    return describe_device("cuda")


def _sums(table: pd.DataFrame, column: str) -> pd.Series[float]:
    return table.groupby(["T", "distribution", "n_adapters", "rank"], sort=False)[column].sum()


def compare(ours: pd.DataFrame, peers: Path) -> None:
    """Print best peer over ours, cell by cell and as a geometric mean."""
    table = pd.read_csv(peers / "kernels.csv")
    table = table[table["impl"] != "base_gemm"]
    best = table.groupby(KEYS)["median_us"].min().rename("best_peer_us")
    error = table.groupby(KEYS)["rel_err"].min().rename("peer_rel_err")
    both = ours.set_index(KEYS).join(best, how="inner").join(error)
    ratio = both["best_peer_us"] / both["median_us"]
    print(
        f"cells: {len(both)}; best peer / ours: geometric mean {np.exp(np.log(ratio).mean()):.3f}, least {ratio.min():.3f}"
    )
    print(
        f"cells below 0.95: {(ratio < 0.95).sum()}; ours / floor: geometric mean "
        f"{np.exp(np.log(both['median_us'] / both['floor_us']).mean()):.3f}"
    )
    worse = both["rel_err"] > both["peer_rel_err"]
    print(
        f"relative error: ours at most {both['rel_err'].max():.2e}, above the best peer's in {worse.sum()} cells, "
        f"geometric mean of ours / best peer's {np.exp(np.log(both['rel_err'] / both['peer_rel_err']).mean()):.3f}"
    )
    slow = both.assign(ratio=ratio)[ratio < 1.0].sort_values("ratio")
    if len(slow):
        print(slow[["median_us", "floor_us", "best_peer_us", "ratio"]].round(3).to_string())
    layer = both[both.index.get_level_values("rank") == 16].reset_index()
    sums = pd.DataFrame({c: _sums(layer, c) for c in ("floor_us", "best_peer_us", "median_us")})
    sums["over_floor"] = sums["median_us"] / sums["floor_us"]
    print("four linears of a layer, rank 16, us:")
    print(sums.round(2).to_string())


def compare_layer(ours: pd.DataFrame, peers: Path) -> None:
    """Print what LoRA adds to the base products in one graph, beside 0.75 times the best peer's; where it is more, also what
    reading the adapters takes, and what a launch behind the base product that only reads and writes y.
    """
    from benchmarks.sgmv_cells import Cell

    best = pd.read_csv(peers / "layer_with_base.csv").groupby(KEYS)["extra_us"].min().rename("best_peer_extra_us")
    both = ours.set_index(KEYS).join(best, how="inner").reset_index()
    both["bar_us"] = 0.75 * both["best_peer_extra_us"]
    both["own_extra_us"] = both["layer_us"] - both["own_base_us"]
    over = both[both["extra_us"] > both["bar_us"]]
    columns = ["layer_us", "base_us", "own_base_us", "extra_us", "own_extra_us", "best_peer_extra_us"]
    print(pd.DataFrame({c: _sums(both, c) for c in columns}).round(2).to_string())
    print(f"rows above 0.75 x the best peer's: {len(over)} of {len(both)}")
    if len(over):
        read = [Cell(*cell).read_us() for cell in over[KEYS].itertuples(index=False)]
        shown = over.assign(read_us=read)[[*KEYS, "extra_us", "bar_us", "read_us", "pass_us"]]
        print(shown.round(2).to_string(index=False))


def show_ranks(ours: pd.DataFrame) -> None:
    """Print ranks mixed in one batch beside one rank for all, four linears of a layer."""
    print(
        ours.groupby(["T", "distribution", "ranks"], sort=False)[["median_us", "floor_us"]].sum().round(2).to_string()
    )


def show_errors(ours: pd.DataFrame) -> None:
    """Print how far the error is above the least that the type of y permits."""
    ratio = ours["rel_err"] / ours["rounding_err"]
    print(f"relative error / that of the exact result rounded once: at most {ratio.max():.6f} in {len(ours)} cells")


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise BackendError("benchmarks.sgmv: torch sees no CUDA device here")


def measure(parts: list[str], out: Path) -> None:
    from benchmarks import sgmv_tables

    _need_gpu()
    out.parent.mkdir(parents=True, exist_ok=True)
    tables = {
        "grid": (out, measure_grid),
        "layer": (out.with_name(f"{out.stem}_layer.csv"), lambda: pd.DataFrame(sgmv_tables.layer_with_base())),
        "max_loras": (out.with_name(f"{out.stem}_max_loras.csv"), lambda: pd.DataFrame(sgmv_tables.over_max_loras())),
        "ranks": (out.with_name(f"{out.stem}_ranks.csv"), lambda: pd.DataFrame(sgmv_tables.over_ranks())),
        "errors": (out.with_name(f"{out.stem}_errors.csv"), measure_errors),
        "tune": (out.with_name(f"{out.stem}_tilings.csv"), lambda: pd.DataFrame(sgmv_tables.over_tilings())),
    }
    for part in parts:
        path, run = tables[part]
        run().to_csv(path, index=False, float_format="%.8g")
        print(f"{part}: {path}")
    out.with_suffix(".json").write_text(json.dumps(describe(), indent=1) + "\n")


def _feed_forward(bench: Workbench, weight: torch.Tensor) -> torch.Tensor:
    """Gate and up of the bench's cell with SwiGLU, then down, as a decoder's layer has them."""
    import torch

    from backend import ops_triton
    from backend.geometry import load_geometry
    from backend.linears import gated_with_lora, linear_with_lora
    from backend.sgmv import Segments, SlotBank, SlotLayout

    cell, x = bench.cell, bench.x
    layout = SlotLayout.of(load_geometry("llama-3.1-8b").linears(), 1)
    bank = SlotBank(layout, cell.adapters, cell.rank, dtype=x.dtype, device=x.device)
    bank.ranks.fill_(cell.rank)
    bank.weights.normal_(0, 0.02)
    segments = Segments.allocate(cell.rows, bank).of(bench.row_slots[0], bank)
    gate_up, down = layout.layers[0]["gate_up"], layout.layers[0]["down"]
    activated = x.new_zeros(cell.rows, down.in_features)
    shrunk = gated_with_lora(
        x, weight, torch.zeros_like(bench.y), activated, bank, gate_up, segments, ops_triton, kernels=True, after=down
    )
    down_weight = torch.randn(down.out_features[0], down.in_features, dtype=x.dtype, device=x.device)
    out = x.new_zeros(cell.rows, down.out_features[0])
    linear_with_lora(activated, down_weight, out, None, bank, down, segments, kernels=True, shrunk=shrunk)
    return out


def cell_of(text: str) -> Cell:
    """`--cell LAYER,T,DISTRIBUTION,ADAPTERS,RANK`. Raises `BackendError` if it is none."""
    from benchmarks.sgmv_cells import DISTRIBUTIONS, LINEARS, Cell

    try:
        layer, rows, distribution, adapters, rank = text.split(",")
        cell = Cell(layer, int(rows), distribution, int(adapters), int(rank))
    except ValueError as error:
        raise BackendError(
            f"--cell {text}: must be LAYER,T,DISTRIBUTION,ADAPTERS,RANK as in the CSV ({error})"
        ) from error
    if layer not in LINEARS:
        raise BackendError(f"--cell {text}: LAYER must be one of {', '.join(LINEARS)}")
    if distribution not in (*DISTRIBUTIONS, f"seg{adapters}"):
        raise BackendError(f"--cell {text}: DISTRIBUTION must be one of {', '.join(DISTRIBUTIONS)} or seg{adapters}")
    needed = {"distinct": cell.rows, "identical": 1}.get(distribution, cell.adapters)
    if min(cell.rows, cell.adapters, cell.rank) < 1 or cell.adapters > cell.rows:
        raise BackendError(f"--cell {text}: T, ADAPTERS and RANK must be at least 1, and ADAPTERS at most T")
    if cell.adapters != needed:
        raise BackendError(f"--cell {text}: ADAPTERS must be {needed} where rows are {distribution}")
    return cell


def run_once(text: str) -> None:
    """Run one cell's kernels once: its LoRA part alone, with the base product, and gate and up with SwiGLU and down behind them."""
    import torch

    from backend.linears import linear_with_lora
    from benchmarks.sgmv_cells import Workbench

    cell = cell_of(text)
    _need_gpu()
    bench = Workbench(cell, sets=1)
    linear, segments = bench.calls[0]
    weight = torch.randn(sum(linear.out_features), linear.in_features, dtype=torch.bfloat16, device="cuda")
    out = torch.zeros_like(bench.y)
    linear_with_lora(bench.x, weight, out, None, bench.bank, linear, segments, kernels=True)
    finite = bool(out.isfinite().all())
    if cell.layer == "gate_up":
        finite &= bool(_feed_forward(bench, weight).isfinite().all())
    torch.cuda.synchronize()
    print(f"{text}: relative error {bench.errors()[0]:.2e}, finite {finite}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sgmv", description=__doc__)
    parser.add_argument("--cell", action="append", help="run this cell once, measure nothing")
    parser.add_argument(
        "--out", type=csv_file, default=Path("sgmv.csv"), help="the CSV file to write; others lie beside it"
    )
    parser.add_argument("--peers", type=Path, help="folder with the peers' kernels.csv and layer_with_base.csv")
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="measure this part (repeatable); default: all but tune"
    )
    args = parser.parse_args(argv)
    parts = [p for p in (args.only or [p for p in PARTS if p != "tune"]) if p != "compare"]
    try:
        for cell in args.cell or []:
            run_once(cell)
        if args.cell:
            return 0
        if parts:
            measure(parts, args.out)
        if args.peers and args.out.is_file():
            compare(pd.read_csv(args.out), args.peers)
        layer = args.out.with_name(f"{args.out.stem}_layer.csv")
        if args.peers and layer.is_file():
            compare_layer(pd.read_csv(layer), args.peers)
        ranks = args.out.with_name(f"{args.out.stem}_ranks.csv")
        if ranks.is_file():
            show_ranks(pd.read_csv(ranks))
        errors = args.out.with_name(f"{args.out.stem}_errors.csv")
        if errors.is_file():
            show_errors(pd.read_csv(errors))
        if args.out.is_file():
            sgmv_plot.draw(pd.read_csv(args.out), args.peers, args.out.with_suffix(".png"))
    except (BackendError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
