"""Adapter slots of random weights, with NaN wherever nobody may look, and what they add to a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from backend.sgmv import SlotBank, SlotLayout


def random_bank(
    linears: Mapping[str, tuple[int, int]], ranks: Sequence[int], dtype: torch.dtype, device: str = "cuda"
) -> SlotBank:
    """One layer of `linears`, an adapter of each of `ranks`; no scaling is a power of two, which would hide how it is rounded."""
    bank = SlotBank(SlotLayout.of(linears, 1), len(ranks), max(ranks), dtype=dtype, device=torch.device(device))
    bank.weights.fill_(float("nan"))
    for slot, rank in enumerate(ranks):
        packed = torch.randn(rank * bank.layout.unit, device=device) * 0.02
        bank.write(slot, packed.to(dtype), rank, 0.3 + slot)
    return bank


def exact(x: torch.Tensor, bank: SlotBank, name: str, slots: torch.Tensor) -> torch.Tensor:
    """What LoRA adds to each row of linear `name`, in float64."""
    linear = bank.layout.layers[0][name]
    out = torch.zeros(len(x), sum(linear.out_features), dtype=torch.float64, device=x.device)
    for slot in slots[slots >= 0].unique().tolist():
        mine = slots == slot
        parts = [
            x[mine].double() @ bank.a(slot, linear, i).double().T @ bank.b(slot, linear, i).double()
            for i in range(linear.slices)
        ]
        out[mine] = torch.cat(parts, 1) * float(bank.scaling[slot])
    return out
