"""Whole merged models that share a GPU: a backend whose adapters are full copies of the model.

`resident` of them (the engine's `max_loras`) stay in GPU memory and take their weights from the KV cache; another one is copied in
from host memory, over the least recently used. A step runs the models of its requests one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from backend.base import NO_SLOT, AdapterShape, EngineLimits, LoadTiming, StepBatch, StepTiming
from backend.from_steps import FREE_BYTES_PER_S
from backend.memory import memory_plan
from backend.profile import Profile, load_profile
from backend.replay import ReplayBackend
from sim.errors import ScenarioError

if TYPE_CHECKING:
    from backend.geometry import ModelGeometry


@dataclass(frozen=True, slots=True)
class Swap:
    """GPU memory holds `resident` whole models; another one comes in at `load_bytes_per_s`."""

    resident: int
    load_bytes_per_s: float


class SwappedModels(ReplayBackend):
    """Replays base steps. An adapter id names a whole model, a GPU slot (`max_loras` = `resident`) holds one.

    All models are taken to lie in host memory, so staging costs nothing; and the first `resident` ones that are asked for in
    GPU memory from the start, as a dedicated copy is.
    """

    def __init__(
        self, profile: Profile, geometry: ModelGeometry, limits: EngineLimits, num_gpu_blocks: int, swap: Swap
    ) -> None:
        super().__init__(profile, geometry, limits, num_gpu_blocks)
        self._load_bytes_per_s = swap.load_bytes_per_s
        self._there = swap.resident

    @property
    def step_costs(self) -> None:
        """Nothing that a compiled replay could know: its steps are of one model."""

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        """From disk: it is in host memory already."""
        return LoadTiming(0.0, 0)

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        """The copy of all its weights; nothing for the first models."""
        if self._there:
            self._there -= 1
            return LoadTiming(0.0, 0)
        nbytes = self.geometry.weights_bytes
        return LoadTiming(self.profile.load.latency_s + nbytes / self._load_bytes_per_s, nbytes)

    def execute(self, batch: StepBatch) -> StepTiming:
        """Steps of merged models, without adapters, one after the other on the GPU; their hosts' work overlaps."""
        rows: dict[int, list[int]] = {}
        for i, slot in enumerate(batch.slots):
            rows.setdefault(slot, []).append(i)
        idle_s = (batch.idle_s, *[0.0] * (len(rows) - 1))
        steps = [
            super(SwappedModels, self).execute(_of(batch, some, idle))
            for some, idle in zip(rows.values(), idle_s, strict=True)
        ]
        device_s, host_s = sum(step.device_s for step in steps), max(step.host_s for step in steps)
        return StepTiming(device_s, host_s, any(step.extrapolated for step in steps))


def _of(batch: StepBatch, rows: Sequence[int], idle_s: float) -> StepBatch:
    """Some requests of a step, as those of a merged model."""
    query, context, samples = (
        tuple(column[i] for i in rows) for column in (batch.query_lens, batch.context_lens, batch.samples)
    )
    return StepBatch(query, context, (NO_SLOT,) * len(rows), tuple(map(bool, samples)), idle_s=idle_s)


def blocks_without_lora(geometry: ModelGeometry, limits: EngineLimits, gpu_bytes: int, resident: int = 1) -> int:
    """KV blocks beside `resident` whole models, with no LoRA slots. Raises `BackendError` if they do not fit."""
    others = int((resident - 1) * geometry.weights_bytes / limits.gpu_memory_utilization)
    return memory_plan(geometry, replace(limits, max_loras=0), gpu_bytes - others).num_gpu_blocks


def model_load_bytes_per_s(profile: str, given_gb_s: float | None) -> float:
    """Host to GPU bandwidth of whole models: `given_gb_s`, else the profile's measured copies from pinned host memory.

    Raises `ScenarioError` for a profile that was made from another engine's logs and knows no bandwidth.
    """
    if given_gb_s is not None:
        return given_gb_s * 1e9
    measured = load_profile(profile).load.bytes_per_s
    if measured >= FREE_BYTES_PER_S:
        raise ScenarioError(
            f"profile {profile}: has no measured load bandwidth; give --model-load-gb-s or cost.model_load_gb_s"
        )
    return measured
