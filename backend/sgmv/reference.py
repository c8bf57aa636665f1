"""SGMV in plain torch: the definition the kernels are checked against, and the CPU's implementation."""

from __future__ import annotations

import torch

from backend.sgmv.slots import FusedLinear, SlotBank

Shrunk = list[tuple[int, torch.Tensor, list[torch.Tensor]]]
"""Slot, its rows, and each slice's rank vectors of these rows."""


def sgmv_reference(
    x: torch.Tensor, out: torch.Tensor, bank: SlotBank, linear: FusedLinear, row_slots: torch.Tensor
) -> None:
    """Add each row's LoRA product to `out`, in the dtype of `x`: `out[t] += scaling * B(A x[t])`.

    `x` [T, in], `out` [T, sum of out_features], `row_slots` int[T] (-1: the row is left alone).
    """
    expand_reference(out, bank, linear, shrink_reference(x, bank, linear, row_slots))


def shrink_reference(x: torch.Tensor, bank: SlotBank, linear: FusedLinear, row_slots: torch.Tensor) -> Shrunk:
    """The rank vectors `A x[t]` of every adapted row, slot by slot."""
    shrunk: Shrunk = []
    for slot in torch.unique(row_slots).tolist():
        if slot >= 0:
            rows = torch.nonzero(row_slots == slot).squeeze(1)
            slices = range(linear.slices)
            shrunk.append((slot, rows, [x[rows] @ bank.a(slot, linear, i).to(x.dtype).T for i in slices]))
    return shrunk


def expand_reference(out: torch.Tensor, bank: SlotBank, linear: FusedLinear, shrunk: Shrunk) -> None:
    """Add `scaling * B h` of every rank vector h to `out`."""
    for slot, rows, vectors in shrunk:
        start = 0
        for i, width in enumerate(linear.out_features):
            delta = vectors[i] @ bank.b(slot, linear, i).to(vectors[i].dtype) * float(bank.scaling[slot])
            out[rows, start : start + width] += delta.to(out.dtype)
            start += width
