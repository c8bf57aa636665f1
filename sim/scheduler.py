"""The scheduler: which tokens of which requests the next step computes.

Policy of vLLM's V1 engine (`vllm/v1/core/sched/scheduler.py`, `Scheduler.schedule`), synchronous and
first come first served, without prefix caching. Pure policy: no clock, no I/O, no metrics.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from sim.config import EngineConfig
from sim.kv_cache import BlockPool
from sim.state import RequestState
from workloads.requests import BASE


@dataclass(slots=True)
class StepPlan:
    """What one step does. `scheduled`: (request, tokens to compute, tokens computed before), in batch order.

    `scheduled` holds the running ones first, then the `admitted`; `skipped` were passed over for `max_loras`.
    """

    scheduled: list[tuple[RequestState, int, int]] = field(default_factory=list)
    admitted: list[RequestState] = field(default_factory=list)
    resumed: list[bool] = field(default_factory=list)
    preempted: list[RequestState] = field(default_factory=list)
    skipped: list[RequestState] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(count for _, count, _ in self.scheduled)


class Scheduler:
    """Continuous batching with chunked prefill, preemption by recomputation and the `max_loras` rule."""

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.waiting: deque[RequestState] = deque()
        self.running: list[RequestState] = []

    def add(self, state: RequestState) -> None:
        """A request arrives."""
        self.waiting.append(state)

    def schedule(self) -> StepPlan:
        """Plan one step: running requests first, then admissions while budget, seats, blocks and adapters last."""
        plan = StepPlan()
        # A lone request gains nothing from leaving room for others, so vLLM lifts the threshold for it.
        alone = len(self.running) + len(self.waiting) <= 1
        threshold = 0 if alone else self.config.long_prefill_token_threshold
        budget = self._schedule_running(plan, threshold)
        # One preemption shows that blocks are short: nobody is admitted in that step.
        if not plan.preempted:
            self._admit(plan, budget, threshold)
        for state, count, _ in plan.scheduled:
            state.computed += count
        return plan

    def _schedule_running(self, plan: StepPlan, threshold: int) -> int:
        budget = self.config.max_num_batched_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            state = self.running[index]
            count = self._chunk(state.tokens - state.computed, threshold, budget)
            count = min(count, self.config.max_model_len - state.computed - 1)
            if count == 0:
                index += 1
                continue
            if not self._make_room(state, count, plan):
                break
            plan.scheduled.append((state, count, state.computed))
            budget -= count
            index += 1
        return budget

    def _make_room(self, state: RequestState, count: int, plan: StepPlan) -> bool:
        """Blocks for `count` more tokens of a running request; the latest admitted pay for it, itself last of all."""
        while not self.pool.grow(state, state.computed + count):
            victim = self.running.pop()
            self.pool.release(victim)
            victim.computed = 0
            victim.preempted = True
            victim.preemptions += 1
            self.waiting.appendleft(victim)
            plan.preempted.append(victim)
            if victim is state:
                return False
        return True

    def _admit(self, plan: StepPlan, budget: int, threshold: int) -> None:
        # All running requests count, also those that got no tokens in this step (vLLM 0.33).
        adapters = {state.adapter for state in self.running} - {BASE}
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            state = self.waiting.popleft()
            if state.adapter != BASE and state.adapter not in adapters and len(adapters) == self.config.max_loras:
                plan.skipped.append(state)
                continue
            count = self._chunk(state.tokens, threshold, budget)
            # The whole prompt must fit now, although only the first chunk takes its blocks (`scheduler_reserve_full_isl`).
            if self.pool.blocks_for(state.tokens) > self.pool.free:
                self.waiting.appendleft(state)
                break
            self.pool.grow(state, count)
            self.running.append(state)
            adapters |= {state.adapter} - {BASE}
            plan.scheduled.append((state, count, 0))
            plan.admitted.append(state)
            plan.resumed.append(state.preempted)
            state.preempted = False
            budget -= count
        self.waiting.extendleft(reversed(plan.skipped))
        for state in plan.skipped:
            state.skips += 1

    @staticmethod
    def _chunk(needed: int, threshold: int, budget: int) -> int:
        return min(needed, budget, threshold) if threshold else min(needed, budget)

    def update(self, plan: StepPlan) -> list[RequestState]:
        """Apply a step's outcome: tokens sampled, requests finished and their blocks released. Returns the finished."""
        finished = []
        for state, _, _ in plan.scheduled:
            if state.computed < state.tokens:
                continue
            state.emitted += 1
            if state.emitted >= state.limit:
                finished.append(state)
                self.pool.release(state)
        if finished:
            gone = {id(state) for state in finished}
            self.running = [state for state in self.running if id(state) not in gone]
        return finished

    def unfinished(self) -> Iterable[RequestState]:
        """Everything that is waiting or running."""
        yield from self.running
        yield from self.waiting
