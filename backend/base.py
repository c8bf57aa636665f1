"""The seam: what a simulation hands a backend, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from backend.errors import BackendError

NO_SLOT = -1
"""Slot of a request that uses no adapter."""

TILE_ROWS = 16
"""Rows of one adapter that a step's `lora_tiles` feature counts together."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine is configured to hold at most; names and meaning are vLLM's."""

    max_loras: int
    max_lora_rank: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    gpu_memory_utilization: float


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What a backend must know of an adapter to hold and move it.

    `folder`: the PEFT folder that live backends read its weights from (None: random ones); `scaling` multiplies B A x.
    """

    adapter_id: int
    rank: int
    target_modules: tuple[str, ...]
    folder: str | None = None
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One engine step: for each scheduled request the tokens to compute, those in the KV cache, and its slot.

    `query_lens[n]` >= 1, `context_lens[n]` >= 0 (before this step), `slots[n]` (-1 = base).
    `samples[n]`: the request's last row yields a token (false for a chunk that does not end its prompt).
    `block_tables[n]`: KV block ids of each request covering context + query; live backends need them,
    replay ignores them (empty).
    `decodes[n]`: the row's token is the one sampled last; live backends need it (empty: where `query_lens[n]` is 1 after
    some context, which a prompt's last chunk can be as well).
    `skipped`: waiting requests that the scheduler walked over for this step, their adapters finding no slot.
    `idle_s`: how long the GPU has had no step, but for the host's part of this one; live backends need not be told.
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    slots: tuple[int, ...]
    samples: tuple[bool, ...]
    block_tables: tuple[tuple[int, ...], ...] = ()
    decodes: tuple[bool, ...] = ()
    skipped: int = 0
    idle_s: float = 0.0

    def __post_init__(self) -> None:
        n = len(self.query_lens)
        if not (n == len(self.context_lens) == len(self.slots) == len(self.samples)) or n == 0:
            raise BackendError(
                "a step batch needs one query_len, context_len, slot and sample flag per request, at least one"
            )
        if not self.idle_s >= 0:
            raise BackendError(f"a step batch's idle_s is {self.idle_s}, must be >= 0")
        if min(self.query_lens) < 1 or min(self.context_lens) < 0 or min(self.slots) < NO_SLOT:
            raise BackendError("a step batch needs query_lens >= 1, context_lens >= 0, slots >= -1")

    @property
    def tokens(self) -> int:
        return sum(self.query_lens)


@dataclass(frozen=True, slots=True)
class StepTiming:
    """What a step took: `device_s` between its first and last kernel, `host_s` the wall time beyond that.

    `extrapolated`: the prediction left the measured grid (always false live).
    """

    device_s: float
    host_s: float
    extrapolated: bool = False

    @property
    def elapsed_s(self) -> float:
        return self.device_s + self.host_s


@dataclass(frozen=True, slots=True)
class LoadTiming:
    """What moving one adapter took, and the bytes moved."""

    elapsed_s: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the backend can hold: `num_gpu_blocks` KV blocks of `block_size` tokens, `max_loras` slots.

    `num_gpu_blocks` is what vLLM reports under that name; one of them is its null block, which no request gets.
    """

    num_gpu_blocks: int
    block_size: int
    max_loras: int


class Backend(Protocol):
    """Executes steps and adapter loads, live or replayed. One simulation owns one backend."""

    def capacity(self) -> Capacity:
        """KV blocks and adapter slots available to the engine."""
        ...

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        """Bring an adapter from disk into host memory."""
        ...

    def drop(self, adapter_id: int) -> None:
        """Forget the host copy of an adapter."""
        ...

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        """Copy a staged adapter from host memory into a GPU slot; later steps may use the slot."""
        ...

    def execute(self, batch: StepBatch) -> StepTiming:
        """Run one step and say what it took."""
        ...

    def close(self) -> None:
        """Release device memory and files."""
        ...
