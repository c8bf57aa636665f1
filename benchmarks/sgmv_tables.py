"""The smaller SGMV tables: with the base products in one graph, over `max_loras`, over ranks, and over tilings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from backend.linears import linear_with_lora
from backend.sgmv import Segments, cuda_kernels, tilings
from benchmarks.sgmv_cells import LINEARS, Cell, Workbench, grid, time_graph

CHAIN = 24
"""Base products (and LoRA parts) in one graph of the table with base products."""

Rows = list[dict[str, Any]]


def _base_weights(layer: str) -> list[torch.Tensor]:
    width, outs = LINEARS[layer]
    count = max(2, math.ceil(200e6 / (2 * width * sum(outs))))
    return [torch.randn(sum(outs), width, dtype=torch.bfloat16, device="cuda") * width**-0.5 for _ in range(count)]


def base_gemm_us(layer: str, rows: int) -> float:
    """The base product alone, by cuBLAS, weights cold."""
    width, outs = LINEARS[layer]
    weights = _base_weights(layer)
    x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
    y = torch.empty(rows, sum(outs), dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        for i in range(CHAIN):
            torch.mm(x, weights[i % len(weights)].T, out=y)

    return time_graph(run, CHAIN)[0]


def _with_base(cell: Cell) -> dict[str, Any]:
    bench, weights = Workbench(cell), _base_weights(cell.layer)
    out = torch.empty_like(bench.y)

    def chain(*, lora: bool) -> None:
        for i in range(CHAIN):
            linear, segments = bench.calls[i % len(bench.calls)]
            linear_with_lora(
                bench.x, weights[i % len(weights)], out, None, bench.bank, linear,
                segments if lora else None, kernels=True,
            )  # fmt: skip

    def cublas(*, then_pass: bool = False) -> None:
        for i in range(CHAIN):
            torch.mm(bench.x, weights[i % len(weights)].T, out=out)
            if then_pass:
                out.add_(1)

    whole, own = time_graph(lambda: chain(lora=True), CHAIN)[0], time_graph(lambda: chain(lora=False), CHAIN)[0]
    base = time_graph(cublas, CHAIN)[0]
    passed = time_graph(lambda: cublas(then_pass=True), CHAIN)[0]
    return {
        "layer_us": whole,
        "base_us": base,
        "extra_us": whole - base,
        "own_base_us": own,
        "pass_us": passed - base,
    }


def _keys(cell: Cell) -> dict[str, Any]:
    return {
        "impl": "ours",
        "layer": cell.layer,
        "T": cell.rows,
        "distribution": cell.distribution,
        "n_adapters": cell.adapters,
        "rank": cell.rank,
    }


def layer_with_base() -> Rows:
    """Base product and LoRA in one graph.

    `base_us`: cuBLAS alone; `own_base_us`: the base product that ours runs; `pass_us`: what torch's `y.add_(1)` adds
    behind each cuBLAS product, the least that any launch which reads and writes all of y can add.
    """
    cells = [c for c in grid((16,)) if c.rows <= 256 and c.distribution != "skewed"]
    return [_keys(cell) | _with_base(cell) for cell in cells]


def over_max_loras() -> Rows:
    """One adapter in use out of 1 to 256 slots: the same 64 weight sets of slot 0 each time."""
    rows: Rows = []
    for layer in LINEARS:
        for count in (1, 32, 256, 2048):
            cell = Cell(layer, count, "identical" if count < 512 else "seg1", 1, 16)
            for slots in (1, 8, 32, 128, 256):
                bench = Workbench(cell, slots=slots, sets=64)
                median, least = time_graph(bench.run_all, len(bench.calls), 25)
                rows.append(_keys(cell) | {"max_loras": slots, "median_us": median, "min_us": least})
    return rows


def over_ranks() -> Rows:
    """Ranks mixed in one batch at their true rank, against the same adapters padded to the largest."""
    rows: Rows = []
    for layer in LINEARS:
        for count, adapters, mix in ((32, 32, "distinct"), (256, 16, "uniform"), (2048, 16, "seg16")):
            for name, cycle in (("8", [8]), ("8,16,32,64", [8, 16, 32, 64]), ("64", [64])):
                ranks = [cycle[i % len(cycle)] for i in range(adapters)]
                cell = Cell(layer, count, mix, adapters, sum(ranks) // adapters)
                median, least = time_graph(
                    (bench := Workbench(cell, slots=adapters, ranks=ranks)).run_all, len(bench.calls)
                )
                floor = cell.floor_us()
                rows.append(_keys(cell) | {"ranks": name, "median_us": median, "min_us": least, "floor_us": floor})
    return rows


def over_tilings() -> Rows:
    """Shrink and expand by each tiling that can take a batch: what `backend.sgmv.tilings` was written from."""
    rows: Rows = []
    names = {"few": tilings.FEW, "many": tilings.MANY, "long": tilings.LONG}
    cells = [c for c in grid((16, 64)) if c.distribution in ("identical", "uniform", "distinct", "seg4")]
    for cell in cells:
        bench = Workbench(cell)
        width, outs = LINEARS[cell.layer]
        picks = {
            "shrink": tilings.for_shrink(cell.rows, cell.rank, len(outs), width),
            "expand": tilings.for_expand(cell.rows, cell.rank, sum(outs)),
        }
        for name, tiling in names.items():
            if (cell.rows > 512 and tiling.tile_rows == 8) or (cell.rows < 256 and tiling.tile_rows == 64):
                continue
            for part, pick in picks.items():
                run, calls = _part(bench, part, tiling)
                median, least = time_graph(run, calls, 5)
                timed = {"part": part, "tiling": name, "chosen": pick == tiling}
                rows.append(_keys(cell) | timed | {"median_us": median, "min_us": least})
    return rows


def _part(bench: Workbench, part: str, tiling: tilings.Tiling) -> tuple[Callable[[], None], int]:
    """All calls of shrink or of expand alone, and how many they are."""
    cut = [Segments.allocate(bench.cell.rows, bench.bank).of(s, bench.bank, (tiling,)) for s in bench.row_slots]
    calls = list(itertools.product(bench.linears, cut))

    def run() -> None:
        for linear, segments in calls:
            if part == "shrink":
                cuda_kernels.shrink(bench.x, bench.bank, linear, segments, tiling)
            else:
                cuda_kernels.expand(bench.y, bench.bank, linear, segments, tiling)

    return run, len(calls)
