"""Adapter slots of random weights, with NaN wherever nobody may look."""

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
