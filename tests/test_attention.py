"""Paged attention in Triton, interpreted on the CPU, equals the torch reference: split keys, chunks, padding tiles."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from backend import ops_torch
from backend.base import StepBatch
from backend.step_inputs import DECODE_TILE, IntArray, lay_out, prefill_tile

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 (make test sets it)"
)


def block_tables(query: tuple[int, ...], context: tuple[int, ...], size: int) -> tuple[IntArray, int]:
    """Block tables of requests over blocks in random order, and how many blocks there are."""
    blocks = [-(-(q + c) // size) for q, c in zip(query, context, strict=True)]
    ids = np.random.default_rng(0).permutation(sum(blocks)).astype(np.int32)
    tables, starts = np.zeros((len(blocks), max(blocks)), dtype=np.int32), np.cumsum([0, *blocks])
    for i, count in enumerate(blocks):
        tables[i, :count] = ids[starts[i] : starts[i] + count]
    return tables, len(ids)


@interpreted
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2)])
@pytest.mark.parametrize(("splits", "programs"), [(1, 528), (8, 528), (32, 64), (1, 4)])
def test_attention_equals_the_reference(
    heads: int, kv_heads: int, splits: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = pytest.importorskip("backend.attention_triton", reason="triton is not installed")
    monkeypatch.setattr(ops, "MOST_SPLITS", splits)
    monkeypatch.setattr(ops, "PROGRAMS", programs)
    dim, size, query, context = 16, 4, (1, 1, 3, 9, 9), (300, 0, 90, 20, 150)
    tables, used = block_tables(query, context, size)
    long_tile = prefill_tile(heads // kv_heads)
    inputs = lay_out(StepBatch(query, context, (-1,) * 5, (True,) * 5), tables, size, long_tile)
    torch.manual_seed(0)
    qkv = torch.randn(inputs.rows, (heads + 2 * kv_heads) * dim)
    k, v = torch.randn(2, used, kv_heads, size, dim)
    nothing = np.full((1, 4), -1, dtype=np.int32)
    decode, prefill = (
        torch.from_numpy(np.concatenate([t, nothing])) for t in (inputs.decode_tiles, inputs.prefill_tiles)
    )
    outs = []
    for module in (ops, ops_torch):
        out = torch.full((inputs.rows, heads * dim), float("nan"))
        module.attention(qkv, k, v, out, decode, torch.from_numpy(tables), heads, DECODE_TILE)
        module.attention(qkv, k, v, out, prefill, torch.from_numpy(tables), heads, long_tile)
        outs.append(out)
    assert torch.isfinite(outs[1]).all()
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2)])
@pytest.mark.parametrize("most_splits", [1, 32])
def test_short_requests_are_rotated_and_cached_by_attention_itself(
    heads: int, kv_heads: int, most_splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rotary, cache writes and attention one after the other: also where a request's own tokens lie in two shares of its keys."""
    ops = pytest.importorskip("backend.attention_triton", reason="triton is not installed")
    monkeypatch.setattr(ops, "MOST_SPLITS", most_splits)
    dim, size, query, context = 16, 4, (1, 1, 3, 4, 2), (300, 0, 62, 126, 511)
    tables, used = block_tables(query, context, size)
    inputs = lay_out(StepBatch(query, context, (-1,) * 5, (True,) * 5), tables, size, 64)
    assert not len(inputs.prefill_tiles)
    torch.manual_seed(0)
    qkv = torch.randn(inputs.rows, (heads + 2 * kv_heads) * dim)
    cache, cos_sin = torch.randn(2, used, kv_heads, size, dim), torch.randn(600, dim)
    tiles = torch.from_numpy(np.concatenate([inputs.decode_tiles, np.full((1, 4), -1, dtype=np.int32)]))
    results = []
    for module in (ops, ops_torch):
        (k, v), out = cache.clone(), torch.full((inputs.rows, heads * dim), float("nan"))
        module.attention(qkv.clone(), k, v, out, tiles, torch.from_numpy(tables), heads, DECODE_TILE, cos_sin)
        results.append((out, k, v))
    apart, (k, v), out = qkv.clone(), cache.clone(), torch.empty_like(results[0][0])
    ops_torch.rope_and_cache(
        apart, cos_sin, torch.from_numpy(inputs.positions), torch.from_numpy(inputs.kv_slots), k, v, heads
    )
    ops_torch.attention(apart, k, v, out, tiles, torch.from_numpy(tables), heads, DECODE_TILE)
    for ours, reference, steps in zip(*results, (out, k, v), strict=True):
        torch.testing.assert_close(ours, steps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reference, steps)
    assert not torch.equal(k, cache[0])


def test_plans_fill_the_processors_whatever_the_batch() -> None:
    ops = pytest.importorskip("backend.attention_triton", reason="triton is not installed")
    plans = {count: ops.plan(count, 8, 16) for count in (1, 2, 3, 16, 17, 33, 34, 256)}
    assert {count: (p.splits, p.least, p.block_n) for count, p in plans.items()} == {
        1: (32, 64, 64), 2: (32, 64, 64), 3: (16, 128, 64), 16: (4, 128, 64),
        17: (1, 128, 128), 33: (1, 128, 128), 34: (1, 64, 64), 256: (1, 64, 64),
    }  # fmt: skip


def test_tiles_of_long_chunks_fill_a_processor() -> None:
    assert [prefill_tile(group) for group in (1, 4, 7, 8)] == [64, 64, 32, 32]
