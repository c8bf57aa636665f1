"""What a fleet consists of: replicas as a router sees them, and requests on their way through."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import simpy

    from sim.compiled import CompiledReplica, CompiledState
    from sim.replica import Replica
    from sim.state import RequestState

UP, STARTING, DOWN, DRAINING, GONE = "up", "starting", "down", "draining", "gone"
NOWHERE = -1
"""Replica of a request that waits at the router."""


@dataclass(slots=True)
class Ticket:
    """A request's way through the fleet: its attempt that counts, where that is, and what earlier ones came to.

    An attempt whose replica failed starts over elsewhere: `requeues` of them, whose `lost_tokens` had been emitted.
    """

    state: RequestState | CompiledState
    replica: int = NOWHERE
    requeues: int = 0
    lost_tokens: int = 0


@dataclass(slots=True)
class Member:
    """One replica of the fleet; what a router sees of it (`sim.router.View`). `lives`: its engines, the last one now."""

    index: int
    max_loras: int
    status: str = STARTING
    lives: list[Replica | CompiledReplica] = field(default_factory=list)
    paid_from_s: float = 0.0
    paid_s: float = 0.0
    failures: int = 0
    sent: int = 0
    process: simpy.Process | None = None

    @property
    def engine(self) -> Replica | CompiledReplica:
        return self.lives[-1]

    @property
    def waiting(self) -> int:
        return self.engine.waiting

    @property
    def outstanding(self) -> int:
        return self.engine.outstanding

    @property
    def kv_usage(self) -> float:
        return self.engine.kv_usage

    @property
    def resident(self) -> Collection[int]:
        return self.engine.resident

    @property
    def running_adapters(self) -> Collection[int]:
        return self.engine.running_adapters

    @property
    def waiting_adapters(self) -> Collection[int]:
        return self.engine.waiting_adapters
