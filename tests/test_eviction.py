"""Adapter residency under every eviction policy: who leaves, who is protected, and what is always so."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sim.adapter_manager import AdapterManager
from sim.errors import AdapterError
from sim.eviction import EVICTION


def loads(manager: AdapterManager) -> list[tuple[str, int]]:
    return [(m.kind, m.adapter) for m in manager.take() if m.kind in ("load", "evict")]


def filled(policy: str, slots: int, cost: dict[int, float] | None = None) -> AdapterManager:
    manager = AdapterManager(slots, 16, policy, lambda a: (cost or {}).get(a, 1.0))
    manager.apply(list(range(1, slots + 1)))
    manager.take()
    return manager


def test_lru_thrashes_within_a_step_as_vllm_does_and_the_protected_one_does_not() -> None:
    plain, protected = filled("lru", 2), filled("lru_protected", 2)
    for manager in (plain, protected):
        manager.apply([3, 1])
    assert loads(plain) == [("evict", 1), ("load", 3), ("evict", 2), ("load", 1)]
    assert loads(protected) == [("evict", 2), ("load", 3)]


def test_fifo_forgets_the_first_though_it_is_in_use() -> None:
    manager = filled("fifo", 2)
    manager.apply([1])
    manager.apply([3])
    assert loads(manager) == [("evict", 1), ("load", 3)]


def test_lfu_forgets_the_least_used_though_it_is_the_latest() -> None:
    manager = filled("lfu", 3)
    for step in ([1, 2], [1, 3], [2, 1], [3]):
        manager.apply(step)
    manager.apply([2])
    manager.take()
    manager.apply([4])  # 1 has 4 uses, 2 has 4, 3 has 3
    assert loads(manager) == [("evict", 3), ("load", 4)]


def test_cost_aware_keeps_the_dear_until_its_fame_fades() -> None:
    manager = filled("cost_aware", 2, {1: 4.0})
    evicted = []
    for adapter in range(3, 20):
        manager.apply([adapter])
        evicted += [a for kind, a in loads(manager) if kind == "evict"]
    assert evicted[0] == 2
    assert 1 in evicted
    assert evicted.index(1) == 3  # by then the floor is one below its score, where each newcomer starts above it


def test_pinned_adapters_stay() -> None:
    manager = filled("lru", 2)
    manager.pin(1)
    for adapter in (3, 4, 5):
        manager.apply([adapter])
        assert 1 in manager.slots
    manager.pin(5)
    with pytest.raises(AdapterError, match="pinned"):
        manager.apply([6])
    with pytest.raises(AdapterError, match="not in host memory"):
        manager.pin(99)


class Residency(RuleBasedStateMachine):
    """Steps, pins and removals in any order; the invariants I3 and I4 hold in between."""

    @initialize(slots=st.integers(1, 4), extra=st.integers(0, 3), policy=st.sampled_from(sorted(EVICTION)))
    def start(self, slots: int, extra: int, policy: str) -> None:
        self.policy = policy
        self.manager = AdapterManager(slots, slots + extra, policy, float)
        self.host: set[int] = set()
        self.at: dict[int, int] = {}

    def _follow(self) -> list[int]:
        """Play the moves on a model of memory that only knows what is where."""
        evicted = []
        for move in self.manager.take():
            match move.kind:
                case "stage":
                    assert move.adapter not in self.host
                case "keep":
                    self.host.add(move.adapter)
                case "drop":
                    self.host.remove(move.adapter)
                case "load":
                    assert move.adapter in self.host
                    assert move.slot not in self.at
                    self.at[move.slot] = move.adapter
                case "evict":
                    assert self.at.pop(move.slot) == move.adapter
                    evicted.append(move.adapter)
        return evicted

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        free = self.manager.max_loras - len(self.manager.gpu.pinned)
        pinned = sorted(self.manager.gpu.pinned)
        others = data.draw(st.lists(st.integers(1, 12).filter(lambda a: a not in pinned), max_size=free, unique=True))
        adapters = data.draw(st.permutations(others + pinned[: data.draw(st.integers(0, len(pinned)))]))
        self.manager.apply(adapters)
        evicted = self._follow()
        assert set(adapters) <= set(self.manager.slots), "I4"
        if EVICTION[self.policy].protects_step:
            assert not set(evicted) & set(adapters), "I4: a policy that protects evicted what the step needs"

    @rule(adapter=st.integers(1, 12))
    def remove(self, adapter: int) -> None:
        assert self.manager.remove(adapter) == (adapter in self.host)
        self._follow()

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        resident = sorted(self.manager.slots)
        if resident and len(self.manager.gpu.pinned) < self.manager.max_loras - 1:
            self.manager.pin(data.draw(st.sampled_from(resident)))

    @rule()
    def clear(self) -> None:
        self.manager.clear()
        self._follow()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "manager"):
            return
        assert set(self.manager.host.entries) == self.host
        assert {slot: a for a, slot in self.manager.slots.items()} == self.at
        assert set(self.manager.gpu.entries) == set(self.at.values())
        assert set(self.at.values()) <= self.host, "GPU is within host"
        assert len(self.at) <= self.manager.max_loras, "I3"
        assert len(self.host) <= self.manager.host.capacity, "I3"
        assert self.manager.gpu.pinned <= set(self.manager.slots), "I4"


TestResidency = Residency.TestCase
TestResidency.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
