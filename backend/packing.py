"""An adapter's weights, from its file into host memory laid out as a GPU slot holds them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backend.errors import BackendError
from backend.peft import WEIGHTS, Part, PeftAdapter, Stored
from backend.sgmv import SlotLayout
from backend.sgmv.slots import FUSED

THREADS = min(4, os.cpu_count() or 1)
"""Threads that read, each a linear at a time: each goes its own way to the end, where torch's own pool would meet after every one of
hundreds of small copies, which takes longest on many processors of a virtual machine, and unevenly so. More than these wait
for Python's lock.
"""

CHUNK = 1 << 19
"""Bytes read at a time of what is transposed or converted: still in the core's cache when they are put in their places."""

GRAIN = 1 << 15
"""Elements that torch converts at a time: no more than it does on the calling thread, for its pool (`at::internal::GRAIN_SIZE`)."""

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS: Mapping[int, type[np.signedinteger[Any]]] = {2: np.int16, 4: np.int32}

Key = tuple[int, str]
Cells = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a linear's A [rank, in] and B, transposed, [rank, out] begin inside a packed adapter, in elements per rank."""

    a: int
    b: int
    inside: int
    outside: int


def places(layout: SlotLayout) -> dict[Key, Place]:
    """The place of every linear, by layer and module."""
    return {
        (layer, module): Place(linear.a_units[i], linear.b_units[i], linear.in_features, linear.out_features[i])
        for layer, fused in enumerate(layout.layers)
        for name, linear in fused.items()
        for i, module in enumerate(FUSED[name])
    }


class HostBuffer:
    """Host memory for one adapter after the other of one rank. What none of the linears in `held` covers is zero."""

    def __init__(self, rank: int, unit: int, dtype: torch.dtype, *, pinned: bool) -> None:
        self.rank = rank
        self.packed = torch.zeros(rank * unit, dtype=dtype, pin_memory=pinned)
        self.held: set[Key] = set()
        self._cells = as_bits(self.packed)

    def views(self, place: Place) -> tuple[Cells, Cells]:
        """A [rank, in] and B, transposed, [rank, out] of one linear, bit for bit."""
        a, b, rank = self.rank * place.a, self.rank * place.b, self.rank
        inside, outside = self._cells[a : a + rank * place.inside], self._cells[b : b + rank * place.outside]
        return inside.reshape(rank, place.inside), outside.reshape(rank, place.outside)


class Packer:
    """Fills host buffers of `dtype` from adapters' files."""

    def __init__(self, layout: SlotLayout, dtype: torch.dtype) -> None:
        self.places = places(layout)
        self.dtype = dtype
        self._pool = ThreadPoolExecutor(THREADS, "packer")
        self._scratch = [np.empty(CHUNK, np.uint8) for _ in range(THREADS)]

    def fill(self, buffer: HostBuffer, peft: PeftAdapter, target_modules: Collection[str]) -> None:
        """Read the weights of `target_modules` into `buffer`; all else in it is zero."""
        # In the order of the file, which disks are fastest at.
        parts = sorted((p for p in peft.parts if p.module in target_modules), key=lambda part: part.a.start)
        wanted = {(part.layer, part.module) for part in parts}
        for key in buffer.held - wanted:
            for view in buffer.views(self.places[key]):
                view.fill(0)
        buffer.held = wanted
        # Who is done takes the next: a thread that is held up holds up no more than its linear.
        left = iter(parts)
        readers = [self._pool.submit(self._read, peft.folder / WEIGHTS, left, buffer, own) for own in self._scratch]
        wait(readers)
        for reader in readers:
            reader.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _read(self, path: Path, parts: Iterator[Part], buffer: HostBuffer, scratch: NDArray[np.uint8]) -> None:
        with path.open("rb", buffering=0) as file:
            source = _Source(file, scratch, self.dtype)
            for part in parts:
                self._place(source, part, *buffer.views(self.places[part.layer, part.module]))

    def _place(self, source: _Source, part: Part, a: Cells, b: Cells) -> None:
        """Read one linear into its places; rows past its own rank are zero."""
        flat, own = a[: part.rank].reshape(-1), b[: part.rank]
        if source.as_they_are(part, flat.nbytes, own.nbytes):
            chunk = source.cells(own.size, own.itemsize)
            source.read(part.a, 0, flat, chunk)
            np.copyto(own, chunk.reshape(-1, part.rank).T)
        else:
            source.fill(part.a, flat)
            for start, chunk in source.chunks(part.b, own.shape[1], part.rank, part.factor):
                np.copyto(own[:, start : start + len(chunk)], chunk.T)
        if part.rank < len(a):
            a[part.rank :].fill(0)
            b[part.rank :].fill(0)


@dataclass(frozen=True, slots=True)
class _Source:
    """An open file, and what one thread reads and converts to `dtype` with."""

    file: FileIO
    scratch: NDArray[np.uint8]
    dtype: torch.dtype

    def as_they_are(self, part: Part, a_bytes: int, b_bytes: int) -> bool:
        """Whether A and B lie one behind the other and need no conversion: one call reads both."""
        beside = part.b.start == part.a.start + a_bytes and b_bytes <= CHUNK
        return beside and part.factor == 1 and _TYPES[part.a.dtype] == _TYPES[part.b.dtype] == self.dtype

    def read(self, tensor: Stored, start: int, *cells: Cells) -> None:
        """Fill `cells` from the file, from byte `start` of the tensor on."""
        left, at = [some.data.cast("B") for some in cells], tensor.start + start
        while left:
            got = os.preadv(self.file.fileno(), left, at)
            if not got:
                raise BackendError(f"{self.file.name!s}: ends inside {tensor.name} now: it changed while it was read")
            at += got
            while left and got >= len(left[0]):
                got -= len(left.pop(0))
            if got:  # some file systems hand out less than is asked for
                left[0] = left[0][got:]

    def fill(self, tensor: Stored, cells: Cells) -> None:
        """Fill `cells` with the whole tensor, converted to `dtype`."""
        if _TYPES[tensor.dtype] == self.dtype:
            self.read(tensor, 0, cells)
            return
        for start, chunk in self.chunks(tensor, cells.size, 1):
            cells[start : start + len(chunk)] = chunk[:, 0]

    def cells(self, count: int, size: int) -> Cells:
        """Room for so many elements of so many bytes."""
        return self.scratch[: count * size].view(_BITS[size])

    def chunks(self, tensor: Stored, rows: int, width: int, factor: float = 1.0) -> Iterator[tuple[int, Cells]]:
        """The tensor, [rows, width], some rows at a time with the first one's number: as `dtype` has it, times `factor`.

        Each may be overwritten by the next.
        """
        kind = _TYPES[tensor.dtype]
        same, size = kind == self.dtype and factor == 1, kind.itemsize
        step = (CHUNK // size if same else GRAIN) // width
        for first in range(0, rows, step):
            count = min(step, rows - first) * width
            chunk = self.cells(count, size)
            self.read(tensor, first * width * size, chunk)
            yield first, (chunk if same else self._converted(chunk, kind, factor)).reshape(-1, width)

    def _converted(self, chunk: Cells, kind: torch.dtype, factor: float) -> Cells:
        weights = torch.from_numpy(chunk).view(kind)
        weights = weights if factor == 1 else weights.float() * factor
        return as_bits(weights.to(self.dtype))


def as_bits(tensor: torch.Tensor) -> Cells:
    """The same memory, as numpy can copy it: integers of the floats' size, for it knows no bfloat16."""
    bits = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    return tensor.view(bits).numpy()
