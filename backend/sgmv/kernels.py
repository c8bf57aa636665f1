"""SGMV in Triton: two launches a fused linear, shrink then expand.

Every sum has a fixed order: the input width is cut into pieces of `SPLIT` whatever the batch, each piece's
partial is kept in float32, and expand adds the partials in order. No atomics, so a row's result does not
depend on which rows share its batch (I9).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from backend.base import TILE_ROWS
from backend.sgmv.slots import FusedLinear, SlotBank

SPLIT = 1024
RANK_BLOCK = 16


@triton.jit(do_not_specialize=["h_rows"])
def _shrink(
    x_ptr, x_stride, weights_ptr, slot_stride, ranks_ptr, rows_ptr, tiles_ptr, h_ptr, h_rows,
    a0, a1, a2, in_features,
    max_rank: tl.constexpr, slices: tl.constexpr, split: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    rank_blocks: tl.constexpr = (max_rank + BLOCK_R - 1) // BLOCK_R
    piece_slice = tl.program_id(1) // rank_blocks
    r0 = (tl.program_id(1) % rank_blocks) * BLOCK_R
    piece = tl.program_id(2)
    slot = tl.load(tiles_ptr + tile * 3)
    if slot < 0:
        return
    rank = tl.load(ranks_ptr + slot)
    if r0 >= rank:
        return
    first = tl.load(tiles_ptr + tile * 3 + 1)
    count = tl.load(tiles_ptr + tile * 3 + 2)
    m = tl.arange(0, BLOCK_M)
    row = tl.load(rows_ptr + first + m, mask=m < count, other=0)
    a_unit = a0
    if piece_slice == 1:
        a_unit = a1
    if piece_slice == 2:
        a_unit = a2
    r = r0 + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    a_base = weights_ptr + slot.to(tl.int64) * slot_stride + rank.to(tl.int64) * a_unit
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for step in range(split // BLOCK_K):
        kk = piece * split + step * BLOCK_K + k
        x_tile = tl.load(
            x_ptr + row.to(tl.int64)[:, None] * x_stride + kk[None, :],
            mask=(m < count)[:, None] & (kk < in_features)[None, :],
            other=0.0,
        )
        a_tile = tl.load(
            a_base + r[None, :] * in_features + kk[:, None],
            mask=(r < rank)[None, :] & (kk < in_features)[:, None],
            other=0.0,
        )
        acc = tl.dot(x_tile, a_tile, acc, input_precision="ieee")
    h_offset = ((piece * slices + piece_slice) * h_rows + first + m).to(tl.int64) * max_rank
    tl.store(h_ptr + h_offset[:, None] + r[None, :], acc, mask=(m < count)[:, None] & (r < max_rank)[None, :])


@triton.jit(do_not_specialize=["h_rows"])
def _expand(
    h_ptr, h_rows, weights_ptr, slot_stride, ranks_ptr, scaling_ptr, rows_ptr, tiles_ptr, y_ptr, y_stride,
    b0, b1, b2, n0, n1, n2,
    max_rank: tl.constexpr, slices: tl.constexpr, pieces: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    slot = tl.load(tiles_ptr + tile * 3)
    if slot < 0:
        return
    rank = tl.load(ranks_ptr + slot)
    first = tl.load(tiles_ptr + tile * 3 + 1)
    count = tl.load(tiles_ptr + tile * 3 + 2)
    m = tl.arange(0, BLOCK_M)
    row = tl.load(rows_ptr + first + m, mask=m < count, other=0)
    column = tl.program_id(1) * BLOCK_N
    which = 0
    begin = 0
    width = n0
    b_unit = b0
    if slices > 1:
        if column >= n0:
            which = 1
            begin = n0
            width = n1
            b_unit = b1
    if slices > 2:
        if column >= n0 + n1:
            which = 2
            begin = n0 + n1
            width = n2
            b_unit = b2
    n = column - begin + tl.arange(0, BLOCK_N)
    b_base = weights_ptr + slot.to(tl.int64) * slot_stride + rank.to(tl.int64) * b_unit
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        b_tile = tl.load(
            b_base + r[:, None] * width + n[None, :], mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0
        )
        h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for piece in tl.static_range(pieces):
            h_offset = ((piece * slices + which) * h_rows + first + m).to(tl.int64) * max_rank
            h += tl.load(
                h_ptr + h_offset[:, None] + r[None, :], mask=(m < count)[:, None] & (r < rank)[None, :], other=0.0
            )
        acc = tl.dot(h.to(b_tile.dtype), b_tile, acc, input_precision="ieee")
    scale = tl.load(scaling_ptr + slot)
    y = y_ptr + row.to(tl.int64)[:, None] * y_stride + (begin + n)[None, :]
    mask = (m < count)[:, None] & (n < width)[None, :]
    base = tl.load(y, mask=mask, other=0.0)
    tl.store(y, (base.to(tl.float32) + acc * scale).to(base.dtype), mask=mask)


def scratch_elements(max_rows: int, max_lora_rank: int, widest_in: int) -> int:
    """Float32 elements of scratch that `sgmv` needs for `max_rows` rows: a partial per piece, slice, row and rank."""
    return -(-widest_in // SPLIT) * 3 * max_rows * max_lora_rank


def sgmv(
    x: torch.Tensor,
    out: torch.Tensor,
    bank: SlotBank,
    linear: FusedLinear,
    rows: torch.Tensor,
    tiles: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Add each row's LoRA product to `out` in place: `out[t] += scaling * B(A x[t])`, all slices at once.

    `x` [T, in] and `out` [T, sum of out_features] with contiguous rows; `rows` int32[>= n] and `tiles` int32[m, 3]
    as in `Segments` (a tile whose slot is -1 does nothing, so a padded list serves a CUDA graph); `scratch`
    float32, at least `scratch_elements`. No host synchronisation and no allocation.
    """
    tiles_count = tiles.shape[0]
    if tiles_count == 0:
        return
    pieces = -(-linear.in_features // SPLIT)
    pad = (0, 0)
    a0, a1, a2 = (linear.a_units + pad)[:3]
    b0, b1, b2 = (linear.b_units + pad)[:3]
    n0, n1, n2 = (linear.out_features + pad)[:3]
    block_n = 128 if all(n % 128 == 0 for n in linear.out_features) else 64
    rank_blocks = -(-bank.max_lora_rank // RANK_BLOCK)
    _shrink[(tiles_count, linear.slices * rank_blocks, pieces)](
        x, x.stride(0), bank.weights, bank.weights.stride(0), bank.ranks, rows, tiles, scratch, rows.shape[0],
        a0, a1, a2, linear.in_features,
        max_rank=bank.max_lora_rank, slices=linear.slices, split=SPLIT,
        BLOCK_M=TILE_ROWS, BLOCK_R=RANK_BLOCK, BLOCK_K=128, num_warps=4, num_stages=4,
    )  # fmt: skip
    _expand[(tiles_count, -(-sum(linear.out_features) // block_n))](
        scratch, rows.shape[0], bank.weights, bank.weights.stride(0), bank.ranks, bank.scaling, rows, tiles,
        out, out.stride(0), b0, b1, b2, n0, n1, n2,
        max_rank=bank.max_lora_rank, slices=linear.slices, pieces=pieces,
        BLOCK_M=TILE_ROWS, BLOCK_R=RANK_BLOCK, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
