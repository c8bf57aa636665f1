"""SGMV in Triton, for GPUs that cannot run the CUDA kernels: two launches a fused linear, shrink then expand.

Every sum has a fixed order: the input width is cut into pieces of `PIECE` whatever the batch, each piece's
partial is kept in float32, and expand adds the partials in order. No atomics, so a row's result does not
depend on which rows share its batch (I9).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from backend.sgmv.segments import PIECE, Segments, padded_rank
from backend.sgmv.slots import FusedLinear, SlotBank

RANK_BLOCK = 16


@triton.jit(do_not_specialize=["h_rows"])
def _shrink(
    x_ptr, x_stride, weights_ptr, slot_stride, header_ptr, rows_ptr, tiles_ptr, h_ptr, h_rows,
    a0, a1, a2, in_features,
    max_rank: tl.constexpr, slices: tl.constexpr, split: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    rank_blocks: tl.constexpr = (max_rank + BLOCK_R - 1) // BLOCK_R
    piece_slice = tl.program_id(1) // rank_blocks
    r0 = (tl.program_id(1) % rank_blocks) * BLOCK_R
    piece = tl.program_id(2)
    if tile >= tl.load(header_ptr):
        return
    slot = tl.load(tiles_ptr + tile * 4)
    rank = tl.load(tiles_ptr + tile * 4 + 3)
    if r0 >= rank:
        return
    first = tl.load(tiles_ptr + tile * 4 + 1)
    count = tl.load(tiles_ptr + tile * 4 + 2)
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
    h_ptr, h_rows, weights_ptr, slot_stride, header_ptr, scaling_ptr, rows_ptr, tiles_ptr, y_ptr, y_stride,
    b0, b1, b2, n0, n1, n2,
    max_rank: tl.constexpr, slices: tl.constexpr, pieces: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile >= tl.load(header_ptr):
        return
    slot = tl.load(tiles_ptr + tile * 4)
    rank = tl.load(tiles_ptr + tile * 4 + 3)
    first = tl.load(tiles_ptr + tile * 4 + 1)
    count = tl.load(tiles_ptr + tile * 4 + 2)
    m = tl.arange(0, BLOCK_M)
    row = tl.load(rows_ptr + first + m, mask=m < count, other=0)
    block = tl.program_id(1)
    which = 0
    begin = 0
    width = n0
    b_unit = b0
    if slices > 1:
        if block >= tl.cdiv(n0, BLOCK_N):
            block -= tl.cdiv(n0, BLOCK_N)
            which = 1
            begin = n0
            width = n1
            b_unit = b1
            if slices > 2:
                if block >= tl.cdiv(n1, BLOCK_N):
                    block -= tl.cdiv(n1, BLOCK_N)
                    which = 2
                    begin = n0 + n1
                    width = n2
                    b_unit = b2
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
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


def sgmv(x: torch.Tensor, out: torch.Tensor, bank: SlotBank, linear: FusedLinear, segments: Segments) -> None:
    """See `backend.sgmv.sgmv`; one program for each tile that the batch could have, those beyond `header[0]` end at once."""
    shrink(x, bank, linear, segments)
    expand(out, bank, linear, segments)


def shrink(x: torch.Tensor, bank: SlotBank, linear: FusedLinear, segments: Segments) -> None:
    """Partial rank vectors of every adapted row of `x` [T, in] into `segments.partials`."""
    rows, tiles, cut = len(segments.rows), segments.most_tiles(len(bank.ranks)), segments.cuts[0]
    a0, a1, a2 = (*linear.a_units, 0, 0)[:3]
    rank_blocks = -(-bank.max_lora_rank // RANK_BLOCK)
    _shrink[(tiles, linear.slices * rank_blocks, -(-linear.in_features // PIECE))](
        x, x.stride(0), bank.weights, bank.weights.stride(0), cut.header, segments.rows, cut.tiles,
        segments.partials, rows, a0, a1, a2, linear.in_features,
        max_rank=padded_rank(bank.max_lora_rank), slices=linear.slices, split=PIECE,
        BLOCK_M=cut.tiling.tile_rows, BLOCK_R=RANK_BLOCK, BLOCK_K=128, num_warps=4, num_stages=4,
    )  # fmt: skip


def expand(out: torch.Tensor, bank: SlotBank, linear: FusedLinear, segments: Segments) -> None:
    """Add `scaling * B h` of every adapted row to `out` [T, sum of out_features]; follows `shrink`."""
    rows, tiles, cut = len(segments.rows), segments.most_tiles(len(bank.ranks)), segments.cuts[0]
    b0, b1, b2 = (*linear.b_units, 0, 0)[:3]
    n0, n1, n2 = (*linear.out_features, 0, 0)[:3]
    block_n = 128 if all(n % 128 == 0 for n in linear.out_features) else 64
    _expand[(tiles, sum(-(-n // block_n) for n in linear.out_features))](
        segments.partials, rows, bank.weights, bank.weights.stride(0), cut.header, bank.scaling, segments.rows,
        cut.tiles, out, out.stride(0), b0, b1, b2, n0, n1, n2,
        max_rank=padded_rank(bank.max_lora_rank), slices=linear.slices, pieces=-(-linear.in_features // PIECE),
        BLOCK_M=cut.tiling.tile_rows, BLOCK_R=RANK_BLOCK, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
