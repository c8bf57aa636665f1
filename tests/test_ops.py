"""The decoder's small Triton kernels, interpreted on the CPU, equal their torch references."""

from __future__ import annotations

import os

import pytest
import torch

from backend import ops_torch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 (make test sets it)"
)
ops = pytest.importorskip("backend.ops_triton", reason="triton is not installed")


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (7, 3)])
def test_rope_rotates_and_writes_the_cache(heads: int, kv_heads: int) -> None:
    dim, size, rows = 16, 4, 5
    torch.manual_seed(heads)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim)
    angles = torch.randn(32, dim // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    positions = torch.tensor([3, 0, 31, 7, 9], dtype=torch.int32)
    cells = torch.tensor([5, 0, -1, 11, 6], dtype=torch.int32)
    results = []
    for module in (ops, ops_torch):
        mine = qkv.clone()
        k, v = (torch.full((3, kv_heads, size, dim), 7.0) for _ in range(2))
        module.rope_and_cache(mine, cos_sin, positions, cells, k, v, heads)
        results.append((mine[cells >= 0, : heads * dim], k, v))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)
    assert (results[0][1] == 7.0).any()


def test_inputs_go_up_as_far_as_they_are_used() -> None:
    host, tables = torch.arange(1300, dtype=torch.int32), torch.arange(5 * 700, dtype=torch.int32).view(5, 700)
    extent = torch.tensor([3, 600], dtype=torch.int32)
    for module in (ops, ops_torch):
        got, rows = torch.full_like(host, -1), torch.full_like(tables, -1)
        module.upload(host, got, 1100, tables, rows, extent, 4)
        assert torch.equal(got[:1100], host[:1100])
        assert torch.equal(rows[:3, :600], tables[:3, :600])
        assert (got[1100:] == -1).all()
        assert (rows[3:] == -1).all()
        assert (rows[:, 600:] == -1).all()


@pytest.mark.parametrize("width", [24, 64])
def test_norm_adds_to_the_residual(width: int) -> None:
    x, residual, weight = torch.randn(3, width), torch.randn(3, width), torch.randn(width)
    for given in (x, None):
        results = []
        for module in (ops, ops_torch):
            kept, out = residual.clone(), torch.empty_like(x)
            module.add_rms_norm(given, kept, weight, out, 1e-5)
            results.append((kept, out))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)


def test_swiglu() -> None:
    x = torch.randn(21, 2 * 2100)
    wanted, out = torch.empty(2, 21, 2100)
    ops_torch.silu_mul(x, wanted)
    ops.silu_mul(x, out)
    torch.testing.assert_close(out, wanted)
