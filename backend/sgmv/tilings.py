"""Which kernels take a batch: chosen from what the host knows, rows and the largest rank, never from the mix.

Every choice computes the same bits (see `cuda/common.cu`); they differ in speed only. `choose` was written from
`benchmarks/results/sgmv_h100_tilings.csv`, measured by `python -m benchmarks.sgmv --only tune`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    """Rows of one adapter that a block takes together, and the families of CUDA kernels for tiles of that size."""

    tile_rows: int
    shrink: str
    expand: str


FEW = Tiling(8, "shrink_short_1", "expand_short_1")
MANY = Tiling(16, "shrink_short_2", "expand_short_2")
LONG = Tiling(64, "shrink_long", "expand_long")
ALL = (FEW, MANY, LONG)

LONG_RANK = 128
"""Largest rank whose B fits the shared memory of `expand_long` twice."""

TRITON = Tiling(16, "", "")


def choose(rows: int, max_lora_rank: int) -> Tiling:
    """The tiling for a batch of `rows` rows whose adapters have at most `max_lora_rank`."""
    small = max_lora_rank <= 16
    if rows <= 64 or (rows <= 128 and small):
        return FEW
    if rows <= 512 or (rows <= 1024 and small) or max_lora_rank > LONG_RANK:
        return MANY
    return LONG
