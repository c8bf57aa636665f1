"""Adapter slots in device memory: where each adapter's A and B lie.

A slot is one flat buffer. An adapter of rank r fills its first `r * unit` elements, where `unit` is the sum
of in + out over all its linears; the A of a linear starts at `r * a_unit` as [r, in], its B at `r * b_unit`
as [r, out] (transposed, so both are read along contiguous rows). Every offset scales with the true rank:
loading is one copy of the true bytes, and nothing is padded but the slot itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Linears that share an input and run as one product, and the LoRA modules inside each."""


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """One fused linear of one layer: its input width, and per slice output width and offsets (elements per rank)."""

    in_features: int
    out_features: tuple[int, ...]
    a_units: tuple[int, ...]
    b_units: tuple[int, ...]

    @property
    def slices(self) -> int:
        return len(self.out_features)


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Offsets of every fused linear of every layer inside a slot; `unit` elements per rank in all."""

    layers: tuple[Mapping[str, FusedLinear], ...]
    unit: int

    @classmethod
    def of(cls, linears: Mapping[str, tuple[int, int]], num_layers: int) -> SlotLayout:
        """Lay out `linears` (PEFT name -> (in, out)) for `num_layers` layers."""
        offset = 0
        layers = []
        for _ in range(num_layers):
            layer = {}
            for name, modules in FUSED.items():
                a_units, b_units = [], []
                for module in modules:
                    a_units.append(offset)
                    offset += linears[module][0]
                for module in modules:
                    b_units.append(offset)
                    offset += linears[module][1]
                outs = tuple(linears[m][1] for m in modules)
                layer[name] = FusedLinear(linears[modules[0]][0], outs, tuple(a_units), tuple(b_units))
            layers.append(layer)
        return cls(tuple(layers), offset)


class SlotBank:
    """`max_loras` slots of `max_lora_rank`, with the rank and scaling of the adapter living in each.

    `weights` [max_loras, max_lora_rank * unit]; `ranks` int32[max_loras] (0 = empty); `scaling` float32[max_loras].
    """

    def __init__(
        self, layout: SlotLayout, max_loras: int, max_lora_rank: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout = layout
        self.max_lora_rank = max_lora_rank
        self.weights = torch.empty((max_loras, max_lora_rank * layout.unit), dtype=dtype, device=device)
        self.ranks = torch.zeros(max_loras, dtype=torch.int32, device=device)
        self.scaling = torch.ones(max_loras, dtype=torch.float32, device=device)

    def write(self, slot: int, packed: torch.Tensor, rank: int, scaling: float) -> None:
        """Copy a packed adapter `[rank * unit]` into `slot`; asynchronous from pinned memory."""
        self.weights[slot, : rank * self.layout.unit].copy_(packed, non_blocking=True)
        self.ranks[slot] = rank
        self.scaling[slot] = scaling

    def a(self, slot: int, linear: FusedLinear, i: int) -> torch.Tensor:
        """A of slice `i`, [rank, in]."""
        rank = int(self.ranks[slot])
        start = rank * linear.a_units[i]
        return self.weights[slot, start : start + rank * linear.in_features].view(rank, linear.in_features)

    def b(self, slot: int, linear: FusedLinear, i: int) -> torch.Tensor:
        """B of slice `i`, transposed: [rank, out]."""
        rank = int(self.ranks[slot])
        start = rank * linear.b_units[i]
        return self.weights[slot, start : start + rank * linear.out_features[i]].view(rank, linear.out_features[i])
