"""SGMV in plain torch: the definition the kernels are checked against, and the CPU's implementation."""

from __future__ import annotations

import torch

from backend.sgmv.slots import FusedLinear, SlotBank


def sgmv_reference(
    x: torch.Tensor, out: torch.Tensor, bank: SlotBank, linear: FusedLinear, row_slots: torch.Tensor
) -> None:
    """Add each row's LoRA product to `out`, in the dtype of `x`: `out[t] += scaling * B(A x[t])`.

    `x` [T, in], `out` [T, sum of out_features], `row_slots` int[T] (-1: the row is left alone).
    """
    for slot in torch.unique(row_slots).tolist():
        if slot < 0:
            continue
        rows = torch.nonzero(row_slots == slot).squeeze(1)
        start = 0
        for i, width in enumerate(linear.out_features):
            a, b = bank.a(slot, linear, i).to(x.dtype), bank.b(slot, linear, i).to(x.dtype)
            delta = (x[rows] @ a.T) @ b * float(bank.scaling[slot])
            out[rows, start : start + width] += delta.to(out.dtype)
            start += width
