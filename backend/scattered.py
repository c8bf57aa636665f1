"""The replay of a profile on a host whose speed goes in waves, as it does on real machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backend.base import EngineLimits, StepBatch, StepTiming
from backend.features import StepFeatures
from backend.replay import ReplayBackend

if TYPE_CHECKING:
    from backend.geometry import ModelGeometry
    from backend.host_draw import HostDraw
    from backend.profile import Profile


class ScatteredReplay(ReplayBackend):
    """As `ReplayBackend`, but what the host takes of a step is `host`'s ratio times its mean; one simulation owns one `host`."""

    def __init__(
        self, profile: Profile, geometry: ModelGeometry, limits: EngineLimits, num_gpu_blocks: int, host: HostDraw
    ) -> None:
        super().__init__(profile, geometry, limits, num_gpu_blocks)
        self._host = host

    @property
    def step_costs(self) -> None:
        """Nothing that a compiled replay could know: like steps do not take alike."""

    def execute(self, batch: StepBatch) -> StepTiming:
        """The predicted time of the step, on this host at this time."""
        features = StepFeatures.of(
            batch, self.slot_ranks, after_prompts=self.after_prompts, max_loras=self.limits.max_loras
        )
        self.after_prompts = not features.decode_only
        regime, device_s, launch_s, host_s = self.profile.predictor.split(features)
        ratio = self._host.ratio(launched=bool(regime.launch))
        device_s = max(device_s, ratio * launch_s)
        if self.heat is not None:
            device_s = self.heat.step(device_s, regime.heat, features.rows, batch.idle_s + ratio * host_s)
        timing = StepTiming(device_s, ratio * host_s, not regime.contains(features))
        self._host.passed(timing.elapsed_s)
        return timing
