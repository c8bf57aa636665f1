"""One fused linear of a decoder layer: base product plus LoRA, in the order that hides most of the LoRA."""

from __future__ import annotations

import torch

from backend.sgmv import FusedLinear, Segments, SlotBank, sgmv


def base_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
    """`out = x @ weight.T (+ bias)`; `x` [T, in], `weight` [out, in], `out` [T, out]."""
    if bias is not None:
        torch.addmm(bias, x, weight.T, out=out)
    else:
        torch.mm(x, weight.T, out=out)


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
    few = False
    if kernels:
        from backend.sgmv import cuda_kernels

        few = cuda_kernels.takes_linear(x, bias)
    if not few:
        base_product(x, weight, out, bias)
        if segments is not None:
            sgmv(x, out, bank, linear, segments)
        return
    if segments is not None:
        cuda_kernels.shrink(x, bank, linear, segments)
    cuda_kernels.linear(x, weight, out)
    if segments is not None:
        cuda_kernels.expand(out, bank, linear, segments)
