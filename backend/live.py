"""The live backends: every step and every adapter load is executed and measured, on a CUDA GPU or on the CPU."""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from backend.base import NO_SLOT, AdapterShape, Capacity, EngineLimits, LoadTiming, StepBatch, StepTiming
from backend.decode_room import DecodeRoom, pure_decodes
from backend.decoder import Decoder, DeviceInputs
from backend.errors import BackendError
from backend.host_store import HostStore
from backend.step_inputs import DECODE_TILE, IntArray, Padding, StepInputs, lay_out

if TYPE_CHECKING:
    from backend.geometry import ModelGeometry

GRAPH_SIZES = (1, 2, 4, *range(8, 257, 8), *range(320, 513, 64), *range(640, 4097, 128))
"""Row counts that get a CUDA graph: vLLM's capture sizes to 256 (`compilation.cudagraph_capture_sizes`), coarser above, and so far
that the longer ones, launched kernel by kernel, keep the GPU busy for much longer than the host takes to launch them."""

HEATING_ROWS, REST_S = 256, 0.1
"""Capturing a graph of at least so many rows runs its step twice, behind which a GPU at its power limit would take longer for the step itself
(`backend.heat`), as no engine that captures its graphs beforehand does; so it rests for so long, two of an H100's time constants."""

MAX_GRAPHS = 512
"""Graphs kept; the least recently used one goes first."""


def padded_size(rows: int) -> int | None:
    """The graph size a step is padded to, or None above the largest."""
    return next((size for size in GRAPH_SIZES if size >= rows), None)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the time of a step or a read: its pauses grow with the simulator's rows."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class LiveBackend:
    """Executes steps on `device` with `num_gpu_blocks` KV blocks; `steps_executed` counts them.

    `deterministic`: what a request gets does not depend on what it is batched with, at several times the cost.
    """

    needs_block_tables = True

    def __init__(
        self,
        geometry: ModelGeometry,
        limits: EngineLimits,
        num_gpu_blocks: int,
        *,
        device: str,
        seed: int = 0,
        deterministic: bool = False,
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError("backend cuda: torch sees no CUDA device here; use backend profile or cpu")
        self.limits = limits
        self.num_gpu_blocks = num_gpu_blocks
        self.device = torch.device(device)
        self.on_cuda = device == "cuda"
        dtype = torch.bfloat16 if self.on_cuda else torch.float32
        self.deterministic = deterministic
        # Decodes and prompts go through one kernel then, whose keys are never split.
        self._short_tile = 0 if deterministic else DECODE_TILE
        # Whole graphs: a profile knows no other sizes. (On the CPU, which has none, a few rows are never used.)
        most = limits.max_num_batched_tokens
        room = replace(limits, max_num_batched_tokens=padded_size(most) or most)
        self.decoder = Decoder(
            geometry, room, num_gpu_blocks, dtype=dtype, device=self.device, seed=seed, deterministic=deterministic
        )
        self.store = HostStore(geometry, self.decoder.bank.layout, dtype, pinned=self.on_cuda, seed=seed)
        self.steps_executed = 0
        width = -(-limits.max_model_len // limits.block_size)
        self._host_tables = torch.zeros((limits.max_num_seqs, width), dtype=torch.int32, pin_memory=self.on_cuda)
        self._tables = torch.zeros_like(self._host_tables, device=self.device)
        self._host_extent = torch.zeros(2, dtype=torch.int32, pin_memory=self.on_cuda)
        self._held_tables: list[tuple[int, ...]] = [()] * limits.max_num_seqs
        size = 16 * room.max_num_batched_tokens + 4096
        self._host_packed = torch.zeros(size, dtype=torch.int32, pin_memory=self.on_cuda)
        self._packed = torch.zeros_like(self._host_packed, device=self.device)
        self._rooms: OrderedDict[tuple[object, ...], tuple[list[IntArray], DeviceInputs]] = OrderedDict()
        self._decode_rooms: dict[Padding, tuple[DecodeRoom, DeviceInputs]] = {}
        self._lies: DecodeRoom | None = None  # what was laid out last, if it was pure decodes
        self._graphs: OrderedDict[Padding, torch.cuda.CUDAGraph] = OrderedDict()
        self._warm: set[tuple[bool, bool, bool]] = set()
        if self.on_cuda:
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def capacity(self) -> Capacity:
        """The KV blocks and slots that are really allocated."""
        return Capacity(self.num_gpu_blocks, self.limits.block_size, self.limits.max_loras)

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        """Read the adapter from disk into (pinned) host memory."""
        with _no_collection():
            return self.store.stage(adapter)

    def drop(self, adapter_id: int) -> None:
        """Forget the host copy of an adapter."""
        self.store.drop(adapter_id)

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        """Copy a staged adapter into `slot` and wait for it."""
        packed = self.store.packed(adapter.adapter_id)
        started = time.perf_counter()
        self.decoder.bank.write(slot, packed, adapter.rank, adapter.scaling)
        self._synchronize()
        return LoadTiming(time.perf_counter() - started, packed.numel() * packed.element_size())

    def is_new(self, batch: StepBatch) -> bool:
        """Whether no graph serves the step, or the one that will is not captured yet."""
        padding = self._padding(batch)
        return padding not in self._graphs

    def prepare(self, batch: StepBatch) -> bool:
        """Compile kernels and capture the step's graph, if this is their first use; whether it was. On the CPU: run the step once."""
        padding = self._padding(batch)
        if self.on_cuda:
            return self._prepare(batch, padding)
        self._execute(batch, padding)
        return True

    def execute(self, batch: StepBatch) -> StepTiming:
        """Run one step; the first use of a graph shape captures it before the clock starts, and has the GPU rest from it."""
        if len(batch.block_tables) != len(batch.query_lens):
            raise BackendError("a live step needs a block table for every request")
        if self.on_cuda and self.prepare(batch) and batch.tokens >= HEATING_ROWS:
            time.sleep(REST_S)
        with _no_collection():
            return self._execute(batch, self._padding(batch))

    def _execute(self, batch: StepBatch, padding: Padding | None) -> StepTiming:
        started = time.perf_counter()
        device_s = self._timed_forward(self._laid_out(batch, padding), padding)
        self.steps_executed += 1
        return StepTiming(device_s, max(0.0, time.perf_counter() - started - device_s))

    def hold_tables(self, batch: StepBatch) -> None:
        """Write the batch's block tables, as the step before would have, and how much of them there is."""
        tables, held = self._host_tables.numpy(), self._held_tables
        self._host_extent.numpy()[:] = len(batch.block_tables), max(map(len, batch.block_tables))
        for row, blocks in enumerate(batch.block_tables):
            before = held[row]
            if blocks == before:  # as nearly all are: a request that went on has the blocks it had
                continue
            start = len(before) if blocks[: len(before)] == before else 0  # and now and then one more
            if start < len(blocks):
                tables[row, start : len(blocks)] = blocks[start:]
            held[row] = blocks

    def layout(self, batch: StepBatch) -> StepInputs:
        """A step as arrays over its rows and requests, in the order of the batch."""
        self.hold_tables(batch)
        tables = self._host_tables.numpy()
        rows = tables[: len(batch.block_tables)]
        return lay_out(batch, rows, self.limits.block_size, self.decoder.long_tile, self._short_tile)

    def _padding(self, batch: StepBatch) -> Padding | None:
        """What a step is padded to; None where no graph serves it (CPU, or too many rows)."""
        size = padded_size(sum(batch.query_lens)) if self.on_cuda else None
        return None if size is None else Padding.of(batch, size, self.decoder.long_tile, self._short_tile)

    def _laid_out(self, batch: StepBatch, padding: Padding | None) -> DeviceInputs:
        """The step in host memory, padded; the views of where it goes."""
        if padding is not None and self._short_tile and pure_decodes(batch):
            return self._decodes(batch, padding)
        inputs = self.layout(batch)
        return self._pack(inputs if padding is None else inputs.padded(padding, self.num_gpu_blocks))

    def _decodes(self, batch: StepBatch, padding: Padding) -> DeviceInputs:
        """`layout`, `padded` and `_pack` of pure decodes, in one."""
        room = self._decode_rooms.get(padding)
        if room is None:
            cells, device_inputs = self._room(self.layout(batch).padded(padding, self.num_gpu_blocks))
            room = self._decode_rooms[padding] = DecodeRoom(StepInputs(*cells)), device_inputs
        if room[0] is not self._lies:
            room[0].forget()
            self._lies = room[0]
        self.hold_tables(batch)
        room[0].fill(batch, self._host_tables.numpy(), self.limits.block_size, self.num_gpu_blocks)
        return room[1]

    def _pack(self, inputs: StepInputs) -> DeviceInputs:
        self._lies = None
        arrays = inputs.arrays()
        shapes = (inputs.adapted, *(array.shape for array in arrays))
        room = self._rooms.get(shapes)
        if room is None:
            room = self._room(inputs)
            self._rooms[shapes] = room
            if len(self._rooms) > MAX_GRAPHS:
                self._rooms.popitem(last=False)
        for cells, array in zip(room[0], arrays, strict=True):
            cells[...] = array
        return room[1]

    def _room(self, inputs: StepInputs) -> tuple[list[IntArray], DeviceInputs]:
        """Where steps of these shapes lie in host memory, and on the device: making the views takes longer than filling them."""
        if sum(array.size for array in inputs.arrays()) > len(self._packed):
            raise BackendError(f"a step of {inputs.rows} rows is more than max_num_batched_tokens allows")
        host = DeviceInputs.views(inputs, self._host_packed)
        cells = [getattr(host, name).numpy() for name in StepInputs.__slots__]
        return cells, DeviceInputs.views(inputs, self._packed)

    def _forward(self, inputs: DeviceInputs) -> None:
        """Bring the step that was laid out to the device, and compute it."""
        self._upload(inputs)
        self.decoder.forward(inputs, self._tables)

    def _upload(self, inputs: DeviceInputs) -> None:
        most_rows = min(len(inputs.positions), self.limits.max_num_seqs)
        self.decoder.ops.upload(
            self._host_packed, self._packed, inputs.cells, self._host_tables, self._tables, self._host_extent, most_rows
        )

    def again(self, batch: StepBatch) -> StepInputs:
        """Compute a step that was executed once more, outside of all counts and times; returns its layout."""
        inputs = self.layout(batch)
        self._forward(self._pack(inputs))
        self._synchronize()
        return inputs

    def _timed_forward(self, inputs: DeviceInputs, padding: Padding | None) -> float:
        if not self.on_cuda:
            started = time.perf_counter()
            self._forward(inputs)
            return time.perf_counter() - started
        self._begin.record()
        if padding is None:
            self._forward(inputs)
        else:
            self._graphs.move_to_end(padding)
            self._graphs[padding].replay()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) * 1e-3

    def _prepare(self, batch: StepBatch, padding: Padding | None) -> bool:
        """`prepare` on a GPU (not part of any step's time)."""
        if padding in self._graphs:
            return False
        few = [query <= self._short_tile for query in batch.query_lens]
        kernels = (any(slot != NO_SLOT for slot in batch.slots), any(few), not all(few))
        if padding is None and kernels in self._warm:
            return False
        inputs = self.layout(batch)
        self._held_tables = [()] * self.limits.max_num_seqs
        if padding is not None:
            inputs = inputs.padded(padding, self.num_gpu_blocks)
        device_inputs = self._pack(inputs)
        saved = self.decoder.last_token.clone()
        self._forward(device_inputs)
        self._synchronize()
        if padding is None:
            self._warm.add(kernels)
        else:
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool):
                self._forward(device_inputs)
            graph.replay()  # its first launch also brings it to the GPU, which belongs to capturing
            self._graphs[padding] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self.decoder.last_token.copy_(saved)
        self._synchronize()
        return True

    def _synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def close(self) -> None:
        """Release graphs, device and host memory, and files; the backend cannot be used after."""
        self._graphs.clear()
        self.store.close()
        del self.decoder
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
