"""A live backend with something around its steps: the rest of the seam is handed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backend.base import AdapterShape, Capacity, LoadTiming

if TYPE_CHECKING:
    from backend.live import LiveBackend


class AroundLive:
    """As `live`, but for `execute`, which whoever derives from this adds."""

    needs_block_tables = True

    def __init__(self, live: LiveBackend) -> None:
        self.live = live

    @property
    def steps_executed(self) -> int:
        """Steps that the live backend executed."""
        return self.live.steps_executed

    def capacity(self) -> Capacity:
        """As the live backend."""
        return self.live.capacity()

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        """As the live backend."""
        return self.live.stage(adapter)

    def drop(self, adapter_id: int) -> None:
        """As the live backend."""
        self.live.drop(adapter_id)

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        """As the live backend."""
        return self.live.load(adapter, slot)

    def close(self) -> None:
        """As the live backend."""
        self.live.close()
