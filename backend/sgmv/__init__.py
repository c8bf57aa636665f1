"""SGMV: segmented gather matrix-vector products, the LoRA part of a linear layer for many adapters at once.

Rows of a batch are grouped by adapter slot; each group is shrunk with its adapter's A (in -> rank) and
expanded with its B (rank -> out) onto the base product (Chen et al., "Punica", MLSys 2024).
"""

from __future__ import annotations

import torch

from backend.sgmv.reference import sgmv_reference
from backend.sgmv.segments import Segments
from backend.sgmv.slots import FusedLinear, SlotBank, SlotLayout

__all__ = ["FusedLinear", "Segments", "SlotBank", "SlotLayout", "sgmv", "sgmv_reference"]


def sgmv(x: torch.Tensor, out: torch.Tensor, bank: SlotBank, linear: FusedLinear, segments: Segments) -> None:
    """Add each row's LoRA product to `out` in place, all slices of a fused linear at once.

    `out[t] += scaling * B(A x[t])` with the A, B, true rank and scaling of the adapter in the row's slot; rows of
    slot -1 are not touched. `x` [T, in] and `out` [T, sum of out_features], bfloat16 or float16 (any dtype on the
    CPU), contiguous along rows; `segments` of the same T rows. No host synchronisation and no allocation on CUDA:
    a captured graph serves every mix of adapters. A row's bits do not depend on the other rows (I9).
    """
    if segments.engine == "torch":
        sgmv_reference(x, out, bank, linear, segments.row_slots)
    elif segments.engine == "cuda":
        from backend.sgmv import cuda_kernels

        cuda_kernels.shrink(x, bank, linear, segments)
        cuda_kernels.expand(out, bank, linear, segments)
    else:
        from backend.sgmv import triton_kernels

        triton_kernels.sgmv(x, out, bank, linear, segments)
