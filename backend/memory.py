"""GPU memory as vLLM divides it: what is left for KV blocks after weights, adapter slots and work space.

Rule: `vllm/v1/worker/gpu_worker.py`, `determine_available_memory`: utilization × total, less weights and LoRA
buffers as torch's caching allocator holds them, less the peak of a profiling step, less memory outside torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from backend.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from backend.base import EngineLimits
    from backend.geometry import ModelGeometry

MIB = 1 << 20
GIB = 1 << 30

EXTRA_VOCAB_ROWS_0_8 = 256
"""Rows of extra vocabulary per slot and buffer in vLLM 0.8 (`lora_extra_vocab_size`); removed in late 2025, so 0 now."""

SAMPLER_BYTES_PER_LOGIT = 15
"""Peak bytes a logit costs while vLLM profiles its sampler: the bf16 logit, float32 copies, sort values and indices."""

NON_TORCH_BYTES = int(0.76 * GIB)
"""CUDA context, library workspaces and allocator slack."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How the usable memory divides; bytes. `num_gpu_blocks` KV blocks follow (vLLM's null block among them)."""

    usable_bytes: int
    weights_bytes: int
    lora_bytes: int
    lora_fragmentation_bytes: int
    activation_bytes: int
    non_torch_bytes: int
    kv_bytes: int
    num_gpu_blocks: int


def lora_tensors(geometry: ModelGeometry, limits: EngineLimits, extra_vocab_rows: int = 0) -> Iterator[int]:
    """Bytes of each stacked LoRA buffer in the order vLLM allocates them: all slots, padded to `max_lora_rank`.

    `extra_vocab_rows`: rows each of a slot's three extra-vocabulary buffers has, where embeddings take LoRA.
    """
    unit = limits.max_loras * limits.max_lora_rank * geometry.dtype_bytes
    for _ in range(geometry.num_layers):
        for modules in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            shapes = [geometry.linears()[m] for m in modules]
            yield from (unit * inside for inside, _ in shapes)
            yield from (unit * outside for _, outside in shapes)
    if geometry.lora_embeddings:
        for width in (geometry.vocab_size, geometry.hidden_size) * 2:
            yield unit * width
        for _ in range(3 if extra_vocab_rows else 0):
            yield limits.max_loras * extra_vocab_rows * geometry.hidden_size * geometry.dtype_bytes


def allocator_bytes(tensors: Iterable[int]) -> int:
    """What torch's caching allocator reserves for `tensors` (`c10/cuda/CUDACachingAllocator.cpp`).

    Tensors up to 1 MiB share 2 MiB segments. Larger ones take the tightest gap left in any large segment, whatever
    their size; without one, a new segment: 20 MiB below 10 MiB, else the size rounded up to 2 MiB.
    """
    reserved = 0
    small: list[int] = []
    large: list[int] = []
    for tensor in tensors:
        size = -(-tensor // 512) * 512
        gaps = small if size <= MIB else large
        gap = min((gap for gap in gaps if gap >= size), default=0)
        if gap:
            gaps.remove(gap)
        else:
            gap = _segment_bytes(size)
            reserved += gap
        if gap > size:
            gaps.append(gap - size)
    return reserved


def _segment_bytes(size: int) -> int:
    if size <= MIB:
        return 2 * MIB
    return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


def activation_bytes(geometry: ModelGeometry, limits: EngineLimits) -> int:
    """Peak work space of vLLM's profiling step: the widest layer's activations, or the sampler's logits."""
    widths = 3 * geometry.intermediate_size + 4 * geometry.hidden_size
    activations = limits.max_num_batched_tokens * widths * geometry.dtype_bytes
    logits = limits.max_num_seqs * geometry.vocab_size * SAMPLER_BYTES_PER_LOGIT
    return max(activations, logits)


def memory_plan(
    geometry: ModelGeometry, limits: EngineLimits, gpu_bytes: int, *, extra_vocab_rows: int = 0
) -> MemoryPlan:
    """Divide `gpu_bytes` of GPU memory. Raises `BackendError` if no request of `max_model_len` would fit.

    `extra_vocab_rows`: `EXTRA_VOCAB_ROWS_0_8` reproduces vLLM 0.8; later engines have none.
    """
    usable = int(gpu_bytes * limits.gpu_memory_utilization)
    tensors = list(lora_tensors(geometry, limits, extra_vocab_rows))
    lora = sum(tensors)
    fragmentation = allocator_bytes(tensors) - lora
    peak = activation_bytes(geometry, limits)
    kv = usable - geometry.weights_bytes - lora - fragmentation - peak - NON_TORCH_BYTES
    block = limits.block_size * geometry.kv_bytes_per_token
    blocks = max(0, kv) // block
    needed = -(-limits.max_model_len // limits.block_size)
    if blocks < needed:
        raise BackendError(
            f"model {geometry.name} does not fit: {gpu_bytes / GIB:.1f} GiB × gpu_memory_utilization"
            f" {limits.gpu_memory_utilization} - weights {geometry.weights_bytes / GIB:.1f} GiB - {limits.max_loras} LoRA"
            f" slots {lora / GIB:.1f} GiB - work space leaves {kv / GIB:.2f} GiB for KV, one request of max_model_len"
            f" {limits.max_model_len} needs {needed * block / GIB:.2f} ({(needed * block - kv) / GIB:.2f} GiB short);"
            " lower max_loras, max_lora_rank or max_model_len"
        )
    return MemoryPlan(
        usable, geometry.weights_bytes, lora, fragmentation, peak, NON_TORCH_BYTES, blocks * block, blocks
    )
