"""Launching the CUDA kernels of SGMV: grids, and what each may overlap with."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from backend.errors import BackendError
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
    "shrink_long_4": 2,
    "shrink_long_2": 2,
    "expand_short_1": 4,
    "expand_short_1_ringed": 3,
    "expand_short_2": 3,
    "expand_long": 2,
    "expand_long_swiglu": 2,
}
"""Blocks a multiprocessor holds at a time (`__launch_bounds__` in the sources): grids are no larger."""


FILL = 0.9
"""Blocks that a multiprocessor should get of the shrink of long segments, where taking smaller shares of A allows it."""

FETCH = 1.5
"""What a block of `expand_long` does for each tile of its share, rank vectors above all, in the time of so many times 128 columns."""

RUNS, WHOLE_PIECES = range(16, 0, -1), (16, 8)
"""Blocks of 128 columns that the blocks of `expand_long` may share out together; and those that end with a piece of the next shrink."""

DETOUR = 1.2
"""By how much sharing out whole pieces may be slower: a shrink of its own is less."""

SWIGLU_FROM = 512
"""Rows from which the expand of gate and up applies SwiGLU: where segments are cut into tiles of 64 rows."""

RINGED_COLUMNS = 8192
"""Up to as many columns of few pieces, B of ranks above 16 goes by way of a ring in shared memory."""

ROW_BYTES = 256
"""Of long segments in shared memory: a run of a row of x or A, or 128 columns of one of y or B."""

MOST_STAGES, FEWEST_STAGES = 8, 3
"""Stages of shared memory that a block fills ahead; so many at least, where fewer blocks on a multiprocessor allow it."""


def _grid(items: int, name: str, run: Kernels) -> int:
    """Blocks for at most `items` items; counted from rows alone, never from `max_loras`."""
    return min(items, run.processors * RESIDENT_BLOCKS[name])


def _stages(name: str, rows: int, other_bytes: int, resident: int, run: Kernels) -> tuple[int, int, int]:
    """Blocks a multiprocessor holds of a kernel for long segments, at most `resident`, with how many stages of `rows` rows each.

    And the bytes of shared memory that a block needs, with `other_bytes` beside its stages.
    """
    for blocks in range(resident, 0, -1):
        room = (run.rooms[name] + 1024) // blocks - 1024 - other_bytes  # a block takes 1 KB more than it asks for
        stages = min(MOST_STAGES, room // (rows * ROW_BYTES))
        if stages >= FEWEST_STAGES:
            break
    if stages < 2:
        raise BackendError(
            f"sgmv: {name} of such a max_lora_rank needs more shared memory than a block has on this GPU"
        )
    return blocks, stages, stages * rows * ROW_BYTES + other_bytes


def _shrink_blocks(tiles: int, height: int, pieces: int, run: Kernels) -> int:
    """Blocks of 16 rows of A that a block of `shrink_long_*` takes: fewer where there would be too few items."""
    return 4 if height > 32 and tiles * pieces * -(-height // 64) >= FILL * run.processors else 2


def _long_run(tiles: int, widths: tuple[int, ...], blocks: int, runs: Sequence[int]) -> tuple[int, float]:
    """Which of `runs`, blocks of 128 columns, the units are that `blocks` blocks of `expand_long` share out, and what that costs.

    So many that no block has parts of two tiles, if that makes no share much larger than another.
    """

    def cost(run: int) -> float:
        share = -(-tiles * sum(columns(widths, run * 128)[2]) // blocks)
        return share * run + FETCH * min(share, 2)

    best = min(runs, key=cost)
    return best, cost(best)


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
    if not long:
        args = shrink_args(x, bank, linear, segments, cut, late=late)
        run.launch(name, _grid(rows * pieces * blocks, name, run), 256, (args,), early=segments.begin())
        return
    tiles = -(-rows // 64)
    each = _shrink_blocks(tiles, height, pieces, run)
    name, items = f"{name}_{each}", tiles * pieces * -(-blocks // each)
    stage_rows = 64 + 16 * min(each, blocks)
    # Of a multiprocessor's memory no more where one block has it alone: what is left is for the first blocks of the expand.
    resident, stages, shared = _stages(name, stage_rows, 0, RESIDENT_BLOCKS[name], run)
    args = shrink_args(x, bank, linear, segments, cut, late=late, stages=stages, stage_rows=stage_rows)
    # There can be more tiles than those of 64 rows: each adapter adds one.
    most = min(-(-items // run.processors), resident)
    grid = min(rows * pieces * -(-blocks // each), run.processors * most)
    run.launch(name, grid, 256, (args,), shared, early=segments.begin())


def _settle(run: Kernels, segments: Segments, pieces: int, cells: int) -> None:
    values = (ctypes.c_void_p(segments.partials.data_ptr()), ctypes.c_int(pieces), ctypes.c_int(cells))
    run.launch("settle", -(-cells // 1024), 256, values, early=True)


def expand(
    out: torch.Tensor,
    bank: SlotBank,
    linear: FusedLinear,
    segments: Segments,
    tiling: Tiling | None = None,
    *,
    ahead: bool = False,
) -> None:
    """Add `scaling * B h` of every adapted row to `out` [T, sum of out_features]; `tiling`: see `shrink`, which it follows.

    `ahead`: it follows the base product instead, and `expand_swiglu` has shrunk.
    """
    rows, rank = len(segments.rows), padded_rank(bank.max_lora_rank)
    tiling = tiling or for_expand(rows, bank.max_lora_rank, sum(linear.out_features))
    if ahead or tiling == LONG:
        _expand_long(out, bank, linear, segments, ahead=ahead)
        return
    run, name, cut = kernels(out.dtype), tiling.expand, segments.cut(tiling)
    pieces = -(-linear.in_features // PIECE)
    widths, _, groups = columns(linear.out_features, 512)
    if name == "expand_short_1" and rank > 16 and pieces <= SETTLED_PIECES and sum(widths) <= RINGED_COLUMNS:
        name = "expand_short_1_ringed"
    ring = 4 * 3 * 16 * (128 + 8) * 2 if name.endswith("ringed") else 0
    shared = 2 * rank // 16 * (tiling.tile_rows // 8) * 512 + ring
    args = expand_args(out, bank, linear, segments, cut, groups=groups, pieces=pieces)
    run.launch(name, _grid(rows * sum(groups), name, run), 128, (args,), shared, early=True)


def _expand_long(
    out: torch.Tensor,
    bank: SlotBank,
    linear: FusedLinear,
    segments: Segments,
    activated: torch.Tensor | None = None,
    after: FusedLinear | None = None,
    *,
    ahead: bool = False,
) -> None:
    """`expand` of tiles of 64 rows; with `activated`, `expand_swiglu`."""
    run, paired = kernels(out.dtype), activated is not None
    name = "expand_long_swiglu" if paired else "expand_long"
    rows, rank, pieces = len(segments.rows), padded_rank(bank.max_lora_rank), -(-linear.in_features // PIECE)
    if pieces > SETTLED_PIECES and not ahead:
        _settle(run, segments, pieces, rows * linear.slices * rank)
        pieces = 1
    widths = linear.out_features[:1] if paired else linear.out_features
    fragments = (2 if paired else 1) * 4 * rank // 16 * 2 * 512
    stage_rows = 64 + rank + (16 if after else 0)
    resident, stages, shared = _stages(name, stage_rows, fragments, RESIDENT_BLOCKS[name], run)
    blocks = run.processors * resident
    long_run, _ = _long_run(-(-rows // 64), widths, blocks, WHOLE_PIECES if after else RUNS)
    groups = columns(widths, 128 * long_run)[2]
    args = expand_args(
        out, bank, linear, segments, segments.cut(LONG), groups=groups, pieces=pieces, long_run=long_run, stages=stages,
        activated=activated, after=after,
    )  # fmt: skip
    if ahead:
        args.h = segments.ahead.data_ptr()
    # It reads `out` before its predecessor has ended, which must not be the base product.
    run.launch(name, min(rows * sum(groups), blocks), 256, (args,), shared, early=not ahead)


def takes_swiglu(linear: FusedLinear, segments: Segments) -> bool:
    """Whether `expand_swiglu` serves `linear` on this batch: gate and up of one width, and more than a few rows."""
    widths, pieces, rows = linear.out_features, -(-linear.in_features // PIECE), len(segments.rows)
    apart = rows < SWIGLU_FROM or segments.cuts[-1].tiling != LONG
    return not apart and len(widths) == 2 and len(set(widths)) == 1 and pieces <= SETTLED_PIECES


def shrinks_ahead(linear: FusedLinear, segments: Segments, dtype: torch.dtype) -> bool:
    """Whether `expand_swiglu` shrinks what it writes as well: with small ranks, where whole pieces are no great detour."""
    if not len(segments.ahead):
        return False
    tiles, widths = -(-len(segments.rows) // 64), linear.out_features[:1]
    blocks = kernels(dtype).processors * RESIDENT_BLOCKS["expand_long_swiglu"]
    cost = [_long_run(tiles, widths, blocks, runs)[1] for runs in (WHOLE_PIECES, RUNS)]
    return cost[0] <= DETOUR * cost[1]


def expand_swiglu(
    gate_up: torch.Tensor,
    activated: torch.Tensor,
    bank: SlotBank,
    linear: FusedLinear,
    segments: Segments,
    after: FusedLinear | None = None,
) -> None:
    """`activated[t] = silu(gate) * up`, with `scaling * B h` of adapted rows added to both; follows `shrink`.

    `gate_up` [T, 2 w] is read and not written, `activated` [T, w]. Saves writing and reading `gate_up` once more. The bits
    are those of `expand` and then `ops_triton.silu_mul`. `after` (where `shrinks_ahead`): the linear that takes `activated`, which
    is shrunk on the way, with the bits of `shrink`.
    """
    _expand_long(gate_up, bank, linear, segments, activated, after)
