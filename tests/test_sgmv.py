"""SGMV: grouped rows equal each adapter applied alone, in float64, and in the Triton kernels through the interpreter."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.sgmv import Segments, SlotBank, SlotLayout, sgmv, sgmv_reference
from backend.sgmv.segments import MOST_CUTS, _build_in_torch
from backend.sgmv.tilings import ALL, Tiling, cuts, for_expand, for_shrink

LINEARS = {
    "q_proj": (256, 128),
    "k_proj": (256, 72),  # no multiple of a kernel's column block
    "v_proj": (256, 72),
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


@settings(deadline=None)
@given(st.lists(st.integers(-1, 5), min_size=1, max_size=80), st.sampled_from([8, 16, 64]))
def test_segments_cover_every_adapted_row_once(row_slots: list[int], tile_rows: int) -> None:
    ranks = [8, 16, 4, 64, 1, 32]
    bank = filled_bank(ranks, torch.float32)
    slots = torch.tensor(row_slots, dtype=torch.int32)
    segments = Segments.allocate(len(slots), bank, engine="triton").of(slots, bank)
    segments.cuts = (replace(segments.cuts[0], tiling=Tiling(tile_rows, "", "")),)
    _build_in_torch(segments, bank)
    (cut,) = segments.cuts
    seen: list[int] = []
    used = set()
    for slot, first, count, rank in cut.tiles[: int(cut.header[0])].tolist():
        assert 1 <= count <= tile_rows
        assert rank == ranks[slot]
        rows = segments.rows[first : first + count]
        assert bool((slots[rows.long()] == slot).all())
        seen += rows.tolist()
        used.add(slot)
    assert sorted(seen) == torch.nonzero(slots >= 0).squeeze(1).tolist()
    assert int(cut.header[1]) == max((ranks[slot] for slot in used), default=0)
    assert int(cut.header[0]) <= segments.most_tiles(len(ranks))


@given(st.integers(1, 20_000), st.sampled_from([8, 16, 64, 128, 512]), st.integers(1, 3), st.integers(128, 30_000))
def test_every_batch_is_cut_into_the_tiles_that_its_kernels_take(
    rows: int, max_rank: int, slices: int, width: int
) -> None:
    made = cuts(rows, max_rank)
    assert 1 <= len(made) <= MOST_CUTS
    assert set(made) <= set(ALL)
    for later, now in zip(cuts(rows + 1, max_rank), made, strict=False):
        assert later.tile_rows >= now.tile_rows
    assert for_shrink(rows, max_rank, slices, width) in made
    assert for_expand(rows, max_rank, slices * width) in made


@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
@settings(max_examples=20, deadline=None)
@given(row_slots=st.lists(st.integers(-1, 2), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_reference_equals_each_adapter_alone(name: str, row_slots: list[int], seed: int) -> None:
    bank = filled_bank([8, 16, 32], torch.float64, seed=seed)
    linear = bank.layout.layers[1][name]
    slots = torch.tensor(row_slots, dtype=torch.int32)
    x = torch.randn(len(slots), linear.in_features, dtype=torch.float64)
    base = torch.randn(len(slots), sum(linear.out_features), dtype=torch.float64)
    out, through = base.clone(), base.clone()
    sgmv_reference(x, out, bank, linear, slots)
    sgmv(x, through, bank, linear, Segments.allocate(len(slots), bank).of(slots, bank))
    assert torch.equal(out, through)
    torch.testing.assert_close(out - base, alone(x, bank, name, slots), rtol=1e-9, atol=1e-9)
    assert torch.equal(out[slots < 0], base[slots < 0])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 (make test sets it)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
@settings(max_examples=4, deadline=None)
@given(
    row_slots=st.lists(st.integers(-1, 2), min_size=1, max_size=30),
    ranks=st.lists(st.sampled_from([1, 8, 12, 16, 40]), min_size=3, max_size=3),
    stride=st.sampled_from([0, 8, 32]),
)
def test_triton_kernels_in_the_interpreter(
    name: str, dtype: torch.dtype, row_slots: list[int], ranks: list[int], stride: int
) -> None:
    torch.manual_seed(7)
    bank = filled_bank(ranks, dtype)
    linear = bank.layout.layers[1][name]
    slots = torch.tensor(row_slots, dtype=torch.int32)
    rows, width = len(slots), sum(linear.out_features)
    x = torch.randn(rows, linear.in_features + stride, dtype=dtype)[:, : linear.in_features]
    base = torch.randn(rows, width + stride, dtype=dtype)
    buffers = Segments.allocate(rows, bank, engine="triton")
    buffers.partials.fill_(float("nan"))
    whole = base.clone()
    out = whole[:, :width]
    sgmv(x, out, bank, linear, buffers.of(slots, bank))
    expected = alone(x, bank, name, slots) + base[:, :width].double()
    assert torch.equal(whole[slots < 0], base[slots < 0])
    assert torch.equal(whole[:, width:], base[:, width:]), "wrote past the row's end"
    error = (out.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-3)
    for t in range(0, rows, 7):
        if slots[t] < 0:
            continue
        single = base[t : t + 1, :width].clone()
        sgmv(x[t : t + 1], single, bank, linear, buffers.of(slots[t : t + 1], bank))
        # The interpreter multiplies with numpy's BLAS, which promises no order; bit equality is the GPU test's.
        apart = (single[0].double() - out[t].double()).norm() / out[t].double().norm()
        assert apart < (1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("half", [False, True])
def test_cuda_kernels_compile(capability: tuple[int, int], half: bool) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    from backend.sgmv.nvrtc import compile_cubin

    try:
        cubin = compile_cubin(capability, half=half)
    except RuntimeError as error:
        pytest.skip(f"no NVRTC library: {error}")
    assert cubin[:4] == b"\x7fELF"
    from backend.sgmv.cuda_kernels import RESIDENT_BLOCKS

    wide = (
        {f"linear_wide_{rows}_{groups}" for rows in (64, 128) for groups in (1, 2)} if capability == (9, 0) else set()
    )
    few = {f"linear_{kind}{rows}" for kind in ("", "gated_") for rows in (8, 16, 32)}
    for name in {*RESIDENT_BLOCKS, "segment_map", "settle", *few, *wide}:
        assert name.encode() in cubin
    for name in {kernel for tiling in ALL for kernel in (tiling.shrink, tiling.expand)}:
        assert any(known.startswith(name) for known in RESIDENT_BLOCKS)


def test_a_broken_cuda_source_is_reported_by_file_and_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    from backend.errors import BackendError
    from backend.sgmv import nvrtc

    monkeypatch.setattr(nvrtc, "source", lambda: b'#line 1 "shrink.cu"\nint broken( {\n')
    try:
        nvrtc.compile_cubin((9, 0), half=False)
    except BackendError as error:
        assert "shrink.cu(1)" in str(error)
    except RuntimeError as error:
        pytest.skip(f"no NVRTC library: {error}")
    else:
        pytest.fail("compiled")
