"""Launching the CUDA kernels: argument structures, grids, and what each may overlap with."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch

from backend.sgmv.nvrtc import Kernels, kernels
from backend.sgmv.segments import PIECE, Segments, padded_rank
from backend.sgmv.slots import FusedLinear, SlotBank

SETTLED_PIECES = 4
"""With more pieces than this, long segments have their partials added up by a launch of its own."""

RESIDENT_BLOCKS = {
    "shrink_short_1": 3,
    "shrink_short_2": 2,
    "shrink_long_4": 3,
    "shrink_long_2": 3,
    "expand_short_1": 4,
    "expand_short_1_ringed": 3,
    "expand_short_2": 3,
    "expand_long": 2,
    "expand_long_swiglu": 2,
}
"""Blocks a multiprocessor holds at a time (`__launch_bounds__` in the sources): grids are no larger."""


def _struct(name: str, source: str) -> type[ctypes.Structure]:
    """The ctypes image of a struct in the sources: `source` is its fields as `type name[count] ...`."""
    kinds = {"ptr": ctypes.c_void_p, "long": ctypes.c_longlong, "int": ctypes.c_int}
    fields: list[tuple[str, type]] = []
    for line in source.split(";"):
        kind, *names = line.split()
        for entry in names:
            field, _, count = entry.partition("[")
            fields.append((field, kinds[kind] * int(count[:-1]) if count else kinds[kind]))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


ShrinkArgs = _struct(
    "ShrinkArgs",
    "ptr x weights header tiles rows h; long x_stride slot_stride a_unit; int in_features slices h_rows h_rank",
)
ExpandArgs = _struct(
    "ExpandArgs",
    "ptr h weights scaling header tiles rows y activated; long y_stride slot_stride activated_stride b_unit[3];"
    "int width[3] begin[3] groups[3] slices pieces h_rows h_rank long_run",
)
LinearArgs = _struct("LinearArgs", "ptr x w y; long x_stride y_stride; int rows in_features out_features")


@cache
def _columns(out_features: tuple[int, ...], per_group: int) -> tuple[tuple[int, ...], ...]:
    """Per slice (three, the missing ones empty): width, first column, and groups of `per_group` columns."""
    widths = (*out_features, 0, 0)[:3]
    begins = (0, widths[0], widths[0] + widths[1])
    return widths, begins, tuple(-(-width // per_group) for width in widths)


def _grid(items: int, name: str, run: Kernels) -> int:
    """Blocks for at most `items` items; counted from rows alone, never from `max_loras`."""
    return min(items, run.processors * RESIDENT_BLOCKS[name])


FILL = 1.5
"""Blocks a multiprocessor should get of long segments, where taking smaller shares of the work allows it."""

RINGED_COLUMNS = 8192
"""Up to as many columns of few pieces, B of ranks above 16 goes by way of a ring in shared memory."""


def _shrink_blocks(tiles: int, height: int, pieces: int, run: Kernels) -> int:
    """Blocks of 16 rows of A that a block of `shrink_long_*` takes: fewer where there would be too few items."""
    return 4 if tiles * pieces * -(-height // 64) >= FILL * run.processors else 2


def _long_run(tiles: int, widths: tuple[int, ...], run: Kernels) -> int:
    """Blocks of 128 columns that a block of `expand_long` walks: fewer where there would be too few items."""
    return next((n for n in (8, 4) if tiles * sum(_columns(widths, n * 128)[2]) >= FILL * run.processors), 2)


def shrink(x: torch.Tensor, bank: SlotBank, linear: FusedLinear, segments: Segments) -> None:
    """Partial rank vectors of every adapted row of `x` [T, in] into `segments.partials`."""
    run, name = kernels(x.dtype), segments.tiling.shrink
    long = segments.tiling.tile_rows == 64
    pieces = -(-linear.in_features // PIECE)
    rows, height = len(segments.rows), linear.slices * bank.max_lora_rank
    blocks = -(-height // 16)
    if long:
        each = _shrink_blocks(-(-rows // 64), height, pieces, run)
        name, blocks = f"{name}_{each}", -(-blocks // each)
    args = ShrinkArgs(
        x.data_ptr(), bank.weights.data_ptr(), segments.header.data_ptr(), segments.tiles.data_ptr(),
        segments.rows.data_ptr(), segments.partials.data_ptr(), x.stride(0), bank.weights.stride(0),
        linear.a_units[0], linear.in_features, linear.slices, rows, padded_rank(bank.max_lora_rank),
    )  # fmt: skip
    shared = 3 * 64 * (128 + 32) * 2 if long else 0
    run.launch(
        name, _grid(rows * pieces * blocks, name, run), 128 if long else 256, (args,), shared, early=segments.begin()
    )


def _settle(run: Kernels, segments: Segments, pieces: int, cells: int) -> None:
    values = (ctypes.c_void_p(segments.partials.data_ptr()), ctypes.c_int(pieces), ctypes.c_int(cells))
    run.launch("settle", -(-cells // 1024), 256, values, early=True)


def expand(out: torch.Tensor, bank: SlotBank, linear: FusedLinear, segments: Segments) -> None:
    """Add `scaling * B h` of every adapted row to `out` [T, sum of out_features]; follows `shrink`."""
    run, name = kernels(out.dtype), segments.tiling.expand
    rows, rank = len(segments.rows), padded_rank(bank.max_lora_rank)
    long = segments.tiling.tile_rows == 64
    pieces = -(-linear.in_features // PIECE)
    if long and pieces > SETTLED_PIECES:
        _settle(run, segments, pieces, rows * linear.slices * rank)
        pieces = 1
    # The short kernels take 512 columns a group.
    long_run = _long_run(-(-rows // 64), linear.out_features, run) if long else 4
    widths, begins, groups = _columns(linear.out_features, 128 * long_run)
    if name == "expand_short_1" and rank > 16 and pieces <= SETTLED_PIECES and sum(widths) <= RINGED_COLUMNS:
        name = "expand_short_1_ringed"
    args = ExpandArgs(
        segments.partials.data_ptr(), bank.weights.data_ptr(), bank.scaling.data_ptr(), segments.header.data_ptr(),
        segments.tiles.data_ptr(), segments.rows.data_ptr(), out.data_ptr(), None, out.stride(0), bank.weights.stride(0), 0,
        (*linear.b_units, 0, 0)[:3], widths, begins, groups, linear.slices, pieces, rows, rank, long_run,
    )  # fmt: skip
    row_bytes, eights = (128 + 8) * 2, 2 if segments.tiling.tile_rows > 8 else 1
    shared = (4 if long else 2) * rank // 16 * eights * 512
    if long:
        shared += 2 * rank * row_bytes
    elif name.endswith("ringed"):
        shared += 4 * 3 * 16 * row_bytes
    run.launch(name, _grid(rows * sum(groups), name, run), 128, (args,), shared, early=True)


def takes_swiglu(linear: FusedLinear, segments: Segments) -> bool:
    """Whether `expand_swiglu` serves `linear` on this batch: gate and up of one width, and long segments."""
    widths, pieces = linear.out_features, -(-linear.in_features // PIECE)
    return segments.tiling.tile_rows == 64 and len(widths) == 2 and len(set(widths)) == 1 and pieces <= SETTLED_PIECES


def expand_swiglu(
    gate_up: torch.Tensor, activated: torch.Tensor, bank: SlotBank, linear: FusedLinear, segments: Segments
) -> None:
    """`activated[t] = silu(gate) * up` of every adapted row, with `scaling * B h` added to both; follows `shrink`.

    `gate_up` [T, 2 w] is read and not written, `activated` [T, w]; rows without an adapter are left alone. Saves writing
    and reading `gate_up` once more. The bits are those of `expand` and then `ops_triton.silu_mul`.
    """
    run, name = kernels(gate_up.dtype), "expand_long_swiglu"
    rows, rank = len(segments.rows), padded_rank(bank.max_lora_rank)
    one = linear.out_features[:1]
    long_run = _long_run(-(-rows // 64), one, run)
    groups = _columns(one, 128 * long_run)[2]
    widths, begins, _ = _columns(linear.out_features, 128)
    args = ExpandArgs(
        segments.partials.data_ptr(), bank.weights.data_ptr(), bank.scaling.data_ptr(), segments.header.data_ptr(),
        segments.tiles.data_ptr(), segments.rows.data_ptr(), gate_up.data_ptr(), activated.data_ptr(), gate_up.stride(0),
        bank.weights.stride(0), activated.stride(0), (*linear.b_units, 0)[:3], widths, begins, groups, linear.slices,
        -(-linear.in_features // PIECE), rows, rank, long_run,
    )  # fmt: skip
    shared = 4 * 2 * rank // 16 * 2 * 512 + 2 * rank * (128 + 8) * 2
    run.launch(name, _grid(rows * sum(groups), name, run), 128, (args,), shared, early=True)


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A `linear_*` kernel: 16 * `m_tiles` rows of the weight and 8 * `eights` rows of x a block, `depth` ring stages."""

    eights: int
    m_tiles: int
    depth: int

    @property
    def shared_bytes(self) -> int:
        """Rings and sums; so large that a multiprocessor holds one block, and the next launch's waits its turn."""
        sums = 8 * 8 * self.eights * (16 * self.m_tiles + 4) * 4
        return 8 * self.depth * (16 * self.m_tiles + 8 * self.eights) * 128 + sums


LINEARS = (LinearShape(1, 1, 5), LinearShape(2, 1, 4), LinearShape(4, 2, 2))


def _linear_shape(rows: int, run: Kernels) -> LinearShape | None:
    return next((s for s in LINEARS if rows <= 8 * s.eights and s.shared_bytes <= run.shared_bytes), None)


def takes_linear(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `linear` serves `x` [T, in]: at most 32 rows, whole 16-byte vectors, no bias; above, cuBLAS is faster."""
    return bias is None and x.shape[1] % 8 == 0 and _linear_shape(len(x), kernels(x.dtype)) is not None


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """The base product `out = x @ weight.T` of few rows (`takes_linear`), at the speed of reading `weight` once.

    `x` [T, in], `weight` [out, in] contiguous, `out` [T, out]. It begins to fetch `weight` while its predecessor in the
    stream still runs. A row's bits do not depend on the other rows.
    """
    run = kernels(x.dtype)
    shape = _linear_shape(len(x), run)
    assert shape is not None, "see takes_linear"
    features = weight.shape[0]
    args = LinearArgs(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.stride(0), out.stride(0), len(x), weight.shape[1], features
    )
    grid = min(-(-features // (16 * shape.m_tiles)), run.processors)
    run.launch(f"linear_{8 * shape.eights}", grid, 256, (args,), shape.shared_bytes, early=True)
