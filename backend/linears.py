"""The fused linears of a decoder layer: base product plus LoRA, in the order that hides most of the LoRA."""

from __future__ import annotations

from types import ModuleType

import torch

from backend.sgmv import FusedLinear, Segments, SlotBank, cuda_kernels, sgmv


def base_product(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None, *, kernels: bool
) -> None:
    """`out = x @ weight.T (+ bias)`; `x` [T, in], `weight` [out, in], `out` [T, out].

    `kernels`: the CUDA kernels may be used; they are where there are few rows.
    """
    if _few(x, bias, kernels=kernels):
        cuda_kernels.linear(x, weight, out)
    elif bias is not None:
        torch.addmm(bias, x, weight.T, out=out)
    else:
        torch.mm(x, weight.T, out=out)


def _few(x: torch.Tensor, bias: torch.Tensor | None, *, kernels: bool) -> bool:
    return kernels and cuda_kernels.takes_linear(x, bias)


def linear_with_lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    bank: SlotBank,
    linear: FusedLinear,
    segments: Segments | None,
    *,
    kernels: bool,
) -> None:
    """Base product of every row plus the LoRA product of the adapted ones (`segments`; None: no row has an adapter).

    `kernels`: the CUDA kernels may be used. With few rows the shrink comes first, so that the base weights are
    already on their way while it runs; the expand's weights are on their way while the base product runs.
    """
    first = segments is not None and _few(x, bias, kernels=kernels)
    if segments is not None and first:
        cuda_kernels.shrink(x, bank, linear, segments)
    base_product(x, weight, out, bias, kernels=kernels)
    if segments is not None and first:
        cuda_kernels.expand(out, bank, linear, segments)
    elif segments is not None:
        sgmv(x, out, bank, linear, segments)


def gated_with_lora(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    activated: torch.Tensor,
    bank: SlotBank,
    linear: FusedLinear,
    segments: Segments | None,
    ops: ModuleType,
    *,
    kernels: bool,
) -> None:
    """`activated` [T, w] = silu(gate) * up of every row; `gate_up` [T, 2 w] is where the base product goes.

    Where the batch is long, adapted rows get their LoRA product and SwiGLU in one launch. `ops`: whose `silu_mul`.
    """
    if segments is None or not kernels or not cuda_kernels.takes_swiglu(linear, segments):
        linear_with_lora(x, weight, gate_up, None, bank, linear, segments, kernels=kernels)
        ops.silu_mul(gate_up, activated)
        return
    base_product(x, weight, gate_up, None, kernels=kernels)
    cuda_kernels.shrink(x, bank, linear, segments)
    cuda_kernels.expand_swiglu(gate_up, activated, bank, linear, segments)
    ops.silu_mul(gate_up, activated, segments.row_slots)
