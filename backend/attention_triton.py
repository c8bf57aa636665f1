"""Paged grouped-query attention as Triton kernels, the keys of few requests split over several programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from backend.dependent_launch import let_next_start, overlap, wait_for_previous


@triton.jit
def _take_keys(
    q, acc, peak, total, k_ptr, v_ptr, table, start, end, position, kv_head, scale,
    kv_heads: tl.constexpr, dim: tl.constexpr, block_size: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys into a running softmax (base 2); `MASKED`: some of them may not be seen by every query."""
    d = tl.arange(0, dim)
    key = start + tl.arange(0, BLOCK_N)
    if MASKED:
        block = tl.load(table + key // block_size, mask=key < end, other=0).to(tl.int64)
    else:
        block = tl.load(table + key // block_size).to(tl.int64)
    cell = (block * kv_heads + kv_head) * block_size + key % block_size
    if MASKED:
        k = tl.load(k_ptr + cell[None, :] * dim + d[:, None], mask=(key < end)[None, :], other=0.0)
        score = tl.dot(q, k, input_precision="ieee")
        score = tl.where(key[None, :] <= position[:, None], score, -1.0e30)
        v = tl.load(v_ptr + cell[:, None] * dim + d[None, :], mask=(key < end)[:, None], other=0.0)
    else:
        k = tl.load(k_ptr + cell[None, :] * dim + d[:, None])
        score = tl.dot(q, k, input_precision="ieee")
        v = tl.load(v_ptr + cell[:, None] * dim + d[None, :])
    new_peak = tl.maximum(peak, tl.max(score, 1) * scale)
    weight = tl.exp2(score * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def _rotated(row, cos_sin, there, dim: tl.constexpr):
    """Vectors of `dim` at pointers `row`, rotated as `rope_and_cache` does; `cos_sin`: where those of their positions begin."""
    half: tl.constexpr = dim // 2
    d = tl.arange(0, dim)[None, :]
    value = tl.load(row + d, mask=there, other=0.0)
    other = tl.load(row + (d + half) % dim, mask=there, other=0.0).to(tl.float32)
    cos = tl.load(cos_sin + d % half, mask=there, other=0.0)
    sin = tl.load(cos_sin + half + d % half, mask=there, other=0.0)
    turned = tl.where(d < half, -other, other) * sin
    return (value.to(tl.float32) * cos + turned).to(value.dtype)


@triton.jit
def _write_keys(
    row, cos_sin_ptr, k_ptr, v_ptr, table, kv_head, position0, first, last,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, block_size: tl.constexpr, COUNT: tl.constexpr,
    row_stride,
):  # fmt: skip
    """Keys and values of a tile's own tokens that are among `first` to `last`, into their cells of the cache."""
    token = tl.arange(0, COUNT)
    position = position0 + token
    mine = (position >= first) & (position < last)
    block = tl.load(table + position // block_size, mask=mine, other=0).to(tl.int64)
    cell = ((block * kv_heads + kv_head) * block_size + position % block_size)[:, None] * dim
    row = row + (token.to(tl.int64) * row_stride)[:, None] + (heads + kv_head) * dim
    d, there = tl.arange(0, dim)[None, :], mine[:, None]
    tl.store(k_ptr + cell + d, _rotated(row, cos_sin_ptr + position[:, None] * dim, there, dim), mask=there)
    tl.store(v_ptr + cell + d, tl.load(row + kv_heads * dim + d, mask=there, other=0.0), mask=there)


@triton.jit
def _share(end, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """Keys of each of the programs that share `end` keys: whole blocks."""
    return tl.maximum(tl.cdiv(tl.cdiv(end, BLOCK_N), SPLITS) * BLOCK_N, LEAST)


@triton.jit
def _attention(
    q_ptr, q_stride, k_ptr, v_ptr, out_ptr, out_stride, partial_ptr, tiles_ptr, tables_ptr, table_stride, cos_sin_ptr, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, block_size: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
    ROTATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a prompt's last queries see the most keys: they go first
    kv_head = tl.program_id(1)
    request = tl.load(tiles_ptr + tile * 4)
    if request < 0:
        return
    row0 = tl.load(tiles_ptr + tile * 4 + 1)
    position0 = tl.load(tiles_ptr + tile * 4 + 2)
    count = tl.load(tiles_ptr + tile * 4 + 3)
    end = position0 + count
    share = _share(end, BLOCK_N, SPLITS, LEAST)
    first = tl.program_id(2) * share
    if first >= end:
        return
    group: tl.constexpr = heads // kv_heads
    m = tl.arange(0, BLOCK_Q * GROUP)
    token = m // GROUP
    member = m % GROUP
    live = (token < count) & (member < group)
    d = tl.arange(0, dim)
    head = kv_head * group + member
    table = tables_ptr + request.to(tl.int64) * table_stride
    last = tl.minimum(end, first + share)
    position = position0 + token
    queries = q_ptr + (row0 + token).to(tl.int64)[:, None] * q_stride + head[:, None] * dim
    wait_for_previous(PDL)
    if ROTATE:
        q = _rotated(queries, cos_sin_ptr + position[:, None] * dim, live[:, None], dim)
        if last > position0:
            _write_keys(
                q_ptr + row0.to(tl.int64) * q_stride, cos_sin_ptr, k_ptr, v_ptr, table, kv_head, position0, first, last,
                heads, kv_heads, dim, block_size, BLOCK_Q, q_stride,
            )  # fmt: skip
        tl.debug_barrier()  # what some threads of the program wrote the others read
    else:
        q = tl.load(queries + d[None, :], mask=live[:, None], other=0.0)
    peak = tl.full((BLOCK_Q * GROUP,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_Q * GROUP,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_Q * GROUP, dim), dtype=tl.float32)
    scale = scale * 1.4426950408889634
    seen = first
    if BLOCK_Q * GROUP > 64:  # many queries: whole blocks that all of them see need no masks
        seen = tl.maximum(first, tl.minimum(last, (position0 + 1) // BLOCK_N * BLOCK_N))
        for start in range(first, seen, BLOCK_N):
            acc, peak, total = _take_keys(
                q, acc, peak, total, k_ptr, v_ptr, table, start, end, position, kv_head, scale,
                kv_heads, dim, block_size, BLOCK_N, False,
            )  # fmt: skip
    for start in range(seen, last, BLOCK_N):
        acc, peak, total = _take_keys(
            q, acc, peak, total, k_ptr, v_ptr, table, start, end, position, kv_head, scale,
            kv_heads, dim, block_size, BLOCK_N, True,
        )  # fmt: skip
    if SPLITS == 1:
        target = out_ptr + (row0 + token).to(tl.int64)[:, None] * out_stride + head[:, None] * dim + d[None, :]
        tl.store(target, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=live[:, None])
    else:
        cell = ((tile * kv_heads + kv_head) * SPLITS + tl.program_id(2)) * (BLOCK_Q * GROUP) + m
        tl.store(partial_ptr + cell[:, None] * (dim + 2) + d[None, :], acc)
        tl.store(partial_ptr + cell * (dim + 2) + dim, peak)
        tl.store(partial_ptr + cell * (dim + 2) + dim + 1, total)


@triton.jit
def _merge_splits(
    partial_ptr, out_ptr, out_stride, tiles_ptr,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    m = tl.program_id(2)
    group: tl.constexpr = heads // kv_heads
    token = m // GROUP
    member = m % GROUP
    request = tl.load(tiles_ptr + tile * 4)
    row0 = tl.load(tiles_ptr + tile * 4 + 1)
    count = tl.load(tiles_ptr + tile * 4 + 3)
    if (request < 0) | (token >= count) | (member >= group):
        return
    end = tl.load(tiles_ptr + tile * 4 + 2) + count
    used = tl.cdiv(end, _share(end, BLOCK_N, SPLITS, LEAST))
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, dim)
    cell = ((tile * kv_heads + kv_head) * SPLITS + split) * (BLOCK_Q * GROUP) + m
    there = split < used
    wait_for_previous(PDL)
    peak = tl.load(partial_ptr + cell * (dim + 2) + dim, mask=there, other=-1.0e30)
    total = tl.load(partial_ptr + cell * (dim + 2) + dim + 1, mask=there, other=0.0)
    acc = tl.load(partial_ptr + cell[:, None] * (dim + 2) + d[None, :], mask=there[:, None], other=0.0)
    weight = tl.exp2(peak - tl.max(peak, 0))
    result = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    target = out_ptr + (row0 + token).to(tl.int64) * out_stride + (kv_head * group + member) * dim + d
    tl.store(target, result.to(out_ptr.dtype.element_ty))


LEAST_SPLITS, MOST_SPLITS = 4, 32
"""Shares that the keys of an attention tile are cut into, if they are: fewer do not pay for the merging."""

PROGRAMS = 528
"""Programs that few attention tiles are cut into: four for each of an H100's 132 multiprocessors."""

LEAST_KEYS = 128
"""Keys of a share at least; those of one or two requests are shared further, as few processors have any."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How tiles are worked on: shares of the keys, keys of each at least, keys at a time, warps, and stages of loads."""

    splits: int
    least: int
    block_n: int
    warps: int
    stages: int


def plan(count: int, kv_heads: int, rows: int) -> Plan:
    """For `count` tiles of `rows` queries times heads; it knows no context, so that a graph serves every one."""
    if rows > 64:
        return Plan(1, 64, 64, min(16, rows // 16), 3 if rows <= 128 else 2)
    splits, programs = 1, count * kv_heads
    while splits < MOST_SPLITS and 2 * splits * programs <= PROGRAMS:
        splits *= 2
    if splits >= LEAST_SPLITS:
        return Plan(splits, 64 if splits == MOST_SPLITS else LEAST_KEYS, 64, 2, 4)
    return Plan(1, 128, 128, 8, 2) if 2 * programs <= PROGRAMS else Plan(1, 64, 64, 4, 2)


def attention(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    tiles: torch.Tensor,
    tables: torch.Tensor,
    heads: int,
    tile_queries: int,
    cos_sin: torch.Tensor | None = None,
) -> None:
    """Causal grouped-query attention over paged keys and values.

    `tiles` int32[n, 4]: (request or -1, first row, its position, queries <= tile_queries); `tables` int32[requests, blocks];
    `out` [T, heads * dim]. Keys of the step itself must be in the cache already; with `cos_sin` float32[max_len, dim] they are
    rotated and written there by this, and queries rotated: for steps none of whose requests has two tiles. Few tiles have their keys split over
    several programs (as in flash decoding); how many depends on `n` alone, so that a graph serves every context.
    """
    count = tiles.shape[0]
    if count == 0:
        return
    _, kv_heads, block_size, dim = k_cache.shape
    group = triton.next_power_of_2(heads // kv_heads)
    block_q = max(tile_queries, 16 // group)
    rows, scale = block_q * group, dim**-0.5
    chosen = plan(count, kv_heads, rows)
    splits, partial = chosen.splits, out
    if splits > 1:
        partial = torch.empty(count * kv_heads * splits * rows * (dim + 2), dtype=torch.float32, device=out.device)
    shapes = {
        "heads": heads, "kv_heads": kv_heads, "dim": dim, "GROUP": group, "BLOCK_Q": block_q,
        "BLOCK_N": chosen.block_n, "SPLITS": splits, "LEAST": chosen.least,
    }  # fmt: skip
    _attention[(count, kv_heads, splits)](
        qkv, qkv.stride(0), k_cache, v_cache, out, out.stride(0), partial, tiles, tables, tables.stride(0),
        out if cos_sin is None else cos_sin, scale, ROTATE=cos_sin is not None,
        block_size=block_size, num_warps=chosen.warps, num_stages=chosen.stages, **shapes, **overlap(),
    )  # fmt: skip
    if splits > 1:
        _merge_splits[(count, kv_heads, rows)](
            partial, out, out.stride(0), tiles, num_warps=1 if splits <= 8 else 4, **shapes, **overlap()
        )
