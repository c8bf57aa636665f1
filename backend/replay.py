"""The replay backend: steps and loads take what the profile's curves say; nothing is executed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backend.base import AdapterShape, Capacity, EngineLimits, LoadTiming, StepBatch, StepTiming
from backend.contention import Contention
from backend.features import StepFeatures
from backend.predictor import Predictor

if TYPE_CHECKING:
    from backend.geometry import ModelGeometry
    from backend.profile import Profile


class ReplayBackend:
    """Replays `profile` for an engine with `num_gpu_blocks` KV blocks."""

    needs_block_tables = False

    def __init__(self, profile: Profile, geometry: ModelGeometry, limits: EngineLimits, num_gpu_blocks: int) -> None:
        self.profile = profile
        self.geometry = geometry
        self.limits = limits
        self.num_gpu_blocks = num_gpu_blocks
        self.slot_ranks: dict[int, int] = {}
        self.after_prompts = False
        predictor = profile.predictor
        self.heat = predictor.new_heat() if isinstance(predictor, Predictor) else None

    @property
    def step_costs(self) -> tuple[Predictor, float] | None:
        """What `execute` takes the seconds of a step from, and the factor on them: all that a compiled replay must know.

        None where something else stands for the predictor, which a compiled replay could not ask.
        """
        predictor = self.profile.predictor
        return (predictor, 1.0) if isinstance(predictor, Predictor) else None

    @property
    def contention(self) -> Contention:
        """What steps and loads that run beside each other cost."""
        graphs = self.profile.predictor.graph_sizes
        return Contention.of(self.profile.meta, graphs[-1] if graphs else 0)

    def capacity(self) -> Capacity:
        """KV blocks by the memory model, slots as configured."""
        return Capacity(self.num_gpu_blocks, self.limits.block_size, self.limits.max_loras)

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        """Disk to host, by the measured curve: the bytes of the user's own modules, else of all seven, as files have them."""
        nbytes = self.geometry.lora_bytes(adapter.rank, adapter.target_modules if adapter.folder else None)
        return LoadTiming(self.profile.stage.seconds(nbytes), nbytes)

    def drop(self, adapter_id: int) -> None:
        """Nothing to forget."""

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        """Host to slot, by the measured curve."""
        self.slot_ranks[slot] = adapter.rank
        nbytes = self.geometry.lora_bytes(adapter.rank)
        return LoadTiming(self.profile.load.seconds(nbytes), nbytes)

    def execute(self, batch: StepBatch) -> StepTiming:
        """The predicted time of the step, on a GPU as hot as the steps before have left it."""
        features = StepFeatures.of(
            batch, self.slot_ranks, after_prompts=self.after_prompts, max_loras=self.limits.max_loras
        )
        self.after_prompts = not features.decode_only
        predictor = self.profile.predictor
        if self.heat is None:
            device_s, host_s, extrapolated = predictor.predict(features)
        else:
            device_s, host_s, extrapolated = predictor.predict(features, self.heat, batch.idle_s)
        return StepTiming(device_s, host_s, extrapolated)

    def close(self) -> None:
        """Nothing to release."""
