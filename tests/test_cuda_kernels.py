"""The CUDA kernels on a small emulated GPU: against float64, row by row alone, and in one launch as in three. Hopper's included.

Launches that may begin before their predecessor has ended do. What only a GPU can show is in `tests/gpu`.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
from collections.abc import Iterator

import emulated
import numpy as np
import pytest
import torch
from banks import exact, random_bank
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.linears import gated_with_lora, linear_with_lora
from backend.sgmv import Segments, SlotBank, base_linear, cuda_kernels, sgmv
from backend.sgmv.tilings import FEW, LONG, MANY, Tiling

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux", reason="needs g++ and Linux's ucontext"
)

SHAPES = {
    "q_proj": (1096, 256),
    "k_proj": (1096, 64),
    "v_proj": (1096, 64),
    "o_proj": (256, 1152),
    "gate_proj": (1160, 384),
    "up_proj": (1160, 384),
    "down_proj": (5248, 128),
}
"""In two pieces, one, two, and six, so that all ways of adding partials are taken."""

RANKS, SMALL_RANKS = [8, 16, 64, 1, 24, 7], [8, 16, 1, 16, 3, 7]
"""Of the small ones the blocks of a base product of more than 16 rows share out the shrink."""

NAMES = ("qkv", "o", "gate_up", "down")


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype) -> ctypes.CDLL:
    return emulated.build(tmp_path_factory.mktemp("emulator"), half=dtype == torch.float16)


@pytest.fixture(scope="module")
def bank(dtype: torch.dtype) -> SlotBank:
    torch.manual_seed(0)
    return random_bank(SHAPES, RANKS, dtype, "cpu")


@pytest.fixture(scope="module", params=[RANKS, SMALL_RANKS], ids=["large ranks", "small ranks"])
def either(request: pytest.FixtureRequest, dtype: torch.dtype) -> SlotBank:
    torch.manual_seed(0)
    return random_bank(SHAPES, request.param, dtype, "cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, compiled: ctypes.CDLL) -> Iterator[emulated.Emulated]:
    run = emulated.on_the_cpu(monkeypatch, compiled, processors=5)
    yield run
    run.synchronize()  # a test that failed may have left launches


def mixed(rows: int, most: int = len(RANKS), seed: int = 0) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed + rows).integers(-1, most, rows), dtype=torch.int32)


def segments_of(
    slots: torch.Tensor, bank: SlotBank, gpu: emulated.Emulated, tilings: tuple[Tiling, ...] | None = None
) -> Segments:
    """Over scratch memory full of NaN."""
    buffers = Segments.allocate(len(slots), bank, engine="cuda")
    buffers.partials.fill_(float("nan"))
    gpu.kept.extend([buffers, slots])
    return buffers.of(slots, bank, tilings)


def off(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 7, 33, 150, 600])
def test_grouped_equals_float64(name: str, rows: int, bank: SlotBank, gpu: emulated.Emulated) -> None:
    """`x` inside a wider matrix, `out` too, partial sums full of NaN, rows without an adapter."""
    linear, slots = bank.layout.layers[0][name], mixed(rows)
    slots[0] = 2
    x = torch.randn(rows, linear.in_features + 8).to(bank.weights.dtype)[:, : linear.in_features]
    width = sum(linear.out_features)
    whole = torch.zeros(rows, width + 8, dtype=x.dtype)
    sgmv(x, whole[:, :width], bank, linear, segments_of(slots, bank, gpu))
    gpu.synchronize()
    assert not whole[:, width:].any() and not whole[slots < 0].any()
    assert off(whole[:, :width], exact(x, bank, name, slots)) < 3e-3


@pytest.mark.parametrize("rows", [1, 40, 520])
def test_every_tiling_has_the_same_bits(rows: int, bank: SlotBank, gpu: emulated.Emulated) -> None:
    for name in NAMES:
        linear, slots = bank.layout.layers[0][name], mixed(rows)
        x = torch.randn(rows, linear.in_features).to(bank.weights.dtype)
        outs = []
        for tiling in (FEW, MANY, LONG):
            segments = segments_of(slots, bank, gpu, (tiling,))
            out = torch.zeros(rows, sum(linear.out_features), dtype=x.dtype)
            cuda_kernels.shrink(x, bank, linear, segments, tiling)
            cuda_kernels.expand(out, bank, linear, segments, tiling)
            gpu.synchronize()
            outs.append(out)
        assert all(torch.equal(outs[0], other) for other in outs[1:]), name


@settings(max_examples=25, deadline=None)
@given(slots=st.lists(st.integers(-1, len(RANKS) - 1), min_size=1, max_size=40), name=st.sampled_from(NAMES))
def test_a_row_alone_has_the_same_bits(slots: list[int], name: str, bank: SlotBank, compiled: ctypes.CDLL) -> None:
    """I9, through SGMV."""
    with pytest.MonkeyPatch.context() as patch:
        gpu = emulated.on_the_cpu(patch, compiled, processors=3)
        linear, mix = bank.layout.layers[0][name], torch.tensor(slots, dtype=torch.int32)
        x = torch.randn(len(mix), linear.in_features).to(bank.weights.dtype)
        base = torch.randn(len(mix), sum(linear.out_features)).to(x.dtype)
        grouped = base.clone()
        sgmv(x, grouped, bank, linear, segments_of(mix, bank, gpu))
        gpu.synchronize()
        for row in {0, len(mix) // 2, len(mix) - 1}:
            alone = base[row : row + 1].clone()
            sgmv(x[row : row + 1], alone, bank, linear, segments_of(mix[row : row + 1], bank, gpu))
            gpu.synchronize()
            assert torch.equal(alone[0], grouped[row]), f"row {row}"


def weight_of(bank: SlotBank, name: str) -> torch.Tensor:
    linear = bank.layout.layers[0][name]
    weight = torch.randn(sum(linear.out_features), linear.in_features) * linear.in_features**-0.5
    return weight.to(bank.weights.dtype)


def test_lora_in_the_base_product_has_the_bits_of_both_apart(
    either: SlotBank, gpu: emulated.Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = either
    monkeypatch.setattr(base_linear, "SPLIT_COLUMNS", 4096)  # down is split between the blocks of a cluster
    for name in NAMES:
        linear, weight = bank.layout.layers[0][name], weight_of(bank, name)
        for rows, mixes in {
            1: (1,),
            8: (6,),
            16: (6, 2),
            29: (6, 0),
            40: (2,),
            64: (6, 0),
            90: (6,),
            128: (2,),
        }.items():
            x = torch.randn(rows, linear.in_features).to(weight.dtype)
            for most in mixes:
                slots = mixed(rows, most)
                segments = segments_of(slots, bank, gpu)
                if not base_linear.takes(x, weight, None, (bank, linear, segments)):
                    continue
                together = torch.full((rows, len(weight)), float("nan"), dtype=x.dtype)
                linear_with_lora(x, weight, together, None, bank, linear, segments, kernels=True)
                name_of_it = gpu.launched[-1]
                assert (gpu.launched[-2].startswith("shrink")) != segments.shared_out
                nobody = segments_of(torch.full((rows,), -1, dtype=torch.int32), bank, gpu)
                apart = torch.full_like(together, float("nan"))
                linear_with_lora(x, weight, apart, None, bank, linear, nobody, kernels=True)
                gpu.synchronize()
                if segments.shared_out:
                    emptied = segments.exchange[int(segments.turn < 0)]
                    assert (emptied == -1).all(), "the next launch finds cells that look written"
                assert off(apart, x.double() @ weight.double().T) < 3e-3
                sgmv(x, apart, bank, linear, segments_of(slots, bank, gpu))
                gpu.synchronize()
                assert torch.equal(together, apart), f"{name}, {rows} rows of {most} adapters ({name_of_it})"
    wanted = {f"linear_{n}" for n in ("8", "16", "32", "wide_64_1", "wide_64_2", "wide_128_1", "wide_128_2")}
    assert wanted <= set(gpu.launched)


@pytest.mark.parametrize("most", [len(RANKS), 2, 0])
def test_swiglu_with_the_product_is_that_of_the_product(most: int, either: SlotBank, gpu: emulated.Emulated) -> None:
    """In the base product of few rows, and in the expand of many."""
    bank = either
    linear, weight = bank.layout.layers[0]["gate_up"], weight_of(bank, "gate_up")
    for rows in (1, 9, 32):
        x, slots = torch.randn(rows, linear.in_features).to(weight.dtype), mixed(rows, most)
        apart = torch.full((rows, len(weight)), float("nan"), dtype=x.dtype)
        linear_with_lora(x, weight, apart, None, bank, linear, segments_of(slots, bank, gpu), kernels=True)
        together = torch.full((rows, len(weight) // 2), float("nan"), dtype=x.dtype)
        gated_with_lora(
            x,
            weight,
            apart.clone(),
            together,
            bank,
            linear,
            segments_of(slots, bank, gpu),
            ops=base_linear,
            kernels=True,
        )
        gpu.synchronize()
        assert gpu.launched[-1].startswith("linear_gated_")
        assert off(together, activated(apart)) < 3e-3
    rows = 600
    x, slots = torch.randn(rows, linear.in_features).to(weight.dtype), mixed(rows, most)
    before = (x.double() @ weight.double().T).to(x.dtype)
    after, together = before.clone(), torch.full((rows, len(weight) // 2), float("nan"), dtype=x.dtype)
    sgmv(x, after, bank, linear, segments_of(slots, bank, gpu))
    gpu.synchronize()
    segments = segments_of(slots, bank, gpu)
    cuda_kernels.shrink(x, bank, linear, segments, LONG)
    cuda_kernels.expand_swiglu(before, together, bank, linear, segments)
    gpu.synchronize()
    assert off(together, activated(after)) < 3e-3


@pytest.mark.parametrize("width", [384, 2184, 5248])
def test_a_shrink_on_the_way_has_the_bits_of_one_after(width: int, dtype: torch.dtype, gpu: emulated.Emulated) -> None:
    """The next linear's, by the expand that applies SwiGLU; widths of one piece, some, and so many that they are settled."""
    torch.manual_seed(width)
    shapes = SHAPES | {"gate_proj": (256, width), "up_proj": (256, width), "down_proj": (width, 136)}
    bank, rows = random_bank(shapes, SMALL_RANKS, dtype, "cpu"), 150
    gate_up, down = (bank.layout.layers[0][name] for name in ("gate_up", "down"))
    x, slots = torch.randn(rows, 256).to(dtype), mixed(rows)
    base, after = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, 136).to(dtype)
    outs = []
    for on_the_way in (False, True):
        segments, out = segments_of(slots, bank, gpu, (LONG,)), after.clone()
        segments.ahead.fill_(float("nan"))
        together = torch.full((rows, width), float("nan"), dtype=dtype)
        cuda_kernels.shrink(x, bank, gate_up, segments, LONG)
        cuda_kernels.expand_swiglu(base, together, bank, gate_up, segments, down if on_the_way else None)
        if not on_the_way:
            cuda_kernels.shrink(together, bank, down, segments, LONG)
        cuda_kernels.expand(out, bank, down, segments, LONG, ahead=on_the_way)
        gpu.synchronize()
        outs.append(torch.cat([together, out], 1))
    assert torch.equal(*outs) and torch.isfinite(outs[0]).all()


@pytest.mark.parametrize("rows", [5, 40])
def test_launches_that_begin_early_wait_for_what_they_read(rows: int, either: SlotBank, gpu: emulated.Emulated) -> None:
    """Of o and qkv each computes what the next reads, over memory full of NaN: as a GPU runs them, and one after the other."""
    bank = either
    weights, slots = {name: weight_of(bank, name) for name in ("o", "qkv")}, mixed(rows)
    first = torch.randn(rows, 256).to(bank.weights.dtype)
    found = []
    for apart in (True, False):
        segments, x, steps = segments_of(slots, bank, gpu), first, []
        for name in ("o", "qkv", "o", "qkv"):
            linear, weight = bank.layout.layers[0][name], weights[name]
            assert base_linear.takes(x[:, : linear.in_features], weight, None, (bank, linear, segments))
            out = torch.full((rows, len(weight)), float("nan"), dtype=x.dtype)
            linear_with_lora(x[:, : linear.in_features], weight, out, None, bank, linear, segments, kernels=True)
            if apart:
                gpu.synchronize()
            steps.append(out)
            x = out
        gpu.synchronize()
        found.append(torch.cat(steps, 1))
    assert torch.equal(*found) and torch.isfinite(found[0]).all()


def activated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, 1)
    return gate * torch.sigmoid(gate) * up
