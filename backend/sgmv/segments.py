"""Segments: the rows of a step grouped by adapter slot, built once a step on the device and read by every layer."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch

from backend.sgmv import nvrtc
from backend.sgmv.slots import SlotBank
from backend.sgmv.tilings import TRITON, Tiling, cuts

MOST_CUTS = 2
"""Sizes of tiles that a batch is cut into at most."""

SHARED_ROWS, SHARED_RANK = range(17, 129), 16
"""Batches, and the largest `max_lora_rank`, whose shrink the blocks of a base product share out: with fewer rows or larger ranks
a kernel of its own before it was as fast or faster on an H100. That 16 rows are too few is fixed in `cuda/` too."""

PIECE = 1024
"""Input columns whose partial product is kept apart; fixed in `cuda/common.cu`, and the same in Triton."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Sorted rows cut into tiles of at most `tiling.tile_rows` rows of one adapter.

    `tiles` int32[T, 4]: (slot, first position, rows, rank), as many as `header[0]` says; `header` int32[4]: tiles,
    largest rank among them.
    """

    tiling: Tiling
    header: torch.Tensor
    tiles: torch.Tensor


@dataclass(slots=True)
class Segments:
    """Rows sorted by slot and cut into tiles of one adapter; rows without an adapter (-1) are left out.

    `row_slots` int32[T], the input; `rows` int32[T]: original row of each sorted position (only the adapted ones
    count); `cuts`: the tiles, in one size or two; `partials` float32: partial rank vectors on their way from shrink to
    expand, `ahead` those of the next linear (`cuda_kernels.expand_swiglu`); `exchange` float32 bits [2, cells] and
    `turn`: the same between the blocks of a base product, see `cuda/shrink_share.cu`. Lengths depend on T alone, so that a captured CUDA graph serves every mix of adapters.
    """

    row_slots: torch.Tensor
    rows: torch.Tensor
    cuts: tuple[Cut, ...]
    partials: torch.Tensor
    ahead: torch.Tensor
    exchange: torch.Tensor
    turn: torch.Tensor
    engine: str  # "cuda", "triton" or "torch"
    fresh: bool = field(default=True)

    @classmethod
    def allocate(cls, max_rows: int, bank: SlotBank, *, engine: str | None = None) -> Segments:
        """Buffers for batches of up to `max_rows` rows over `bank`; `engine` None: the fastest this device has."""
        device = bank.weights.device
        if engine is None:
            engine = "torch" if device.type == "cpu" else "cuda" if nvrtc.available() else "triton"

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        cells = 0 if engine == "torch" else max_rows * partial_cells(bank)
        room = tuple(Cut(TRITON, ints(4), ints(max_rows, 4)) for _ in range(MOST_CUTS))
        partials = torch.empty(cells, dtype=torch.float32, device=device)
        shared = engine == "cuda" and bank.max_lora_rank <= SHARED_RANK
        ahead = torch.empty(cells if shared else 0, dtype=torch.float32, device=device)
        cells = min(max_rows, SHARED_ROWS[-1]) * partial_cells(bank) if shared else 0
        exchange = ints(2, cells).fill_(-1)  # EMPTY in `cuda/shrink_share.cu`
        return cls(ints(max_rows).fill_(-1), ints(max_rows), room, partials, ahead, exchange, ints(1), engine)

    @property
    def shared_out(self) -> bool:
        """Whether a base product that adds LoRA's part shrinks as well."""
        return self.exchange.shape[1] > 0 and len(self.rows) in SHARED_ROWS

    def of(self, row_slots: torch.Tensor, bank: SlotBank, tilings: tuple[Tiling, ...] | None = None) -> Segments:
        """The segments of a batch, in these buffers: `row_slots` int32[T] on the device, T at most `max_rows`.

        `tilings` None: those that the kernels choose from. No host synchronisation and, on CUDA, no allocation: it can
        be captured in a graph.
        """
        count = len(row_slots)
        if tilings is None:
            tilings = cuts(count, bank.max_lora_rank) if self.engine == "cuda" else (TRITON,)
        made = tuple(Cut(t, room.header, room.tiles[:count]) for t, room in zip(tilings, self.cuts, strict=False))
        view = Segments(
            row_slots, self.rows[:count], made, self.partials, self.ahead, self.exchange, self.turn, self.engine
        )
        if self.engine == "cuda":
            _build_on_cuda(view, bank)
        elif self.engine == "triton":
            _build_in_torch(view, bank)
        return view

    def cut(self, tiling: Tiling) -> Cut:
        """The tiles of that size, which must be among `cuts`."""
        return next(cut for cut in self.cuts if cut.tiling == tiling)

    def most_tiles(self, max_loras: int) -> int:
        """Tiles of the first cut that a batch of this many rows can have: each slot in use adds at most one not full."""
        rows = len(self.rows)
        return min(rows, rows // self.cuts[0].tiling.tile_rows + min(rows, max_loras))

    def begin(self) -> bool:
        """Whether the next kernel may overlap its predecessor: not where that one builds these segments."""
        early, self.fresh = not self.fresh, False
        return early


def partial_cells(bank: SlotBank) -> int:
    """Float32 cells of partial rank vectors a row needs, at most, over all linears of the bank."""
    widest = max(
        -(-linear.in_features // PIECE) * linear.slices for layer in bank.layout.layers for linear in layer.values()
    )
    return widest * padded_rank(bank.max_lora_rank)


def padded_rank(rank: int) -> int:
    """Cells of a rank vector: whole blocks of 16."""
    return -(-rank // 16) * 16


def _build_on_cuda(view: Segments, bank: SlotBank) -> None:
    slots = len(bank.ranks)
    for cut in view.cuts:
        tensors = (view.row_slots, bank.ranks, cut.header, cut.tiles, view.rows)
        values = (
            *(ctypes.c_void_p(t.data_ptr()) for t in tensors),
            *(ctypes.c_int(v) for v in (len(view.row_slots), slots, cut.tiling.tile_rows)),
        )
        nvrtc.kernels(bank.weights.dtype).launch("segment_map", 1, 1024, values, 4 * (3 * slots + 2), early=False)


def _build_in_torch(view: Segments, bank: SlotBank) -> None:
    """The same map from torch operations of fixed shapes, for GPUs and interpreters without the CUDA kernel."""
    cut, slots = view.cuts[0], len(bank.ranks)
    size = cut.tiling.tile_rows
    device = view.row_slots.device
    keys = torch.where(view.row_slots < 0, slots, view.row_slots).long()
    counts = torch.zeros(slots + 1, dtype=torch.int64, device=device).scatter_add_(0, keys, torch.ones_like(keys))[
        :slots
    ]
    tile_ends = ((counts + size - 1) // size).cumsum(0)
    number = torch.arange(len(keys), device=device)
    slot = torch.searchsorted(tile_ends, number, right=True).clamp(max=slots - 1)
    within = number - (tile_ends - (counts + size - 1) // size)[slot]
    first = (counts.cumsum(0) - counts)[slot] + within * size
    rows = (counts[slot] - within * size).clamp(max=size)
    cut.tiles.copy_(torch.stack([slot, first, rows, bank.ranks[slot].long()], 1))
    view.rows.copy_(torch.argsort(keys, stable=True))
    present = torch.where(counts > 0, bank.ranks.long(), 0)
    cut.header[:2] = torch.stack([tile_ends[-1], present.max()])
