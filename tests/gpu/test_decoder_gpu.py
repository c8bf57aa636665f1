"""The decoder's Triton operations on a GPU equal their torch reference; a captured step equals an eager one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("heads", [32, 28])
@pytest.mark.parametrize("short", [False, True])
def test_attention_and_rope_equal_the_reference(heads: int, *, short: bool) -> None:
    """`short`: no request has more than a tile of queries, so that attention itself rotates and writes to the cache."""
    from backend import ops_torch, ops_triton
    from backend.base import StepBatch
    from backend.step_inputs import DECODE_TILE, lay_out, prefill_tile

    kv_heads, dim, size = heads // 4 if heads == 32 else 4, 128, 16
    query, context = ((1, 1, 4, 3, 2), (500, 17, 0, 126, 63)) if short else ((1, 1, 70, 3, 200), (500, 17, 0, 90, 33))
    blocks = [-(-(q + c) // size) for q, c in zip(query, context, strict=True)]
    ids = np.random.default_rng(0).permutation(sum(blocks)).astype(np.int32)
    tables = np.zeros((5, max(blocks)), dtype=np.int32)
    starts = np.cumsum([0, *blocks])
    for i, count in enumerate(blocks):
        tables[i, :count] = ids[starts[i] : starts[i] + count]
    inputs = lay_out(StepBatch(query, context, (-1,) * 5, (True,) * 5), tables, size, prefill_tile(heads // kv_heads))
    qkv = torch.randn(inputs.rows, (heads + 2 * kv_heads) * dim, dtype=torch.bfloat16, device="cuda")
    cache = torch.randn(2, len(ids), kv_heads, size, dim, dtype=torch.bfloat16, device="cuda")
    cos_sin = torch.randn(1024, dim, device="cuda")
    results = []
    for ops, device in ((ops_triton, "cuda"), (ops_torch, "cpu")):
        mine, k, v = (t.clone().to(device) for t in (qkv, cache[0], cache[1]))
        if device == "cpu":
            mine, k, v = mine.float(), k.float(), v.float()
        moved = [torch.from_numpy(a).to(device) for a in inputs.arrays()]
        _, positions, kv_slots, _, decode, prefill, _, _ = moved
        out = torch.full((inputs.rows, heads * dim), float("nan"), dtype=mine.dtype, device=device)
        table = torch.from_numpy(tables).to(device)
        if short and ops is ops_triton:
            ops.attention(mine, k, v, out, decode, table, heads, DECODE_TILE, cos_sin)
        else:
            ops.rope_and_cache(mine, cos_sin.to(device), positions, kv_slots, k, v, heads)
            ops.attention(mine, k, v, out, decode, table, heads, DECODE_TILE)
            ops.attention(mine, k, v, out, prefill, table, heads, prefill_tile(heads // kv_heads))
        results.append((out.double().cpu(), k.double().cpu(), v.double().cpu()))
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).norm() / reference.norm() < 1e-2


def test_graph_replay_equals_eager() -> None:
    from backend.base import AdapterShape, EngineLimits, StepBatch
    from backend.geometry import load_geometry
    from backend.live import LiveBackend
    from backend.measure import ALL_MODULES

    geometry = load_geometry("llama-3.2-1b")
    limits = EngineLimits(4, 64, 32, 512, 2048, 16, 0.9)
    backend = LiveBackend(geometry, limits, 400, device="cuda")
    for slot, rank in enumerate((8, 16, 32, 64)):
        adapter = AdapterShape(slot + 1, rank, ALL_MODULES)
        backend.stage(adapter)
        backend.load(adapter, slot)
    tables = tuple(tuple(range(i * 8, i * 8 + 8)) for i in range(5))
    batch = StepBatch((1,) * 5, (100, 90, 80, 70, 127), (0, 1, -1, 3, 3), (True,) * 5, tables)
    backend.execute(batch)
    graph_logits = backend.decoder.logits[:5].clone()
    backend.decoder.last_token.zero_()
    inputs = backend._pack(backend.layout(batch))
    backend._upload(inputs)
    backend.execute(batch)
    replayed = backend.decoder.logits[:5].clone()
    backend.decoder.last_token.zero_()
    inputs = backend._pack(backend.layout(batch))
    backend._upload(inputs)
    backend.decoder.forward(inputs, backend._tables)
    eager = backend.decoder.logits[:5]
    assert torch.isfinite(eager).all()
    assert graph_logits.shape == replayed.shape
    assert (replayed.double() - eager.double()).norm() / eager.double().norm() < 2e-2
    backend.close()


def test_close_gives_the_memory_back() -> None:
    from backend.base import EngineLimits, StepBatch
    from backend.geometry import load_geometry
    from backend.live import LiveBackend

    before = torch.cuda.memory_allocated()
    backend = LiveBackend(load_geometry("llama-3.2-1b"), EngineLimits(2, 16, 8, 64, 1024, 16, 0.9), 200, device="cuda")
    backend.execute(StepBatch((1,), (5,), (-1,), (True,), ((0,),)))
    assert torch.cuda.memory_allocated() > before + 2e9
    backend.close()
    assert torch.cuda.memory_allocated() < before + 1e8
