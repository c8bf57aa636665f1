"""`python -m benchmarks.slot_tiles --data DIR [--geometry NAME]`: what a slot costs in vLLM's LoRA kernels for 64 rows of a step.

DIR has `max_loras_sweep.csv`: kernels of one linear with one adapter in use, by `max_loras` and rows. Their grid has blocks for every
slot and all rows. What a block takes that finds nothing to do follows from how the time grows with `max_loras`; a model's
linears have known numbers of blocks. The sum is `--slot-tile-us` of `multilora measure --from-steps`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from backend.csv_tables import read_csv
from backend.errors import BackendError
from backend.geometry import ModelGeometry, load_geometry
from backend.predictor import GRID_ROWS

MANY_SLOTS = 16
"""Below, blocks without work hide beside those with some."""


def blocks(geometry: ModelGeometry) -> dict[str, int]:
    """Blocks of the expand kernel for a slot and 64 rows, by linear: 64 columns wide where several outputs share it, else 128."""
    shapes = geometry.linears()
    query, up = shapes["q_proj"][1], shapes["up_proj"][1]
    single = {name: shapes[f"{name}_proj"][1] // 128 for name in ("o", "down")}
    return {"qkv": 3 * query // 64, "gate_up": 2 * up // 64, **single}


def seconds_per_block(table: pd.DataFrame, count: dict[str, int]) -> float:
    """Least relative error of time = so much a layer and rows + so much a block, over sweeps of `MANY_SLOTS` and more."""
    rows = table[(table["impl"] == "vllm") & (table["n_adapters"] == 1) & (table["max_loras"] >= MANY_SLOTS)]
    slopes = []
    for (layer, tokens), part in rows.groupby(["layer", "T"]):
        slope = np.polyfit(part["max_loras"], part["median_us"], 1)[0]
        slopes.append(slope / 1e6 / (count[str(layer)] * np.ceil(int(str(tokens)) / GRID_ROWS)))
    return float(np.median(slopes))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slot_tiles", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--geometry", default="llama-3.1-8b")
    args = parser.parse_args(argv)
    try:
        geometry, table = load_geometry(args.geometry), read_csv(args.data / "max_loras_sweep.csv")
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = blocks(geometry)
    block_s = seconds_per_block(table, count)
    whole_s = block_s * sum(count.values()) * geometry.num_layers
    print(f"{block_s * 1e9:.2f} ns a block, {whole_s * 1e6:.1f} us a slot and {GRID_ROWS} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
