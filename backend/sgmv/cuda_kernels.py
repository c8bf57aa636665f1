"""Launching the CUDA kernels of SGMV: grids, and what each may overlap with."""

from __future__ import annotations

import ctypes

import torch

from backend.sgmv.arguments import columns, expand_args, shrink_args
from backend.sgmv.nvrtc import Kernels, kernels
from backend.sgmv.segments import PIECE, Segments, padded_rank
from backend.sgmv.slots import FusedLinear, SlotBank
from backend.sgmv.tilings import LONG, Tiling, for_expand, for_shrink

SETTLED_PIECES = 4
"""With more pieces than this, long segments have their partials added up by a launch of its own."""

RESIDENT_BLOCKS = {
    "shrink_short_1": 3,
    "shrink_short_2": 2,
    "shrink_long_4": 3,
    "shrink_long_2": 3,
    "expand_short_1": 4,
    "expand_short_1_ringed": 3,
    "expand_short_2": 3,
    "expand_long": 2,
    "expand_long_swiglu": 2,
}
"""Blocks a multiprocessor holds at a time (`__launch_bounds__` in the sources): grids are no larger."""


def _grid(items: int, name: str, run: Kernels) -> int:
    """Blocks for at most `items` items; counted from rows alone, never from `max_loras`."""
    return min(items, run.processors * RESIDENT_BLOCKS[name])


FILL = 1.5
"""Blocks a multiprocessor should get of long segments, where taking smaller shares of the work allows it."""

PROLOGUE = 1.5
"""What a block of `expand_long` does before its first 128 columns, in the time of so many times 128 columns."""

SWIGLU_FROM = 512
"""Rows from which the expand of gate and up applies SwiGLU: where segments are cut into tiles of 64 rows."""

RINGED_COLUMNS = 8192
"""Up to as many columns of few pieces, B of ranks above 16 goes by way of a ring in shared memory."""


def _shrink_blocks(tiles: int, height: int, pieces: int, run: Kernels) -> int:
    """Blocks of 16 rows of A that a block of `shrink_long_*` takes: fewer where there would be too few items."""
    return 4 if tiles * pieces * -(-height // 64) >= FILL * run.processors else 2


def _long_run(tiles: int, widths: tuple[int, ...], run: Kernels) -> int:
    """Blocks of 128 columns that a block of `expand_long` walks: so many that the last of its rounds is full, or nearly."""
    blocks = run.processors * RESIDENT_BLOCKS["expand_long"]

    def rounds(walk: int) -> float:
        return -(-tiles * sum(columns(widths, walk * 128)[2]) // blocks) * (walk + PROLOGUE)

    return min((16, 8, 4, 2), key=rounds)


def shrink(
    x: torch.Tensor,
    bank: SlotBank,
    linear: FusedLinear,
    segments: Segments,
    tiling: Tiling | None = None,
    *,
    late: bool = True,
) -> None:
    """Partial rank vectors of every adapted row of `x` [T, in] into `segments.partials`; `tiling` None: the fastest.

    `late`: the next kernel begins when the previous one has ended, as `expand` must, which reads `out` at once.
    """
    rows, height = len(segments.rows), linear.slices * bank.max_lora_rank
    tiling = tiling or for_shrink(rows, bank.max_lora_rank, linear.slices, linear.in_features)
    run, name, cut = kernels(x.dtype), tiling.shrink, segments.cut(tiling)
    long = tiling == LONG
    pieces = -(-linear.in_features // PIECE)
    blocks = -(-height // 16)
    if long:
        each = _shrink_blocks(-(-rows // 64), height, pieces, run)
        name, blocks = f"{name}_{each}", -(-blocks // each)
    args = shrink_args(x, bank, linear, segments, cut, late=late)
    shared = 3 * 64 * (128 + 32) * 2 if long else 0
    run.launch(
        name, _grid(rows * pieces * blocks, name, run), 128 if long else 256, (args,), shared, early=segments.begin()
    )


def _settle(run: Kernels, segments: Segments, pieces: int, cells: int) -> None:
    values = (ctypes.c_void_p(segments.partials.data_ptr()), ctypes.c_int(pieces), ctypes.c_int(cells))
    run.launch("settle", -(-cells // 1024), 256, values, early=True)


def expand(
    out: torch.Tensor, bank: SlotBank, linear: FusedLinear, segments: Segments, tiling: Tiling | None = None
) -> None:
    """Add `scaling * B h` of every adapted row to `out` [T, sum of out_features]; `tiling`: see `shrink`, which it follows."""
    rows, rank = len(segments.rows), padded_rank(bank.max_lora_rank)
    tiling = tiling or for_expand(rows, bank.max_lora_rank, sum(linear.out_features))
    run, name, cut = kernels(out.dtype), tiling.expand, segments.cut(tiling)
    long = tiling == LONG
    pieces = -(-linear.in_features // PIECE)
    if long and pieces > SETTLED_PIECES:
        _settle(run, segments, pieces, rows * linear.slices * rank)
        pieces = 1
    # The short kernels take 512 columns a group.
    long_run = _long_run(-(-rows // 64), linear.out_features, run) if long else 4
    widths, _, groups = columns(linear.out_features, 128 * long_run)
    if name == "expand_short_1" and rank > 16 and pieces <= SETTLED_PIECES and sum(widths) <= RINGED_COLUMNS:
        name = "expand_short_1_ringed"
    args = expand_args(out, bank, linear, segments, cut, groups=groups, pieces=pieces, long_run=long_run)
    row_bytes, eights = (128 + 8) * 2, 2 if tiling.tile_rows > 8 else 1
    shared = (4 if long else 2) * rank // 16 * eights * 512
    if long:
        shared += 2 * rank * row_bytes
    elif name.endswith("ringed"):
        shared += 4 * 3 * 16 * row_bytes
    run.launch(name, _grid(rows * sum(groups), name, run), 128, (args,), shared, early=True)


def takes_swiglu(linear: FusedLinear, segments: Segments) -> bool:
    """Whether `expand_swiglu` serves `linear` on this batch: gate and up of one width, and more than a few rows."""
    widths, pieces, rows = linear.out_features, -(-linear.in_features // PIECE), len(segments.rows)
    apart = rows < SWIGLU_FROM or segments.cuts[-1].tiling != LONG
    return not apart and len(widths) == 2 and len(set(widths)) == 1 and pieces <= SETTLED_PIECES


def expand_swiglu(
    gate_up: torch.Tensor, activated: torch.Tensor, bank: SlotBank, linear: FusedLinear, segments: Segments
) -> None:
    """`activated[t] = silu(gate) * up`, with `scaling * B h` of adapted rows added to both; follows `shrink`.

    `gate_up` [T, 2 w] is read and not written, `activated` [T, w]. Saves writing and reading `gate_up` once more. The bits
    are those of `expand` and then `ops_triton.silu_mul`.
    """
    run, name = kernels(gate_up.dtype), "expand_long_swiglu"
    rows, rank, one = len(segments.rows), padded_rank(bank.max_lora_rank), linear.out_features[:1]
    long_run = _long_run(-(-rows // 64), one, run)
    groups = columns(one, 128 * long_run)[2]
    args = expand_args(
        gate_up, bank, linear, segments, segments.cut(LONG), groups=groups, pieces=-(-linear.in_features // PIECE),
        long_run=long_run, activated=activated,
    )  # fmt: skip
    shared = 4 * 2 * rank // 16 * 2 * 512 + 2 * rank * (128 + 8) * 2
    run.launch(name, _grid(rows * sum(groups), name, run), 128, (args,), shared, early=True)
