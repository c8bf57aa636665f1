"""Segments: the rows of a step grouped by adapter slot, cut into tiles for the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backend.base import TILE_ROWS


@dataclass(frozen=True, slots=True)
class Segments:
    """Rows sorted by slot, base rows left out.

    `rows` int32[n]: original row of each sorted position; `tiles` int32[tiles, 3]: (slot, first position, rows).
    """

    rows: npt.NDArray[np.int32]
    tiles: npt.NDArray[np.int32]

    @classmethod
    def of(cls, row_slots: npt.NDArray[np.int32]) -> Segments:
        """Group rows by slot (`row_slots` int32[T], -1 = base)."""
        order = np.argsort(row_slots, kind="stable").astype(np.int32)
        order = order[np.searchsorted(row_slots[order], 0) :]
        slots, starts, counts = np.unique(row_slots[order], return_index=True, return_counts=True)
        per_segment = -(-counts // TILE_ROWS)
        segment = np.repeat(np.arange(len(slots)), per_segment)
        within = np.arange(len(segment)) - np.repeat(np.cumsum(per_segment) - per_segment, per_segment)
        first = starts[segment] + within * TILE_ROWS
        rows = np.minimum(TILE_ROWS, starts[segment] + counts[segment] - first)
        return cls(order, np.stack([slots[segment], first, rows], axis=1).astype(np.int32).reshape(-1, 3))
