"""The fused linears of a decoder layer: base product plus LoRA, in the order that hides most of the LoRA."""

from __future__ import annotations

from types import ModuleType

import torch

from backend.sgmv import FusedLinear, Segments, SlotBank, base_linear, cuda_kernels, sgmv


def base_product(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None, *, kernels: bool
) -> None:
    """`out = x @ weight.T (+ bias)`; `x` [T, in], `weight` [out, in], `out` [T, out].

    `kernels`: the CUDA kernels may be used; they are where there are few rows.
    """
    if kernels and base_linear.takes(x, weight, bias):
        base_linear.linear(x, weight, out)
    elif bias is not None:
        torch.addmm(bias, x, weight.T, out=out)
    else:
        torch.mm(x, weight.T, out=out)


def invariant_product(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None, *, kernels: bool
) -> None:
    """`base_product` whose bits of a row do not depend on the other rows: slow, for checking.

    cuBLAS chooses its order of summation by the number of rows; here a kernel that does not takes 32 of them at a time, or
    torch takes one.
    """
    most = 32 if kernels and base_linear.takes(x[:32], weight, None) else 1
    for start in range(0, len(x), most):
        rows = slice(start, start + most)
        if most > 1:
            base_linear.linear(x[rows], weight, out[rows])
        else:
            torch.mm(x[rows], weight.T, out=out[rows])
    if bias is not None:
        out += bias


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
    shrunk: bool = False,
) -> None:
    """Base product of every row plus the LoRA product of the adapted ones (`segments`; None: no row has an adapter).

    `kernels`: the CUDA kernels may be used. With few rows the base product adds LoRA's part (`base_linear`). `shrunk`: `gated_with_lora`
    has shrunk `x`.
    """
    if shrunk and segments is not None:
        base_product(x, weight, out, bias, kernels=kernels)
        cuda_kernels.expand(out, bank, linear, segments, ahead=True)
    elif segments is None:
        base_product(x, weight, out, bias, kernels=kernels)
    elif kernels and base_linear.takes(x, weight, bias, (bank, linear, segments)):
        base_linear.linear(x, weight, out, (bank, linear, segments))
    else:
        base_product(x, weight, out, bias, kernels=kernels)
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
    after: FusedLinear | None = None,
) -> bool:
    """`activated` [T, w] = silu(gate) * up of every row; `gate_up` [T, 2 w] is where the base product goes, if it goes anywhere.

    With few rows the base product adds LoRA's part and applies SwiGLU, with many the expand applies it. `ops`: whose `silu_mul`.
    `after`: the linear that takes `activated`; returns whether its shrink is done as well.
    """
    lora = (bank, linear, segments) if segments is not None else None
    if kernels and base_linear.takes_gated(x, weight, lora):
        base_linear.gated(x, weight, activated, lora)
        return False
    if segments is None or not kernels or not cuda_kernels.takes_swiglu(linear, segments):
        linear_with_lora(x, weight, gate_up, None, bank, linear, segments, kernels=kernels)
        ops.silu_mul(gate_up, activated)
        return False
    base_product(x, weight, gate_up, None, kernels=kernels)
    cuda_kernels.shrink(x, bank, linear, segments)
    ahead = after is not None and cuda_kernels.shrinks_ahead(linear, segments, x.dtype)
    cuda_kernels.expand_swiglu(gate_up, activated, bank, linear, segments, after if ahead else None)
    return ahead
