"""Adapters outside the GPU: files on disk, and the host cache they are staged into."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from backend.base import AdapterShape, LoadTiming
from backend.errors import BackendError
from backend.sgmv import SlotLayout


class HostStore:
    """Reads adapters from disk into host memory, pinned where there is a GPU.

    One file of random weights a rank stands for every adapter of that rank (the cost does not depend on the
    values); each adapter has host memory of its own. Files written a moment ago are read from the page cache.
    """

    def __init__(self, layout: SlotLayout, dtype: torch.dtype, *, pinned: bool, seed: int) -> None:
        self.layout = layout
        self.dtype = dtype
        self.pinned = pinned
        self.seed = seed
        self.folder = tempfile.TemporaryDirectory(prefix="multilora-")
        self.staged: dict[int, torch.Tensor] = {}
        self.spare: dict[int, list[torch.Tensor]] = defaultdict(list)

    def _file(self, rank: int) -> Path:
        path = Path(self.folder.name) / f"rank-{rank}.safetensors"
        if not path.exists():
            generator = torch.Generator().manual_seed(self.seed + rank)
            weights = torch.empty(rank * self.layout.unit, dtype=torch.float32).normal_(0, 0.02, generator=generator)
            save_file({"packed": weights.to(self.dtype)}, path)
        return path

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        """Read an adapter's file into host memory.

        Not timed: writing the file where it is not there yet, and growing the pool of (pinned) host memory, which a
        server does once.
        """
        path = self._file(adapter.rank)
        size = adapter.rank * self.layout.unit
        spare = self.spare[adapter.rank]
        host = spare.pop() if spare else torch.zeros(size, dtype=self.dtype, pin_memory=self.pinned)
        started = time.perf_counter()
        host.copy_(load_file(path)["packed"])
        self.layout.zero_missing(host, adapter.rank, adapter.target_modules)
        self.staged[adapter.adapter_id] = host
        return LoadTiming(time.perf_counter() - started, size * host.element_size())

    def drop(self, adapter_id: int) -> None:
        """Forget an adapter's host copy; its memory serves the next one of the same rank."""
        host = self.staged.pop(adapter_id)
        self.spare[len(host) // self.layout.unit].append(host)

    def packed(self, adapter_id: int) -> torch.Tensor:
        """The host copy of a staged adapter."""
        if adapter_id not in self.staged:
            raise BackendError(f"adapter {adapter_id} must be staged in host memory before it is loaded into a slot")
        return self.staged[adapter_id]

    def close(self) -> None:
        """Release host memory and remove the files."""
        self.staged.clear()
        self.spare.clear()
        self.folder.cleanup()
