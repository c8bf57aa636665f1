"""The decoder's small operations as Triton kernels: norm, rotary and KV write, paged attention, SwiGLU.

On GPUs with programmatic dependent launch (sm_90 and later) each may be started while its predecessor runs, and lets its
successor start at once: a base product that follows has its weights on their way by then. As in `sgmv/cuda/common.cu`,
nothing is read or written before the predecessor has completed.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def _overlap() -> dict[str, bool]:
    """Launch options of every kernel here."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}


@triton.jit
def _enter(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _add_rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, width, eps, has_x: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    _enter(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    value = tl.load(residual_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
    if has_x:
        value += tl.load(x_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual_ptr + row * width + column, value.to(residual_ptr.dtype.element_ty), mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, (value * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float
) -> None:
    """`residual += x` (if given), `out = rms_norm(residual) * weight`; all [T, width]."""
    width = residual.shape[1]
    source = residual if x is None else x
    block = triton.next_power_of_2(width)
    _add_rms_norm[(residual.shape[0],)](
        source, residual, weight, out, width, eps, has_x=x is not None, BLOCK=block, num_warps=8, **_overlap()
    )


@triton.jit
def _rope_and_cache(
    qkv_ptr, qkv_stride, cos_sin_ptr, positions_ptr, kv_slots_ptr, k_ptr, v_ptr,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, block_size: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _enter(PDL)
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half: tl.constexpr = dim // 2
    d = tl.arange(0, half)
    position = tl.load(positions_ptr + t)
    slot = tl.load(kv_slots_ptr + t)
    if slot < 0:
        return
    base = qkv_ptr + t * qkv_stride + head * dim
    lower = tl.load(base + d).to(tl.float32)
    upper = tl.load(base + half + d).to(tl.float32)
    if head < heads + kv_heads:
        cos = tl.load(cos_sin_ptr + position * dim + d)
        sin = tl.load(cos_sin_ptr + position * dim + half + d)
        rotated = lower * cos - upper * sin
        upper = upper * cos + lower * sin
        lower = rotated
    kind = qkv_ptr.dtype.element_ty
    if head < heads:
        tl.store(base + d, lower.to(kind))
        tl.store(base + half + d, upper.to(kind))
    else:
        kv_head = (head - heads) % kv_heads
        cell = ((slot // block_size) * kv_heads + kv_head) * block_size + slot % block_size
        target = k_ptr
        if head >= heads + kv_heads:
            target = v_ptr
        tl.store(target + cell * dim + d, lower.to(kind))
        tl.store(target + cell * dim + half + d, upper.to(kind))


def rope_and_cache(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    heads: int,
) -> None:
    """Rotate q in place and write rotated k and v into their cache cells.

    `qkv` [T, (heads + 2 kv_heads) * dim]; `cos_sin` float32[max_len, dim]; `positions`, `kv_slots` int64[T]
    (block * block_size + offset; -1 = padding row); caches [blocks, kv_heads, block_size, dim].
    """
    _, kv_heads, block_size, dim = k_cache.shape
    _rope_and_cache[(qkv.shape[0], heads + 2 * kv_heads)](
        qkv, qkv.stride(0), cos_sin, positions, kv_slots, k_cache, v_cache,
        heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size, num_warps=1, **_overlap(),
    )  # fmt: skip


@triton.jit
def _attention(
    q_ptr, q_stride, k_ptr, v_ptr, out_ptr, out_stride, partial_ptr, tiles_ptr, tables_ptr, table_stride, scale,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, block_size: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _enter(PDL)
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.load(tiles_ptr + tile * 4)
    if request < 0:
        return
    row0 = tl.load(tiles_ptr + tile * 4 + 1)
    position0 = tl.load(tiles_ptr + tile * 4 + 2)
    count = tl.load(tiles_ptr + tile * 4 + 3)
    end = position0 + count
    share = tl.cdiv(tl.cdiv(end, BLOCK_N), SPLITS) * BLOCK_N
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
    q = tl.load(
        q_ptr + (row0 + token).to(tl.int64)[:, None] * q_stride + head[:, None] * dim + d[None, :],
        mask=live[:, None],
        other=0.0,
    )
    peak = tl.full((BLOCK_Q * GROUP,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_Q * GROUP,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_Q * GROUP, dim), dtype=tl.float32)
    n = tl.arange(0, BLOCK_N)
    table = tables_ptr + request.to(tl.int64) * table_stride
    for start in range(first, tl.minimum(end, first + share), BLOCK_N):
        key = start + n
        block = tl.load(table + key // block_size, mask=key < end, other=0).to(tl.int64)
        cell = (block * kv_heads + kv_head) * block_size + key % block_size
        k = tl.load(k_ptr + cell[None, :] * dim + d[:, None], mask=(key < end)[None, :], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * (scale * 1.4426950408889634)
        score = tl.where(key[None, :] <= (position0 + token)[:, None], score, -1.0e30)
        new_peak = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weight, 1)
        v = tl.load(v_ptr + cell[:, None] * dim + d[None, :], mask=(key < end)[:, None], other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        peak = new_peak
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
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _enter(PDL)
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
    blocks = tl.cdiv(end, BLOCK_N)
    used = tl.cdiv(blocks, tl.cdiv(blocks, SPLITS))
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, dim)
    cell = ((tile * kv_heads + kv_head) * SPLITS + split) * (BLOCK_Q * GROUP) + m
    there = split < used
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


def attention(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    tiles: torch.Tensor,
    tables: torch.Tensor,
    heads: int,
    tile_queries: int,
) -> None:
    """Causal grouped-query attention over paged keys and values.

    `tiles` int32[n, 4]: (request or -1, first row, its position, queries <= tile_queries); `tables` int32[requests, blocks];
    `out` [T, heads * dim]. Keys of the step itself must be in the cache already. Few tiles have their keys split over
    several programs (as in flash decoding); how many depends on `n` alone, so that a graph serves every context.
    """
    count = tiles.shape[0]
    if count == 0:
        return
    _, kv_heads, block_size, dim = k_cache.shape
    group = triton.next_power_of_2(heads // kv_heads)
    block_q = max(tile_queries, 16 // group)
    rows, scale = block_q * group, dim**-0.5
    splits = 1
    while splits < MOST_SPLITS and 2 * splits * count * kv_heads <= PROGRAMS and rows <= 64:
        splits *= 2
    splits = splits if splits >= LEAST_SPLITS else 1
    partial = out
    if splits > 1:
        partial = torch.empty(count * kv_heads * splits * rows * (dim + 2), dtype=torch.float32, device=out.device)
    shapes = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "GROUP": group, "BLOCK_Q": block_q, "BLOCK_N": 64}
    _attention[(count, kv_heads, splits)](
        qkv, qkv.stride(0), k_cache, v_cache, out, out.stride(0), partial, tiles, tables, tables.stride(0), scale,
        block_size=block_size, SPLITS=splits, num_warps=max(4, min(16, rows // 16)), num_stages=3 if rows <= 128 else 2,
        **shapes, **_overlap(),
    )  # fmt: skip
    if splits > 1:
        _merge_splits[(count, kv_heads, rows)](
            partial, out, out.stride(0), tiles, SPLITS=splits, num_warps=1 if splits <= 8 else 4, **shapes, **_overlap()
        )


@triton.jit
def _silu_mul(x_ptr, out_ptr, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    _enter(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(x: torch.Tensor, out: torch.Tensor) -> None:
    """SwiGLU: `out[T, w] = silu(x[:, :w]) * x[:, w:]`."""
    width = out.shape[1]
    _silu_mul[(out.shape[0], triton.cdiv(width, 1024))](x, out, width, BLOCK=1024, num_warps=4, **_overlap())
