"""The decoder's small operations in plain torch: the CPU's implementation and the kernels' reference."""

from __future__ import annotations

import torch


def upload(
    host: torch.Tensor,
    device: torch.Tensor,
    cells: int,
    host_tables: torch.Tensor,
    tables: torch.Tensor,
    extent: torch.Tensor,
    most_rows: int,
) -> None:
    """Copy the first `cells` of `host` and the corner of `host_tables` that is `extent` large, as in `ops_triton`."""
    rows, width = extent.tolist()
    assert rows <= most_rows
    device[:cells].copy_(host[:cells])
    tables[:rows, :width].copy_(host_tables[:rows, :width])


def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float
) -> None:
    """`residual += x` (if given), `out = rms_norm(residual) * weight`; all [T, width]."""
    if x is not None:
        residual += x
    value = residual.float()
    value = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
    out.copy_(value * weight.float())


def rope_and_cache(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    heads: int,
) -> None:
    """Rotate q in place and write rotated k and v into their cache cells; shapes as in `ops_triton`."""
    _, kv_heads, block_size, dim = k_cache.shape
    parts = qkv.view(len(qkv), heads + 2 * kv_heads, dim)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)
    lower, upper = parts[:, : heads + kv_heads].float().chunk(2, -1)
    rotated = torch.cat([lower * cos - upper * sin, upper * cos + lower * sin], -1).to(qkv.dtype)
    live = kv_slots >= 0
    block, offset = kv_slots[live] // block_size, kv_slots[live] % block_size
    k_cache[block, :, offset] = rotated[live, heads:]
    v_cache[block, :, offset] = parts[live, heads + kv_heads :]
    parts[:, :heads] = rotated[:, :heads]


def attention(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    tiles: torch.Tensor,
    tables: torch.Tensor,
    heads: int,
    tile_queries: int,  # noqa: ARG001 - one signature with the Triton kernel, which needs it
    cos_sin: torch.Tensor | None = None,
) -> None:
    """Causal grouped-query attention over paged keys and values; shapes as in `ops_triton`."""
    _, kv_heads, block_size, dim = k_cache.shape
    for request, row, position, count in tiles.tolist():
        if request < 0:
            continue
        end = position + count
        if cos_sin is not None:
            positions = torch.arange(position, end)
            cells = tables[request, positions // block_size] * block_size + positions % block_size
            rope_and_cache(qkv[row : row + count], cos_sin, positions, cells, k_cache, v_cache, heads)
        blocks = tables[request, : -(-end // block_size)].long()
        k = k_cache[blocks].transpose(0, 1).reshape(kv_heads, -1, dim)[:, :end]
        v = v_cache[blocks].transpose(0, 1).reshape(kv_heads, -1, dim)[:, :end]
        q = qkv[row : row + count, : heads * dim].view(count, heads, dim).transpose(0, 1)
        seen = torch.arange(end)[None, :] <= torch.arange(position, end)[:, None]
        result = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, enable_gqa=True
        )
        out[row : row + count] = result[0].transpose(0, 1).reshape(count, heads * dim)


def silu_mul(x: torch.Tensor, out: torch.Tensor) -> None:
    """SwiGLU: `out[T, w] = silu(x[:, :w]) * x[:, w:]`."""
    gate, up = x.chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate.float()) * up.float())
