"""A step on its way through the GPU, and its end as an event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import simpy

from backend.base import StepTiming
from sim.adapter_manager import Move
from sim.scheduler import StepPlan


@dataclass(slots=True)
class Flight:
    """A step that was handed to the backend: what it does, and when the GPU starts and ends it."""

    plan: StepPlan
    timing: StepTiming
    moves: Sequence[Move]
    load_s: float
    start_s: float
    end_s: float
    adapters: int
    used_blocks: int
    free_blocks: int


class Landing(simpy.Event):
    """The end of a step. What else happens at that instant comes after it, and before the next plan."""

    def __init__(self, env: simpy.Environment, delay: float) -> None:
        super().__init__(env)
        self._ok = True
        self._value = None
        env.schedule(self, simpy.events.URGENT, delay)
