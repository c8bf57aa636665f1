"""Which kernels take a batch: chosen from what the host knows, rows, ranks and widths, never from the mix.

Every choice computes the same bits (see `cuda/common.cu`); they differ in speed only. The choices were written from
`benchmarks/results/sgmv_h100_tilings.csv`, measured by `python -m benchmarks.sgmv --only tune`, and from 512 rows on from
shrinks followed by expands on an H100, by each pair of tilings (that table is not kept): the table has each alone, where an
expand cannot begin beside its shrink.
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

LONG_FROM, LONG_RANK = 512, 128
"""Rows from which batches are cut into tiles of 64 rows as well; and the largest rank whose B fits the shared memory of
`expand_long` twice."""

WIDE = 8192
"""Columns of y from which B is so large that reading it for every 8 rows takes longer than for every 16."""

SHORT_SHRINK, SHORT_ROWS = 1.4e8, 2048
"""Up to so many multiplications of a shrink (rows times rows of A times columns) of fewer rows short tiles are faster: long ones are
too few."""

SHORT_EXPAND, SMALL_RANK = (6.4e6, 3.2e6), 16
"""Up to so many elements of y short tiles are faster, with ranks up to the small one and with larger."""

TRITON = Tiling(16, "", "")


def cuts(rows: int, max_lora_rank: int) -> tuple[Tiling, ...]:
    """The sizes that a batch of `rows` rows is cut into, whose adapters have at most `max_lora_rank`."""
    if rows <= 32 or (rows <= 64 and max_lora_rank <= 16):
        return (FEW,)
    if rows < LONG_FROM:
        return (FEW, MANY)
    return (MANY, LONG) if max_lora_rank <= LONG_RANK else (MANY,)


def for_shrink(rows: int, max_lora_rank: int, slices: int, in_features: int) -> Tiling:
    """One of `cuts`. Short tiles read all of A for every 16 rows; long ones have fewer blocks."""
    short = LONG_FROM <= rows < SHORT_ROWS and rows * slices * max_lora_rank * in_features <= SHORT_SHRINK
    return cuts(rows, max_lora_rank)[0 if short else -1]


def for_expand(rows: int, max_lora_rank: int, columns: int) -> Tiling:
    """One of `cuts`. Short tiles have more blocks; those of longer ones read B less often."""
    if rows >= LONG_FROM:
        return cuts(rows, max_lora_rank)[0 if rows * columns <= SHORT_EXPAND[max_lora_rank > SMALL_RANK] else -1]
    return cuts(rows, max_lora_rank)[0 if rows <= 64 or (rows <= 256 and columns <= WIDE) else -1]
