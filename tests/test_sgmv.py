"""SGMV: grouped rows equal each adapter applied alone, in float64, and in the kernels through Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.sgmv import TILE_ROWS, Segments, SlotBank, SlotLayout, sgmv_reference

LINEARS = {
    "q_proj": (256, 128),
    "k_proj": (256, 64),
    "v_proj": (256, 64),
    "o_proj": (128, 256),
    "gate_proj": (256, 192),
    "up_proj": (256, 192),
    "down_proj": (192, 256),
}


def filled_bank(ranks: list[int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> SlotBank:
    """A bank whose unused tails hold NaN, so that reading past a true rank shows."""
    generator = torch.Generator().manual_seed(seed)
    bank = SlotBank(SlotLayout.of(LINEARS, 2), len(ranks), max(ranks), dtype=dtype, device=torch.device(device))
    bank.weights.fill_(float("nan"))
    for slot, rank in enumerate(ranks):
        packed = torch.randn(rank * bank.layout.unit, generator=generator) * 0.1
        bank.write(slot, packed.to(dtype).to(device), rank, 0.5 + slot)
    return bank


def alone(x: torch.Tensor, bank: SlotBank, name: str, slots: torch.Tensor) -> torch.Tensor:
    """Each row by itself, in float64, straight from the formula."""
    linear = bank.layout.layers[1][name]
    out = torch.zeros(len(x), sum(linear.out_features), dtype=torch.float64)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            parts = [
                bank.scaling[slot].double()
                * (bank.b(slot, linear, i).double().T @ (bank.a(slot, linear, i).double() @ x[t].double()))
                for i in range(linear.slices)
            ]
            out[t] = torch.cat(parts)
    return out


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=80))
def test_segments_cover_every_adapted_row_once(row_slots: list[int]) -> None:
    slots = np.array(row_slots, dtype=np.int32)
    segments = Segments.of(slots)
    seen: list[int] = []
    for slot, first, count in segments.tiles.tolist():
        assert 1 <= count <= TILE_ROWS
        rows = segments.rows[first : first + count]
        assert np.all(slots[rows] == slot)
        seen += rows.tolist()
    assert sorted(seen) == np.nonzero(slots >= 0)[0].tolist()


@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
@settings(max_examples=20, deadline=None)
@given(row_slots=st.lists(st.integers(-1, 2), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_reference_equals_each_adapter_alone(name: str, row_slots: list[int], seed: int) -> None:
    bank = filled_bank([8, 16, 32], torch.float64, seed=seed)
    linear = bank.layout.layers[1][name]
    slots = torch.tensor(row_slots, dtype=torch.int32)
    x = torch.randn(len(slots), linear.in_features, dtype=torch.float64)
    base = torch.randn(len(slots), sum(linear.out_features), dtype=torch.float64)
    out = base.clone()
    sgmv_reference(x, out, bank, linear, slots)
    torch.testing.assert_close(out - base, alone(x, bank, name, slots), rtol=1e-9, atol=1e-9)
    assert torch.equal(out[slots < 0], base[slots < 0])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 (make test sets it)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
def test_kernels_in_the_interpreter(name: str, dtype: torch.dtype) -> None:
    from backend.sgmv.kernels import scratch_elements, sgmv

    rng = np.random.default_rng(7)
    torch.manual_seed(7)
    bank = filled_bank([8, 40, 16], dtype)
    linear = bank.layout.layers[1][name]
    for rows in (1, 5, 23):
        slots = rng.integers(-1, 3, rows).astype(np.int32)
        segments = Segments.of(slots)
        padded = np.concatenate([segments.tiles, np.full((2, 3), -1, dtype=np.int32)])
        wide = torch.randn(rows, linear.in_features + 32, dtype=dtype)
        x = wide[:, : linear.in_features]
        base = torch.randn(rows, sum(linear.out_features), dtype=dtype)
        out = base.clone()
        poison = torch.full((scratch_elements(rows, 40, 256),), float("nan"))
        index = torch.zeros(rows, dtype=torch.int32)
        index[: len(segments.rows)] = torch.from_numpy(segments.rows)
        sgmv(x, out, bank, linear, index, torch.from_numpy(padded), poison)
        expected = alone(x, bank, name, torch.from_numpy(slots)) + base.double()
        assert torch.equal(out[slots < 0], base[slots < 0])
        error = (out.double() - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-3)
        for t in range(rows):
            if slots[t] < 0:
                continue
            single = base[t : t + 1].clone()
            one = Segments.of(slots[t : t + 1])
            sgmv(x[t : t + 1], single, bank, linear, torch.from_numpy(one.rows), torch.from_numpy(one.tiles), poison)
            # The interpreter multiplies with numpy's BLAS, which promises no order; bit equality is the GPU test's.
            apart = (single[0].double() - out[t].double()).norm() / out[t].double().norm()
            assert apart < (1e-5 if dtype == torch.float32 else 1e-3)
