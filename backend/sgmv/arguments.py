"""Argument structures of the CUDA kernels: the ctypes images of the structs in `cuda/`."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from backend.sgmv.segments import Cut, Segments, padded_rank
from backend.sgmv.slots import FusedLinear, SlotBank

TensorMap = ctypes.c_ulonglong * 16


def _struct(name: str, source: str, align: int = 8) -> type[ctypes.Structure]:
    """`source` is the struct's fields as `type name[count] ...`, `align` the bytes that its size is a multiple of."""
    kinds: dict[str, Any] = {"ptr": ctypes.c_void_p, "long": ctypes.c_longlong, "int": ctypes.c_int, "map": TensorMap}
    if "ExpandArgs" in source:
        kinds |= {"ExpandArgs": ExpandArgs, "ShrinkArgs": ShrinkArgs, "ExchangeArgs": ExchangeArgs}
    fields: list[tuple[str, Any]] = []
    for line in source.split(";"):
        kind, *names = line.split()
        for entry in names:
            field, _, count = entry.partition("[")
            fields.append((field, kinds[kind] * int(count[:-1]) if count else kinds[kind]))
    size = ctypes.sizeof(type(name, (ctypes.Structure,), {"_fields_": fields}))
    if size % align:
        fields.append(("padding", ctypes.c_char * (align - size % align)))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


ShrinkArgs = _struct(
    "ShrinkArgs",
    "ptr x weights header tiles rows h; long x_stride slot_stride a_unit; int in_features slices h_rows h_rank late stages stage_rows",
)
ExpandArgs = _struct(
    "ExpandArgs",
    "ptr h weights scaling header tiles rows y activated row_slots; long y_stride slot_stride activated_stride b_unit[3];"
    "int width[3] begin[3] groups[3] slices pieces h_rows h_rank long_run stages; ptr ahead; long ahead_unit",
)
ExchangeArgs = _struct("ExchangeArgs", "ptr cells turn; long size")
LinearArgs = _struct(
    "LinearArgs",
    "ptr x w y row_slots; long x_stride y_stride; int rows in_features out_features eights ring;"
    "ExpandArgs lora; ShrinkArgs shrink; ExchangeArgs exchange",
)
WideArgs = _struct(
    "WideArgs",
    "map w x; ptr y row_slots; long y_stride; int rows in_features out_features eights depth stage_bytes;"
    "ExpandArgs lora; ShrinkArgs shrink; ExchangeArgs exchange",
    align=64,
)


@cache
def columns(out_features: tuple[int, ...], per_group: int) -> tuple[tuple[int, ...], ...]:
    """Per slice (three, the missing ones empty): width, first column, and groups of `per_group` columns."""
    widths = (*out_features, 0, 0)[:3]
    begins = (0, widths[0], widths[0] + widths[1])
    return widths, begins, tuple(-(-width // per_group) for width in widths)


def shrink_args(
    x: torch.Tensor,
    bank: SlotBank,
    linear: FusedLinear,
    segments: Segments,
    cut: Cut,
    *,
    late: bool = False,
    stages: int = 0,
    stage_rows: int = 0,
) -> ctypes.Structure:
    """What computes the partial rank vectors of the rows of `x`, tile by tile of `cut`; `late`: see `cuda_kernels.shrink`.

    `stages`, and the rows of x and A in each: shared memory of long segments.
    """
    return ShrinkArgs(
        x.data_ptr(), bank.weights.data_ptr(), cut.header.data_ptr(), cut.tiles.data_ptr(), segments.rows.data_ptr(),
        segments.partials.data_ptr(), x.stride(0), bank.weights.stride(0), linear.a_units[0], linear.in_features,
        linear.slices, len(segments.rows), padded_rank(bank.max_lora_rank), late,
        stages, stage_rows,
    )  # fmt: skip


def exchange_args(segments: Segments) -> ctypes.Structure:
    """Where the blocks of a base product hand each other rank vectors."""
    cells = segments.exchange
    return ExchangeArgs(cells.data_ptr(), segments.turn.data_ptr(), cells.shape[1])


def expand_args(
    out: torch.Tensor,
    bank: SlotBank,
    linear: FusedLinear,
    segments: Segments,
    cut: Cut,
    *,
    groups: tuple[int, ...],
    pieces: int,
    long_run: int = 0,
    stages: int = 0,
    activated: torch.Tensor | None = None,
    after: FusedLinear | None = None,
) -> ctypes.Structure:
    """What adds `scaling * B h` to rows of `out`, tile by tile of `cut`; `groups`: column groups of each slice, `pieces`: partials of h.

    `after`: the linear that takes `activated`, to be shrunk by it into `segments.ahead`.
    """
    widths, begins, _ = columns(linear.out_features, 1)
    return ExpandArgs(
        segments.partials.data_ptr(), bank.weights.data_ptr(), bank.scaling.data_ptr(), cut.header.data_ptr(),
        cut.tiles.data_ptr(), segments.rows.data_ptr(), out.data_ptr(),
        None if activated is None else activated.data_ptr(), segments.row_slots.data_ptr(), out.stride(0), bank.weights.stride(0),
        0 if activated is None else activated.stride(0), (*linear.b_units, 0, 0)[:3], widths, begins, groups,
        linear.slices, pieces, len(segments.rows), padded_rank(bank.max_lora_rank), long_run, stages,
        segments.ahead.data_ptr() if after else None, after.a_units[0] if after else 0,
    )  # fmt: skip
