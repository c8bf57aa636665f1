"""The decoder's small operations as Triton kernels: norm, rotary and KV write, paged attention, SwiGLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from backend.attention_triton import attention
from backend.dependent_launch import enter, overlap

__all__ = ["add_rms_norm", "attention", "rope_and_cache", "silu_mul"]


@triton.jit
def _add_rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, width, eps, has_x: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    enter(PDL)
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
        source, residual, weight, out, width, eps, has_x=x is not None, BLOCK=block, num_warps=8, **overlap()
    )


@triton.jit
def _rope_and_cache(
    qkv_ptr, qkv_stride, cos_sin_ptr, positions_ptr, kv_slots_ptr, k_ptr, v_ptr,
    heads: tl.constexpr, kv_heads: tl.constexpr, dim: tl.constexpr, block_size: tl.constexpr,
    ROTATED: tl.constexpr, COPIED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
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
def _silu_mul(x_ptr, out_ptr, slots_ptr, width, BASE_ONLY: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    enter(PDL)
    row = tl.program_id(0).to(tl.int64)
    if BASE_ONLY:
        if tl.load(slots_ptr + row) >= 0:
            return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(x: torch.Tensor, out: torch.Tensor, slots: torch.Tensor | None = None) -> None:
    """SwiGLU: `out[T, w] = silu(x[:, :w]) * x[:, w:]`; with `slots` int32[T] only of rows whose slot is -1."""
    width = out.shape[1]
    _silu_mul[(out.shape[0], triton.cdiv(width, 1024))](
        x, out, x if slots is None else slots, width, BASE_ONLY=slots is not None, BLOCK=1024, num_warps=4, **overlap()
    )
