"""The base product of few rows on a GPU: against float64, and with LoRA added the bits of both one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from banks import random_bank

from backend.geometry import load_geometry
from backend.linears import linear_with_lora
from backend.sgmv import Segments, base_linear, cuda_kernels

pytestmark = pytest.mark.gpu

SHAPES = {"8b": load_geometry("llama-3.1-8b").linears(), "1b": load_geometry("llama-3.2-1b").linears()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [(4096, 6144), (14336, 4096), (896, 1000), (3584, 18944), (4096, 128256)])
def test_base_product_of_few_rows(features: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(features[1], features[0], device="cuda", dtype=dtype)
    x = torch.randn(64, features[0] + 8, device="cuda", dtype=dtype)[:, : features[0]]
    outs: list[list[torch.Tensor]] = [[], []]
    for rows in (64, 41, 33, 32, 16, 9, 8, 3, 1):
        out = torch.full((rows, features[1]), float("nan"), device="cuda", dtype=dtype)
        if not base_linear.takes(x[:rows], weight, None):
            assert rows > 32, f"{rows} rows"
            continue
        base_linear.linear(x[:rows], weight, out)
        truth = x[:rows].double() @ weight.double().T
        assert float((out.double() - truth).norm() / truth.norm()) < 3e-3
        outs[rows > 32].append(out[0])
    for alike in outs:
        assert all(torch.equal(alike[0], other) for other in alike), "a row's bits depend on the batch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("ranks", [[16] * 128, [8, 16, 64, 32, 1, 24, 50, 64], [128, 7, 100]], ids=str)
def test_lora_in_the_base_product_has_the_bits_of_both_apart(model: str, ranks: list[int], dtype: torch.dtype) -> None:
    """Random mixes over scratch memory full of NaN: base product, shrink and expand, against one kernel, or shrink and one."""
    ranks = ranks[:: 4 if model == "8b" and len(ranks) > 64 else 1]
    bank, rng = random_bank(SHAPES[model], ranks, dtype), np.random.default_rng(len(ranks))
    compared = 0
    for name in ("qkv", "o", "gate_up", "down"):
        linear = bank.layout.layers[0][name]
        weight = torch.randn(sum(linear.out_features), linear.in_features, device="cuda", dtype=dtype)
        weight *= linear.in_features**-0.5
        for rows in (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 50, 64, 65, 90, 128):
            buffers = Segments.allocate(rows, bank)
            x = torch.randn(rows, linear.in_features, device="cuda", dtype=dtype)
            for most in (len(ranks), 2, 0):
                mix = rng.integers(-1, most, rows) if most < 9 else rng.permutation(np.arange(rows) % most)
                slots = torch.tensor(mix, dtype=torch.int32, device="cuda")
                segments = buffers.of(slots, bank)
                if not base_linear.takes(x, weight, None, (bank, linear, segments)):
                    continue
                together = torch.full((rows, len(weight)), float("nan"), device="cuda", dtype=dtype)
                apart = torch.zeros_like(together)
                buffers.partials.fill_(float("nan"))
                linear_with_lora(x, weight, together, None, bank, linear, segments, kernels=True)
                if segments.shared_out:
                    emptied = buffers.exchange[int(buffers.turn < 0)]
                    assert (emptied == -1).all(), "the next launch finds cells that look written"
                buffers.partials.fill_(float("nan"))
                plan = base_linear._plan(x, linear.out_features, (bank, linear, segments))
                assert plan is not None
                base = torch.full((rows,), -1, dtype=torch.int32, device="cuda")
                plain = Segments.allocate(rows, bank).of(base, bank)
                linear_with_lora(x, weight, apart, None, bank, linear, plain, kernels=True)
                truth = x.double() @ weight.double().T
                assert float((apart.double() - truth).norm() / truth.norm()) < 3e-3
                segments = buffers.of(slots, bank)
                cuda_kernels.shrink(x, bank, linear, segments)
                cuda_kernels.expand(apart, bank, linear, segments)
                assert torch.equal(together, apart), f"{name}, {rows} rows of {most} adapters ({plan.name})"
                compared += 1
    print(f"{compared} batches compared bit for bit")
    assert compared > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("ranks", [[8, 16, 64, 32, 1, 24, 50, 64], [16, 8, 1, 16, 3, 7, 16, 16]], ids=str)
def test_swiglu_in_the_base_product_has_the_bits_of_both_apart(
    model: str, ranks: list[int], dtype: torch.dtype
) -> None:
    from backend import ops_triton

    bank, rng = random_bank(SHAPES[model], ranks, dtype), np.random.default_rng(0)
    linear = bank.layout.layers[0]["gate_up"]
    weight = torch.randn(sum(linear.out_features), linear.in_features, device="cuda", dtype=dtype)
    weight *= linear.in_features**-0.5
    for rows in (1, 2, 7, 8, 9, 16, 17, 31, 32):
        buffers = Segments.allocate(rows, bank)
        x = torch.randn(rows, linear.in_features, device="cuda", dtype=dtype)
        for most in (len(ranks), 2, 0, None):
            gate_up = torch.full((rows, len(weight)), float("nan"), device="cuda", dtype=dtype)
            apart = torch.full((rows, len(weight) // 2), float("nan"), device="cuda", dtype=dtype)
            together, lora = apart.clone(), None
            if most is not None:
                slots = torch.tensor(rng.integers(-1, most, rows), dtype=torch.int32, device="cuda")
                buffers.partials.fill_(float("nan"))
                lora = bank, linear, buffers.of(slots, bank)
            assert base_linear.takes_gated(x, weight, lora)
            base_linear.linear(x, weight, gate_up, lora)
            ops_triton.silu_mul(gate_up, apart)
            base_linear.gated(x, weight, together, lora)
            assert torch.isfinite(apart).all()
            assert torch.equal(together, apart), f"{rows} rows of {most} adapters"


@pytest.mark.parametrize("rows", [17, 32, 64, 128])
def test_rows_of_nan_hold_nobody_up(rows: int) -> None:
    """Blocks wait for cells with the bits of a NaN that arithmetic does not make, not for any NaN."""
    bank = random_bank(SHAPES["8b"], [16] * 4, torch.bfloat16)
    linear = bank.layout.layers[0]["qkv"]
    weight = torch.randn(sum(linear.out_features), linear.in_features, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, linear.in_features, device="cuda", dtype=torch.bfloat16)
    segments = Segments.allocate(rows, bank).of(torch.arange(rows, dtype=torch.int32, device="cuda") % 4, bank)
    assert segments.shared_out
    clean, mixed = torch.zeros(2, rows, len(weight), device="cuda", dtype=torch.bfloat16)
    base_linear.linear(x, weight, clean, (bank, linear, segments))
    x.view(torch.int16)[3] = -1  # bits 0xffff: a NaN
    base_linear.linear(x, weight, mixed, (bank, linear, segments))
    assert mixed[3].isnan().all()
    assert torch.equal(mixed[:3], clean[:3]) and torch.equal(mixed[4:], clean[4:])
