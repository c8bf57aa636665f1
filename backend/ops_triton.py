"""The decoder's small operations as Triton kernels: a step's inputs, norm, rotary and KV write, paged attention, SwiGLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from backend.attention_triton import attention
from backend.dependent_launch import enter, let_next_start, overlap, wait_for_previous

__all__ = ["add_rms_norm", "attention", "rope_and_cache", "silu_mul", "upload"]


@triton.jit(do_not_specialize=["cells"])
def _upload(
    host_ptr, ptr, cells, host_tables_ptr, tables_ptr, stride, extent_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program, flat = tl.program_id(0), tl.cdiv(cells, BLOCK)
    at = tl.arange(0, BLOCK)
    if program < flat:
        at += program * BLOCK
        tl.store(ptr + at, tl.load(host_ptr + at, mask=at < cells), mask=at < cells)
    elif program - flat < tl.load(extent_ptr):
        row, width = (program - flat).to(tl.int64) * stride, tl.load(extent_ptr + 1)
        for start in range(0, width, BLOCK):
            mine, cell = start + at < width, row + start + at
            value = tl.load(host_tables_ptr + cell, mask=mine)
            tl.store(tables_ptr + cell, value, mask=mine)


UPLOAD_BLOCK = 512
"""Cells that a program of `upload` reads at a time."""


def upload(
    host: torch.Tensor,
    device: torch.Tensor,
    cells: int,
    host_tables: torch.Tensor,
    tables: torch.Tensor,
    extent: torch.Tensor,
    most_rows: int,
) -> None:
    """Copy the first `cells` of `host` and a corner of `host_tables`: `extent` int32[2] says how many rows and columns.

    All of the host's are int32 in pinned memory. A kernel reads them: the copy engine takes one copy after the other, and a step
    would wait for all of an adapter's. What differs between steps of a graph, the extent, it reads as well; `most_rows` does not.
    """
    grid = (triton.cdiv(cells, UPLOAD_BLOCK) + most_rows,)
    _upload[grid](host, device, cells, host_tables, tables, tables.stride(0), extent, BLOCK=UPLOAD_BLOCK, num_warps=4)


@triton.jit
def _add_rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, width, eps, has_x: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    value = tl.load(residual_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
    if has_x:
        value += tl.load(x_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual_ptr + row * width + column, value.to(residual_ptr.dtype.element_ty), mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
    tl.store(out_ptr + row * width + column, (value * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


NORM_WARPS, NORM_REGISTERS = 16, 24
"""Of a norm's program, a row of up to 4 096 columns: so few that it is resident before the base product ahead of it has ended."""


def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float
) -> None:
    """`residual += x` (if given), `out = rms_norm(residual) * weight`; all [T, width]."""
    width = residual.shape[1]
    source = residual if x is None else x
    block = triton.next_power_of_2(width)
    few = {"maxnreg": NORM_REGISTERS} if block <= 256 * NORM_WARPS else {}
    _add_rms_norm[(residual.shape[0],)](
        source,
        residual,
        weight,
        out,
        width,
        eps,
        has_x=x is not None,
        BLOCK=block,
        num_warps=NORM_WARPS,
        **few,
        **overlap(),
    )


@triton.jit
def _rope_and_cache(
    qkv_ptr, qkv_stride, cos_sin_ptr, positions_ptr, kv_slots_ptr, k_ptr, v_ptr,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, block_size: tl.constexpr,
    ROTATED: tl.constexpr, COPIED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    t = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + t)
    slot = tl.load(kv_slots_ptr + t).to(tl.int64)
    if slot < 0:
        return
    half: tl.constexpr = dim // 2
    kind = qkv_ptr.dtype.element_ty
    first_cell = (slot // block_size) * kv_heads * block_size + slot % block_size
    d = tl.arange(0, half)
    cos = tl.load(cos_sin_ptr + position * dim + d)[None, :]
    sin = tl.load(cos_sin_ptr + position * dim + half + d)[None, :]
    wait_for_previous(PDL)
    head = tl.arange(0, ROTATED)[:, None]  # of q, then of k
    there = head < heads + kv_heads
    base = qkv_ptr + t * qkv_stride + head * dim + d[None, :]
    lower = tl.load(base, mask=there, other=0.0).to(tl.float32)
    upper = tl.load(base + half, mask=there, other=0.0).to(tl.float32)
    rotated_lower = (lower * cos - upper * sin).to(kind)
    rotated_upper = (upper * cos + lower * sin).to(kind)
    tl.store(base, rotated_lower, mask=head < heads)
    tl.store(base + half, rotated_upper, mask=head < heads)
    k = k_ptr + (first_cell + (head - heads) * block_size) * dim + d[None, :]
    tl.store(k, rotated_lower, mask=there & (head >= heads))
    tl.store(k + half, rotated_upper, mask=there & (head >= heads))
    kv_head = tl.arange(0, COPIED)[:, None]
    whole = tl.arange(0, dim)[None, :]
    value = tl.load(
        qkv_ptr + t * qkv_stride + (heads + kv_heads + kv_head) * dim + whole, mask=kv_head < kv_heads, other=0.0
    )
    tl.store(v_ptr + (first_cell + kv_head * block_size) * dim + whole, value, mask=kv_head < kv_heads)


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
    rotated, copied = triton.next_power_of_2(heads + kv_heads), triton.next_power_of_2(kv_heads)
    _rope_and_cache[(qkv.shape[0],)](
        qkv, qkv.stride(0), cos_sin, positions, kv_slots, k_cache, v_cache, heads=heads, kv_heads=kv_heads, dim=dim,
        block_size=block_size, ROTATED=rotated, COPIED=copied, num_warps=8, **overlap(),
    )  # fmt: skip


@triton.jit
def _silu_mul(x_ptr, out_ptr, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    enter(PDL)
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(x: torch.Tensor, out: torch.Tensor) -> None:
    """SwiGLU: `out[T, w] = silu(x[:, :w]) * x[:, w:]`."""
    rows, width = out.shape
    _silu_mul[(rows, triton.cdiv(width, 1024))](x, out, width, BLOCK=1024, num_warps=4, **overlap())
