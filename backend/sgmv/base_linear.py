"""The base product of few rows together with what LoRA adds to it, as one kernel, or two: see `Segments.shared_out`.

Up to 32 rows `linear_*` (`cuda/linear.cu`), on GPUs with enough shared memory, and `linear_gated_*` for gate and up, which
applies SwiGLU; up to 128 rows `linear_wide_*` (`cuda/linear_wide.cu`), on Hopper. While most warps stream the base weights,
others shrink their share of the adapted rows and read what other blocks have shrunk, or a kernel before has, and compute B h.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch

from backend.sgmv.arguments import LinearArgs, TensorMap, WideArgs, columns, exchange_args, expand_args, shrink_args
from backend.sgmv.cuda_kernels import shrink
from backend.sgmv.nvrtc import Kernels, checked, kernels
from backend.sgmv.segments import PIECE, SHARED_RANK, SHARED_ROWS, Segments, padded_rank
from backend.sgmv.slots import FusedLinear, SlotBank

Lora = tuple[SlotBank, FusedLinear, Segments]
"""Where adapters live, which linear it is, and the batch's segments."""

BOX = 64
"""Columns that the copy engine fetches at a time: 128 bytes, as its widest swizzle has them."""

MAKERS, HELPERS, WIDE_THREADS = 256, 256, 416
"""Threads that multiply and that add LoRA's part in `linear_*`, and all of `linear_wide_*`; fixed in `cuda/`."""

MOST_PLACES, FEWEST_PLACES = 6, 2
"""Places of a ring of B, of which all but one are on their way; at most 7, fixed in `cuda/common.cu`."""

SHARE_BYTES = 2 * 8 * 8 * 20 * 4
"""Shared memory in which a block of `linear_*` adds up its share of the shrink."""

NORM_BYTES = 4096
"""Shared memory left for a block of the norm that follows, which then is there when the base product ends."""

RING_MOST = 24
"""Stages of a ring at most; fixed in `cuda/linear_wide.cu`."""

LEAN_BYTES, LEAN_STAGES = 190 * 1024, 5
"""So much shared memory leaves room for blocks of the kernels before and after; not where the ring would have fewer stages."""

SPLIT_COLUMNS = 8192
"""From so many columns on two blocks share them, where there are processors for both."""

BUSY = 0.7
"""Share of the processors that must have a block, or cuBLAS is faster (but for few adapted rows)."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is launched; `columns`: of y that a block takes at a time.

    `depth`: stages of the ring through which `linear_wide_*` has w and x, `ring`: places of those through which `linear_*` has B.
    """

    name: str
    grid: int
    threads: int
    shared_bytes: int
    columns: int
    cluster: int = 1
    depth: int = 0
    ring: int = 0


def _with_ring(
    family: str, most: int, grid: int, shared: int, columns: int, width: int, rank: int, run: Kernels
) -> Launch | None:
    """The launch of `family`'s kernel of `most` rows, which needs `shared` bytes; with LoRA (`rank`) also rings of B.

    `columns`: of y that a block takes at a time; `width`: of B, of all slices.
    """
    name = f"{family}_{most}"
    if not rank:
        return Launch(name, grid, MAKERS, shared, columns) if shared <= run.rooms[name] else None
    place = HELPERS // 32 * 16 * width * 2
    shared += SHARE_BYTES if most in SHARED_ROWS and rank <= SHARED_RANK else 0
    for left in (NORM_BYTES, 0):
        ring = min(MOST_PLACES, (run.rooms[name] - left - shared) // place)
        if ring >= FEWEST_PLACES:
            return Launch(name, grid, MAKERS + HELPERS, shared + ring * place, columns, ring=ring)
    return None


def _few(rows: int, slices: tuple[int, ...], rank: int, run: Kernels) -> Launch | None:
    """`linear_*`: 16 * `m_tiles` rows of the weight and 8 * `eights` rows of x a block, `depth` ring stages."""
    for eights, m_tiles, depth in ((1, 1, 5), (2, 1, 4), (4, 2, 2)):
        width, most = 16 * m_tiles, 8 * eights
        # So large that a multiprocessor holds one block, and the next launch's waits its turn.
        shared = 8 * depth * (width + most) * 128 + 8 * most * (width + 4) * 4
        if rank:
            shared += 4 * most * (2 * width + rank + 4) + 2 * most * width * 2
        whole = not rank or not any(w % width for w in slices)
        if rows <= most and whole:
            grid = min(-(-sum(slices) // width), run.processors)
            return _with_ring("linear", most, grid, shared, width, width, rank, run)
    return None


def _gated(rows: int, half: int, rank: int, run: Kernels) -> Launch | None:
    """`linear_gated_*`: sixteen rows of gate's weight and sixteen of up's at a time, of which there are `half` each."""
    for eights, depth in ((1, 3), (2, 3), (4, 2)):
        most = 8 * eights
        shared = 8 * depth * (32 + most) * 128 + 8 * most * 36 * 4
        if rank:
            shared += 4 * most * 2 * (32 + rank + 4) + 2 * most * 32 * 2
        if rows <= most and half % 16 == 0:
            return _with_ring("linear_gated", most, min(half // 16, run.processors), shared, 16, 32, rank, run)
    return None


def _wide(rows: int, slices: tuple[int, ...], width: int, rank: int, run: Kernels) -> Launch | None:
    """`linear_wide_*`: 64 or 128 rows of the weight and all rows of x a block."""
    features, most = sum(slices), 64 if rows <= 64 else 128
    groups = 2 if features >= 128 * run.processors else 1
    name, tile = f"linear_wide_{most}_{groups}", 64 * groups
    tiles = -(-features // tile)
    cluster = 2 if width >= SPLIT_COLUMNS and 2 * tiles <= run.processors else 1
    idle = tiles * cluster < BUSY * run.processors
    if name not in run.rooms or features % 8 or (rank and any(w % tile for w in slices)):
        return None
    if (most > 64 and (idle or not rank)) or (idle and not rank):
        return None
    stage, sums = (tile + most) * BOX * 2, most * (tile + 4) * 4
    fixed = sums * cluster + (most * (rank + 4) * 4 if rank else 0)
    depth = (LEAN_BYTES - fixed) // stage
    if depth < LEAN_STAGES:
        depth = (run.rooms[name] - fixed) // stage
    depth = min(depth, RING_MOST)
    if depth < 3:
        return None
    grid = tiles * cluster if cluster > 1 else min(tiles, run.processors)
    return Launch(name, grid, WIDE_THREADS, fixed + depth * stage, tile, cluster, depth)


def _plan(x: torch.Tensor, slices: tuple[int, ...], lora: Lora | None) -> Launch | None:
    rows, width = x.shape
    if width % 8 or rows > 128:
        return None
    run, rank = kernels(x.dtype), padded_rank(lora[0].max_lora_rank) if lora else 0
    return _few(rows, slices, rank, run) if rows <= 32 else _wide(rows, slices, width, rank, run)


def takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora: Lora | None = None) -> bool:
    """Whether `linear` serves `x` [T, in] and `weight` [out, in]; where it does not, cuBLAS is as fast or faster."""
    return bias is None and _plan(x, lora[1].out_features if lora else (len(weight),), lora) is not None


def _gated_plan(x: torch.Tensor, weight: torch.Tensor, lora: Lora | None) -> Launch | None:
    rows, width = x.shape
    if width % 8 or rows > 32:
        return None
    return _gated(rows, len(weight) // 2, padded_rank(lora[0].max_lora_rank) if lora else 0, kernels(x.dtype))


def takes_gated(x: torch.Tensor, weight: torch.Tensor, lora: Lora | None = None) -> bool:
    """Whether `gated` serves `x` [T, in] and `weight` [2 w, in]: few rows."""
    return _gated_plan(x, weight, lora) is not None


def gated(x: torch.Tensor, weight: torch.Tensor, activated: torch.Tensor, lora: Lora | None = None) -> None:
    """`activated` [T, w] = silu(gate) * up, where gate and up are the halves of what `linear` makes of `weight` [2 w, in].

    The bits are those of `linear` and then `ops_triton.silu_mul`, which reads gate and up from memory.
    """
    plan = _gated_plan(x, weight, lora)
    assert plan is not None, "see takes_gated"
    _launch_few(plan, x, weight, activated, lora)


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, lora: Lora | None = None) -> None:
    """`out = x @ weight.T`, plus the LoRA product of the adapted rows if `lora`; see `takes`.

    `x` [T, in], `weight` [out, in] contiguous, `out` [T, out]. It begins to fetch `weight` while its predecessor in the
    stream still runs. With `lora` the bits are those of the base product rounded, and `cuda_kernels.shrink` and `expand` after
    it; a GPU must run one of these at a time if `Segments.shared_out`: blocks wait for
    each other. A row's bits do not depend on the other rows' values.
    """
    slices = lora[1].out_features if lora else (len(weight),)
    plan = _plan(x, slices, lora)
    assert plan is not None, "see takes"
    if not plan.depth:
        _launch_few(plan, x, weight, out, lora)
        return
    maps = _map(weight, len(weight), plan.columns), _map(x, len(x), len(x))
    stage_bytes = (plan.columns + len(x)) * BOX * 2
    args = WideArgs(
        *maps, out.data_ptr(), None, out.stride(0), *x.shape, len(weight), 0, plan.depth, stage_bytes
    )  # fmt: skip
    _launch(plan, args, x, out, lora)


def _launch_few(plan: Launch, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, lora: Lora | None) -> None:
    args = LinearArgs(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), None, x.stride(0), out.stride(0), *x.shape, len(weight), 0,
        plan.ring,
    )  # fmt: skip
    _launch(plan, args, x, out, lora)


def _launch(plan: Launch, args: ctypes.Structure, x: torch.Tensor, out: torch.Tensor, lora: Lora | None) -> None:
    early = True
    if lora:
        bank, layout, segments = lora
        if segments.shared_out:
            early = segments.begin()
            args.shrink = shrink_args(x, bank, layout, segments, segments.cuts[0])
            args.shrink.h = segments.exchange.data_ptr()
            args.exchange = exchange_args(segments)
        else:
            shrink(x, bank, layout, segments, late=False)
        args.row_slots, args.eights = segments.row_slots.data_ptr(), segments.cuts[0].tiling.tile_rows // 8
        groups = columns(layout.out_features, plan.columns)[2]
        pieces = -(-x.shape[1] // PIECE)
        args.lora = expand_args(out, bank, layout, segments, segments.cuts[0], groups=groups, pieces=pieces)
    kernels(x.dtype).launch(
        plan.name, plan.grid, plan.threads, (args,), plan.shared_bytes, early=early, cluster=plan.cluster
    )


def _map(matrix: torch.Tensor, rows: int, box_rows: int) -> ctypes.Array[ctypes.c_ulonglong]:
    return _tensor_map(matrix.data_ptr(), matrix.dtype, rows, matrix.shape[1], matrix.stride(0), box_rows)


@lru_cache(maxsize=4096)
def _tensor_map(
    address: int, dtype: torch.dtype, rows: int, width: int, stride: int, box_rows: int
) -> ctypes.Array[ctypes.c_ulonglong]:
    """What the copy engine must know of a matrix [rows, width] to fetch boxes of `box_rows` rows; zeros outside."""
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    half = dtype == torch.float16
    made = checked(
        driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            address,
            [driver.cuuint64_t(width), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(2 * stride)],
            [driver.cuuint32_t(BOX), driver.cuuint32_t(box_rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "sgmv: tensor map",
    )
    return TensorMap.from_buffer_copy(ctypes.string_at(made.getPtr(), ctypes.sizeof(TensorMap)))
