"""The scheduler: which tokens of which requests the next step computes.

Policy of vLLM's V1 engine (`vllm/v1/core/sched/scheduler.py`, `Scheduler`; `async_scheduler.py`, `AsyncScheduler`).
Pure policy: no clock, no I/O, no metrics.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass, field

from sim.config import EngineConfig
from sim.kv_cache import BlockPool
from sim.state import RequestState
from sim.waiting import WAITING
from workloads.requests import BASE


@dataclass(slots=True)
class Scheduled:
    """One request's part in a step: `tokens` to compute after the `computed` ones; `samples`: its last row yields a token.

    `found`: how many of the `computed` come from the prefix cache just now; `resumed`: it had been preempted.
    """

    state: RequestState
    tokens: int
    computed: int
    found: int = 0
    resumed: bool = False
    samples: bool = False


@dataclass(slots=True)
class StepPlan:
    """What one step does: `running` requests first, then the `admitted`, which is the batch order.

    `skipped` were passed over because `max_loras` adapters run, `awaiting` because their adapter is not loaded yet.
    """

    budget: int
    running: list[Scheduled] = field(default_factory=list)
    admitted: list[Scheduled] = field(default_factory=list)
    preempted: list[RequestState] = field(default_factory=list)
    skipped: list[RequestState] = field(default_factory=list)
    awaiting: list[RequestState] = field(default_factory=list)

    @property
    def scheduled(self) -> list[Scheduled]:
        return self.running + self.admitted

    @property
    def tokens(self) -> int:
        return sum(item.tokens for item in self.running) + sum(item.tokens for item in self.admitted)


class Scheduler:
    """Continuous batching with chunked prefill, preemption by recomputation and the `max_loras` rule."""

    def __init__(self, config: EngineConfig, pool: BlockPool, pinned: Collection[int] = ()) -> None:
        self.config = config
        self.pool = pool
        self.pinned = frozenset(pinned)
        self.waiting = WAITING[config.scheduling_policy](config.ageing_s)
        self.running: list[RequestState] = []
        self._watermark_blocks = int(config.watermark * (pool.total + 1))

    def add(self, state: RequestState) -> None:
        """A request arrives."""
        self.waiting.add(state)

    def schedule(self, now_s: float = 0.0, resident: Container[int] = ()) -> StepPlan:
        """Plan one step: running requests first, then admissions while budget, seats, blocks and adapters last.

        `resident`: the adapters that are loaded. vLLM's own policies do not look at it.
        """
        plan = StepPlan(self.config.max_num_batched_tokens)
        # A lone request gains nothing from leaving room for others, so vLLM lifts the threshold for it.
        alone = len(self.running) + len(self.waiting) <= 1
        threshold = 0 if alone else self.config.long_prefill_token_threshold
        self._schedule_running(plan, threshold)
        # One preemption shows that blocks are short: nobody is admitted in that step.
        if not plan.preempted:
            self._admit(plan, threshold, now_s, resident)
        for item in plan.scheduled:
            self._advance(item)
        return plan

    def _schedule_running(self, plan: StepPlan, threshold: int) -> None:
        index = 0
        while index < len(self.running) and plan.budget > 0:
            state = self.running[index]
            count = self._chunk(self._left(state), threshold, plan.budget)
            if count == 0:
                index += 1
                continue
            while not self.pool.grow(state, state.computed + count):
                victim = self.waiting.victim(self.running)
                # Under `priority` the victim may stand before `state`, with tokens in this step: they are given back.
                index -= self.running.index(victim) < index
                self._preempt(victim, plan)
                if victim is state:
                    break
            else:
                plan.running.append(Scheduled(state, count, state.computed))
                plan.budget -= count
                index += 1

    def _left(self, state: RequestState) -> int:
        """Tokens that a running request has yet to compute, those being sampled among them; 0 if its last one is."""
        if state.placeholders and state.emitted + state.placeholders >= state.limit:
            return 0
        left = state.tokens + state.placeholders - state.computed
        return min(left, self.config.max_model_len - state.computed - 1)

    @staticmethod
    def _chunk(left: int, threshold: int, budget: int) -> int:
        return min(left, budget, threshold) if threshold else min(left, budget)

    def _preempt(self, victim: RequestState, plan: StepPlan) -> None:
        """Throw `victim` out: its blocks are free at once and its tokens, outputs too, are computed anew one day."""
        self.running.remove(victim)
        for item in [item for item in plan.running if item.state is victim]:
            plan.running.remove(item)
            plan.budget += item.tokens
        self.pool.release(victim)
        victim.computed = 0
        victim.placeholders = 0
        victim.preempted = True
        victim.preemptions += 1
        self.waiting.requeue(victim)
        plan.preempted.append(victim)

    def _admit(self, plan: StepPlan, threshold: int, now_s: float, resident: Container[int]) -> None:
        # All running requests count, also those without tokens in this step (vLLM 0.33); pinned adapters always do.
        adapters = ({state.adapter for state in self.running} | self.pinned) - {BASE}
        for state in self._candidates(plan, now_s, resident):
            if not self._adapter_fits(state, adapters, plan, resident):
                if self.waiting.is_barrier(state, now_s):
                    break
                continue
            found = self.pool.lookup(state)
            computed = len(found) * self.pool.block_size
            left = self._chunk(state.tokens - computed, threshold, state.tokens)
            if left > plan.budget and not self.config.enable_chunked_prefill:
                break
            count = min(left, plan.budget)
            if not self._blocks_fit(state, computed + count, found):
                break
            self.pool.grow(state, computed + count, found)
            state.computed = computed
            self.running.append(state)
            adapters |= {state.adapter} - {BASE}
            plan.admitted.append(Scheduled(state, count, computed, computed, state.preempted))
            plan.budget -= count
            state.preempted = False
        for item in plan.admitted:
            self.waiting.remove(item.state)
        for state in plan.skipped:
            state.skips += 1

    def _candidates(self, plan: StepPlan, now_s: float, resident: Container[int]) -> Iterator[RequestState]:
        """Those that wait, in the policy's order, while there is a seat and budget. The skipped keep their place."""
        if self._has_room(plan):
            for state in self.waiting.candidates(now_s, resident):
                yield state
                if not self._has_room(plan):
                    return

    def _has_room(self, plan: StepPlan) -> bool:
        return plan.budget > 0 and len(self.running) < self.config.max_num_seqs

    def _adapter_fits(
        self, state: RequestState, adapters: Collection[int], plan: StepPlan, resident: Container[int]
    ) -> bool:
        """The `max_loras` rule; where loading is overlapped the adapter must be loaded, too."""
        if state.adapter == BASE:
            return True
        if state.adapter not in adapters and len(adapters) == self.config.max_loras:
            plan.skipped.append(state)
            return False
        if self.config.lora_loading == "overlapped" and state.adapter not in resident:
            plan.awaiting.append(state)
            return False
        return True

    def _blocks_fit(self, state: RequestState, tokens: int, found: list[int]) -> bool:
        """Whether blocks for `tokens` tokens can be had, and by vLLM's default those for all that is known to come."""
        # A test, not a reservation: two long prompts admitted one after the other can still collide.
        tested = state.tokens if self.config.scheduler_reserve_full_isl else tokens
        kept_free = self._watermark_blocks if self.running else 0
        return self.pool.needed(state, tested, found) + kept_free <= self.pool.free

    def _advance(self, item: Scheduled) -> None:
        state = item.state
        state.computed += item.tokens
        item.samples = state.computed == state.tokens + state.placeholders
        # The next step is planned before this token is known, so its place is held (`AsyncScheduler`).
        state.placeholders += item.samples and self.config.async_scheduling

    def update(self, plan: StepPlan) -> list[RequestState]:
        """Apply a step's outcome: tokens sampled, requests finished and their blocks released. Returns the finished."""
        finished = []
        for item in plan.scheduled:
            state = item.state
            if not item.samples or state.done:
                continue
            state.emitted += 1
            # A request preempted while its token was in flight still gets the token, and may even end by it.
            if state.placeholders and not state.preempted:
                state.placeholders -= 1
                self.pool.register(state, state.computed - state.placeholders)
            if state.emitted >= state.limit:
                finished.append(state)
        for state in finished:
            if state.preempted:
                self.waiting.remove(state)
        self._remove(finished)
        return finished

    def abort(self, state: RequestState) -> None:
        """A client gives up: the request leaves at once; a token of it in flight is dropped."""
        if state not in self.running:
            self.waiting.remove(state)
        self._remove([state])

    def _remove(self, states: list[RequestState]) -> None:
        for state in states:
            state.done = True
            self.pool.release(state)
        if states:
            self.running = [state for state in self.running if not state.done]

    def unfinished(self) -> Iterator[RequestState]:
        """Everything that is running or waiting."""
        yield from self.running
        yield from self.waiting
