"""SGMV on a GPU: against float64, poisoned scratch, one graph for every mix, and I9 bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from banks import exact, random_bank

from backend.geometry import load_geometry
from backend.sgmv import Segments, SlotBank, sgmv

pytestmark = pytest.mark.gpu

LINEARS = load_geometry("llama-3.1-8b").linears()
ODD = {
    "q_proj": (3584, 3584),
    "k_proj": (3584, 520),
    "v_proj": (3584, 520),
    "o_proj": (3584, 3584),
    "gate_proj": (3584, 1896),
    "up_proj": (3584, 1896),
    "down_proj": (1896, 3584),
}
RANKS = [8, 16, 32, 64, 16, 8, 4, 48, 1, 24, 128, 7]
BATCHES = 700
"""Random batches of each of the four linears in the I9 test."""


@pytest.fixture(scope="module")
def bank() -> SlotBank:
    return random_bank(LINEARS, RANKS, torch.bfloat16)


def run(
    x: torch.Tensor, base: torch.Tensor, bank: SlotBank, name: str, slots: torch.Tensor, buffers: Segments
) -> torch.Tensor:
    out = base.clone()
    buffers.partials.fill_(float("nan"))
    sgmv(x, out, bank, bank.layout.layers[0][name], buffers.of(slots, bank))
    return out


@pytest.mark.parametrize("engine", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [LINEARS, ODD], ids=["llama", "odd"])
def test_grouped_equals_float64(engine: str, dtype: torch.dtype, shape: dict[str, tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    bank = random_bank(shape, RANKS, dtype)
    for name in ("qkv", "o", "gate_up", "down"):
        linear = bank.layout.layers[0][name]
        for rows in (1, 7, 33, 256, 600, 2500):
            slots = torch.tensor(rng.integers(-1, len(RANKS), rows), dtype=torch.int32, device="cuda")
            if rows == 1:
                slots[0] = 3
            wide = torch.randn(rows, linear.in_features + 64, device="cuda").to(dtype)
            x, width = wide[:, : linear.in_features], sum(linear.out_features)
            whole = torch.zeros(rows, width + 128, device="cuda", dtype=dtype)
            buffers = Segments.allocate(rows, bank, engine=engine)
            out = whole[:, :width]
            sgmv(x, out, bank, linear, buffers.of(slots, bank))
            assert bool((whole[:, width:] == 0).all())
            assert bool((out[slots < 0] == 0).all())
            truth = exact(x, bank, name, slots)
            error = float((out.double() - truth).norm() / truth.norm())
            assert error < 4e-3, f"{name} rows={rows}: {error}"


@pytest.mark.parametrize("engine", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
def test_a_row_alone_has_the_same_bits(bank: SlotBank, name: str, engine: str) -> None:
    """I9: every batch draws mixed ranks and lengths; its rows are run again alone, and in a batch of other rows."""
    rng = np.random.default_rng(sum(map(ord, name)))
    linear = bank.layout.layers[0][name]
    width = sum(linear.out_features)
    compared = 0
    rows_most = 2600
    x = torch.randn(rows_most, linear.in_features, device="cuda", dtype=torch.bfloat16)
    base = torch.randn(rows_most, width, device="cuda", dtype=torch.bfloat16)
    # Every row with every adapter, from batches of one row each: what all others must equal.
    sample = rng.choice(rows_most, 24, replace=False)
    buffers = Segments.allocate(rows_most, bank, engine=engine)
    alone = {}
    for t in sample.tolist():
        for slot in range(len(RANKS)):
            slots = torch.tensor([slot], dtype=torch.int32, device="cuda")
            alone[t, slot] = run(x[t : t + 1], base[t : t + 1], bank, name, slots, buffers)[0]
    for batch in range(BATCHES if engine == "cuda" else BATCHES // 10):
        rows = int(
            rng.choice([2, 5, 8, 9, 30, 64, 65, 200, 512, 513, 1100, 2049, rows_most][: 13 if batch % 20 == 0 else 8])
        )
        chosen = rng.choice(sample, rng.integers(1, min(rows, 12) + 1), replace=False)
        order = np.concatenate([chosen, rng.integers(0, rows_most, rows - len(chosen))])
        rng.shuffle(order)
        few = rng.integers(1, len(RANKS) + 1)
        slot_list = rng.choice(np.arange(-1, few), rows)
        if batch % 3 == 0:
            slot_list = np.sort(slot_list)
        index = torch.tensor(order, device="cuda")
        slots = torch.tensor(slot_list, dtype=torch.int32, device="cuda")
        out = run(x[index], base[index], bank, name, slots, buffers)
        assert torch.equal(out[slots < 0], base[index][slots < 0])
        for place in np.nonzero(np.isin(order, sample))[0].tolist():
            if slot_list[place] >= 0:
                same = torch.equal(out[place], alone[int(order[place]), int(slot_list[place])])
                assert same, f"batch {batch} of {rows} rows: row {place} differs from itself alone"
                compared += 1
    print(f"{engine} {name}: {compared} rows compared bit for bit")
    assert compared > 100


def test_one_graph_serves_every_mix(bank: SlotBank) -> None:
    rng = np.random.default_rng(5)
    linear = bank.layout.layers[0]["qkv"]
    for rows in (4, 40, 300, 1500):
        x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        base = torch.randn(rows, 6144, device="cuda", dtype=torch.bfloat16)
        slots = torch.full((rows,), -1, dtype=torch.int32, device="cuda")
        out, buffers = base.clone(), Segments.allocate(rows, bank)
        sgmv(x, out, bank, linear, buffers.of(slots, bank))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out.copy_(base)
            sgmv(x, out, bank, linear, buffers.of(slots, bank))
        for distinct in (0, 1, 3, len(RANKS)):
            mix = rng.integers(-1, distinct, rows) if distinct else np.full(rows, -1)
            slots.copy_(torch.tensor(mix, dtype=torch.int32))
            graph.replay()
            assert torch.equal(out, run(x, base, bank, "qkv", slots, Segments.allocate(rows, bank)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [LINEARS, ODD], ids=["llama", "odd"])
def test_swiglu_in_the_expand_has_the_bits_of_both_apart(shape: dict[str, tuple[int, int]], dtype: torch.dtype) -> None:
    from backend import ops_triton
    from backend.sgmv import cuda_kernels

    bank, rng = random_bank(shape, RANKS, dtype), np.random.default_rng(3)
    linear = bank.layout.layers[0]["gate_up"]
    for rows, adapters in ((512, 1), (600, len(RANKS)), (2048, 1), (2300, len(RANKS)), (4000, 3)):
        x = torch.randn(rows, linear.in_features, device="cuda", dtype=dtype)
        base = torch.randn(rows, sum(linear.out_features), device="cuda", dtype=dtype)
        base[:, : linear.out_features[0]] *= 40  # of some gates e^x is 0, or as good as infinite
        slots = torch.tensor(np.sort(rng.integers(-1, adapters, rows)), dtype=torch.int32, device="cuda")
        segments = Segments.allocate(rows, bank).of(slots, bank)
        assert cuda_kernels.takes_swiglu(linear, segments)
        whole, activated = base.clone(), torch.full_like(base[:, : linear.out_features[0]], float("nan"))
        apart = activated.clone()
        sgmv(x, whole, bank, linear, segments)
        ops_triton.silu_mul(whole, apart)
        cuda_kernels.shrink(x, bank, linear, segments)
        cuda_kernels.expand_swiglu(base, activated, bank, linear, segments)
        assert torch.isfinite(activated).all()
        assert torch.equal(activated, apart)
