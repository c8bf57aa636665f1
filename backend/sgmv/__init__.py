"""SGMV: segmented gather matrix-vector products, the LoRA part of a linear layer for many adapters at once.

Rows of a batch are grouped by adapter slot; each group is shrunk with its adapter's A (in -> rank) and
expanded with its B (rank -> out) onto the base product (Chen et al., "Punica", MLSys 2024).
"""

from backend.base import TILE_ROWS
from backend.sgmv.reference import sgmv_reference
from backend.sgmv.segments import Segments
from backend.sgmv.slots import FusedLinear, SlotBank, SlotLayout

__all__ = ["TILE_ROWS", "FusedLinear", "Segments", "SlotBank", "SlotLayout", "sgmv_reference"]
