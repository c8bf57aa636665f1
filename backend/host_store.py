"""Adapters outside the GPU: PEFT folders on disk, and the host cache they are staged into."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from backend.base import AdapterShape, LoadTiming
from backend.errors import BackendError
from backend.packing import HostBuffer, Packer
from backend.peft import CONFIG, WEIGHTS, read_adapter
from backend.sgmv import SlotLayout
from backend.sgmv.slots import FUSED

if TYPE_CHECKING:
    from backend.geometry import ModelGeometry


class HostStore:
    """Reads adapters from disk into host memory, pinned where there is a GPU.

    An adapter without a folder of its own is read from one of random weights that stands for all of its rank (the cost
    does not depend on the values); each adapter has host memory of its own. Files written a moment ago are read from the
    page cache.
    """

    def __init__(
        self, geometry: ModelGeometry, layout: SlotLayout, dtype: torch.dtype, *, pinned: bool, seed: int
    ) -> None:
        self.geometry = geometry
        self.layout = layout
        self.dtype = dtype
        self.pinned = pinned
        self.seed = seed
        self.folder = tempfile.TemporaryDirectory(prefix="multilora-")
        self.packer = Packer(layout, dtype)
        self.staged: dict[int, HostBuffer] = {}
        self.spare: dict[int, list[HostBuffer]] = defaultdict(list)

    def _random_folder(self, rank: int) -> Path:
        folder = Path(self.folder.name) / f"rank-{rank}"
        if not folder.exists():
            generator = torch.Generator().manual_seed(self.seed + rank)
            write_random(folder, self.geometry, rank, self.dtype, generator)
        return folder

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        """Read an adapter's folder into host memory, as a slot holds it. Raises `BackendError` for a malformed one.

        Not timed: writing random weights where they are not there yet, and growing the pool of (pinned) host memory,
        which a server does once.
        """
        folder = Path(adapter.folder) if adapter.folder else self._random_folder(adapter.rank)
        buffer = self._buffer(adapter.rank)
        started = time.perf_counter()
        peft = read_adapter(folder, self.geometry)
        if peft.rank != adapter.rank:
            raise BackendError(f"{folder}: holds rank {peft.rank} now, {adapter.rank} when the run began")
        self.packer.fill(buffer, peft, adapter.target_modules)
        self.staged[adapter.adapter_id] = buffer
        return LoadTiming(time.perf_counter() - started, buffer.packed.nbytes)

    def _buffer(self, rank: int) -> HostBuffer:
        spare = self.spare[rank]
        return spare.pop() if spare else HostBuffer(rank, self.layout.unit, self.dtype, pinned=self.pinned)

    def drop(self, adapter_id: int) -> None:
        """Forget an adapter's host copy; its memory serves the next one of the same rank."""
        buffer = self.staged.pop(adapter_id)
        self.spare[buffer.rank].append(buffer)

    def packed(self, adapter_id: int) -> torch.Tensor:
        """The host copy of a staged adapter."""
        if adapter_id not in self.staged:
            raise BackendError(f"adapter {adapter_id} must be staged in host memory before it is loaded into a slot")
        return self.staged[adapter_id].packed

    def close(self) -> None:
        """Release host memory and remove the files."""
        self.staged.clear()
        self.spare.clear()
        self.packer.close()
        self.folder.cleanup()


def write_random(
    folder: Path, geometry: ModelGeometry, rank: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Write a PEFT folder of random weights, never zeros, on all seven linears; `lora_alpha` = r."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32).normal_(0, 0.02, generator=generator).to(dtype)

    tensors = {}
    for layer in range(geometry.num_layers):
        for module, (inside, outside) in geometry.linears().items():
            parent = "self_attn" if module in (*FUSED["qkv"], *FUSED["o"]) else "mlp"
            path = f"base_model.model.model.layers.{layer}.{parent}.{module}"
            tensors[f"{path}.lora_A.weight"] = normal(rank, inside)
            tensors[f"{path}.lora_B.weight"] = normal(outside, rank)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(geometry.linears())}
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
