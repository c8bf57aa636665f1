"""Invariants of a running simulation, checked after every step where a run asks for it (`run.check`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from sim.adapter_manager import AdapterManager
from sim.errors import IntegrityError, LivelockError
from sim.scheduler import Scheduler, StepPlan
from workloads.requests import BASE


def check_step(scheduler: Scheduler, manager: AdapterManager, plan: StepPlan, loading: Collection[int] = ()) -> None:
    """Raise `IntegrityError` if the step breaks I3 to I6 (see docs/architecture.md). Call it after `schedule()`.

    `loading`: adapters that have a slot but are not there yet.
    """
    config = scheduler.config
    used = {item.state.adapter for item in plan.scheduled} - {BASE}
    running = {state.adapter for state in scheduler.running} - {BASE}
    _hold("I3", len(running) <= config.max_loras, f"{len(running)} adapters run, max_loras is {config.max_loras}")
    _hold("I3", len(manager.host.entries) <= config.host_loras, f"{len(manager.host.entries)} adapters in host memory")
    there = manager.slots.keys() - set(loading)
    _hold("I4", used <= there, f"adapters {sorted(used - there)} of the step are in no slot")
    _hold("I4", manager.gpu.pinned <= manager.slots.keys(), "a pinned adapter has lost its slot")
    _hold("I4", len(set(manager.slots.values())) == len(manager.slots), "two adapters have one slot")
    check_blocks(scheduler)
    _hold("I6", 0 <= plan.budget == config.max_num_batched_tokens - plan.tokens, f"{plan.tokens} tokens in a step")
    _hold("I6", len(scheduler.running) <= config.max_num_seqs, f"{len(scheduler.running)} requests run")


def check_blocks(scheduler: Scheduler) -> None:
    """Raise `IntegrityError` unless every KV block has exactly the owners that hold it, of one adapter (I5)."""
    pool = scheduler.pool
    holders = Counter(block for state in scheduler.running for block in state.blocks)
    adapters: dict[int, int] = {}
    for state in scheduler.running:
        _hold(
            "I5",
            len(state.blocks) == pool.blocks_for(state.computed),
            f"{state.request} has {len(state.blocks)} blocks",
        )
        for block in state.blocks:
            same = adapters.setdefault(block, state.adapter) == state.adapter
            _hold("I5", same, f"block {block} is shared by two adapters")
    _hold("I5", all(pool.owners[block] == count for block, count in holders.items()), "a block's owners are miscounted")
    _hold("I5", pool.used == len(holders), f"{pool.used} blocks used, {len(holders)} held")
    _hold("I5", not any(state.blocks for state in scheduler.waiting), "a waiting request holds blocks")


def _hold(invariant: str, holds: bool, message: str) -> None:
    if not holds:
        raise IntegrityError(f"{invariant}: {message}")


class Progress:
    """Notices an engine that only preempts: vLLM itself can, where requests tie in priority and arrival."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._preemptions = 0

    def note(self, preempted: int, sampled: int) -> None:
        """One step. Raises `LivelockError` after `patience` preemptions without a token."""
        self._preemptions = 0 if sampled else self._preemptions + preempted
        if self._preemptions > self.patience:
            raise livelock(self._preemptions)


def livelock(preemptions: int) -> LivelockError:
    """The error of an engine that preempted so often without a token."""
    return LivelockError(
        f"{preemptions} preemptions and not one token: requests preempt each other for ever, as in vLLM itself; give them"
        " different arrival times or priorities, leave engine.scheduler_reserve_full_isl on, or lower engine.max_num_seqs"
    )
