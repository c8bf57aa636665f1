"""The simulation: SimPy processes for arrivals and a replica, around scheduler, adapter manager and backend."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import simpy

from backend.base import NO_SLOT, AdapterShape, Backend, StepBatch
from sim.adapter_manager import AdapterManager, Move
from sim.config import EngineConfig
from sim.errors import ScenarioError
from sim.kv_cache import BlockPool
from sim.scheduler import Scheduler, StepPlan
from sim.state import RequestState
from sim.tables import AdapterUse, RunTables, StepRow, adapter_table, request_table, step_table
from workloads.adapters import Catalogue
from workloads.requests import BASE, Request, RequestTable

Process = Generator[simpy.Event, Any, None]


class Replica:
    """One engine: while it has requests it plans a step, moves adapters, executes, and applies the outcome."""

    def __init__(self, env: simpy.Environment, catalogue: Catalogue, config: EngineConfig, backend: Backend) -> None:
        self.env = env
        self.catalogue = catalogue
        self.backend = backend
        capacity = backend.capacity()
        self.pool = BlockPool(capacity.num_gpu_blocks, capacity.block_size)
        self.scheduler = Scheduler(config, self.pool)
        self.manager = AdapterManager(config.max_loras, config.host_loras)
        self.live = bool(getattr(backend, "needs_block_tables", False))
        self.rows: list[StepRow] = []
        self.uses: dict[int, AdapterUse] = {}
        self._arrival = env.event()

    def add(self, state: RequestState) -> None:
        """A request arrives; it wakes an idle engine."""
        self.scheduler.add(state)
        if not self._arrival.triggered:
            self._arrival.succeed()

    def run(self) -> Process:
        """The engine loop: never idle while a request can be scheduled (I10)."""
        while True:
            if not (self.scheduler.running or self.scheduler.waiting):
                self._arrival = self.env.event()
                yield self._arrival
            yield from self._step()

    def _step(self) -> Process:
        plan = self.scheduler.schedule()
        start = self.env.now
        adapters = list(dict.fromkeys(s.adapter for s, _, _ in plan.scheduled if s.adapter != BASE))
        moves = self._touch(adapters)
        load_s = sum(self._carry_out(move) for move in moves)
        used, free = self.pool.used, self.pool.free
        timing = self.backend.execute(self._batch(plan))
        yield self.env.timeout(load_s + timing.elapsed_s)
        now = self.env.now
        finished = self._apply(plan, start, now)
        prefills = [count for state, count, before in plan.scheduled if before < state.request.prompt_tokens]
        kinds = [move.kind for move in moves]
        self.rows.append(
            StepRow(
                len(self.rows), start, now, timing.device_s, timing.host_s, load_s, plan.tokens, sum(prefills),
                len(prefills), len(plan.scheduled) - len(prefills), len(self.scheduler.running),
                len(self.scheduler.waiting), len(adapters), len(plan.admitted), len(plan.preempted), len(plan.skipped),
                finished, kinds.count("stage"), kinds.count("load"), kinds.count("evict"), used, free,
                timing.extrapolated,
            )
        )  # fmt: skip

    def _touch(self, adapters: list[int]) -> list[Move]:
        for adapter in adapters:
            use = self.uses.setdefault(adapter, AdapterUse())
            use.step_uses += 1
            use.hits += adapter in self.manager.slots
        return self.manager.apply(adapters)

    def _carry_out(self, move: Move) -> float:
        """Have the backend do a move; returns the seconds it took."""
        use = self.uses.setdefault(move.adapter, AdapterUse())
        shape = self.shape(move.adapter)
        match move.kind:
            case "stage":
                use.stages += 1
                return self.backend.stage(shape).elapsed_s
            case "load":
                use.activations += 1
                return self.backend.load(shape, move.slot).elapsed_s
            case "evict":
                use.evictions += 1
            case _:
                self.backend.drop(move.adapter)
        return 0.0

    def shape(self, adapter_id: int) -> AdapterShape:
        """What the backend must know of an adapter."""
        adapter = self.catalogue[adapter_id]
        return AdapterShape(adapter.adapter_id, adapter.rank, adapter.target_modules)

    def _batch(self, plan: StepPlan) -> StepBatch:
        slots = self.manager.slots
        return StepBatch(
            tuple([count for _, count, _ in plan.scheduled]),
            tuple([before for _, _, before in plan.scheduled]),
            tuple([slots[s.adapter] if s.adapter != BASE else NO_SLOT for s, _, _ in plan.scheduled]),
            tuple([s.computed >= s.tokens for s, _, _ in plan.scheduled]),
            tuple([tuple(s.blocks) for s, _, _ in plan.scheduled]) if self.live else (),
        )

    def _apply(self, plan: StepPlan, start: float, now: float) -> int:
        for state in plan.admitted:
            if state.first_scheduled_s is None:
                state.first_scheduled_s = start
        finished = self.scheduler.update(plan)
        for state, _, _ in plan.scheduled:
            if state.emitted and state.first_token_s is None:
                state.first_token_s = now
        for state in finished:
            state.finish_s = now
        return len(finished)


def check(requests: RequestTable, catalogue: Catalogue, config: EngineConfig, backend: Backend) -> None:
    """Raise `ScenarioError` for what no engine could serve, before the clock starts."""
    for adapter in catalogue:
        if adapter.rank > config.max_lora_rank:
            raise ScenarioError(
                f"adapter {adapter.name} has rank {adapter.rank}, more than engine.max_lora_rank ({config.max_lora_rank})"
            )
    capacity = backend.capacity()
    room = capacity.num_gpu_blocks * capacity.block_size
    for request in requests:
        total = request.prompt_tokens + request.output_tokens
        if total > config.max_model_len:
            raise ScenarioError(
                f"workload request {request.request_id}: {request.prompt_tokens} prompt + {request.output_tokens} output"
                f" tokens are more than engine.max_model_len ({config.max_model_len})"
            )
        if total > room:
            raise ScenarioError(f"workload request {request.request_id}: {total} tokens, the KV cache holds {room}")
        if request.adapter > len(catalogue):
            raise ScenarioError(
                f"workload request {request.request_id}: adapter {request.adapter}, the catalogue has {len(catalogue)}"
            )


def simulate(
    requests: RequestTable,
    catalogue: Catalogue,
    config: EngineConfig,
    backend: Backend,
    *,
    horizon_s: float | None = None,
    on_step: Callable[[float, int], None] | None = None,
) -> RunTables:
    """Run `requests` through one replica on `backend`, to the end or to `horizon_s` seconds.

    Unfinished requests stay `running` or `waiting` in the tables. `on_step(now, finished)` is called as time passes.
    Raises `ScenarioError` for a request or adapter that the engine could never serve.
    """
    check(requests, catalogue, config, backend)
    env = simpy.Environment()
    replica = Replica(env, catalogue, config, backend)
    states: list[RequestState] = []

    def arrivals() -> Process:
        for request in requests:
            if request.arrival_s > env.now:
                yield env.timeout(request.arrival_s - env.now)
            state = RequestState(request, limit(request, config))
            states.append(state)
            replica.add(state)

    env.process(arrivals())
    env.process(replica.run())
    stop = float("inf") if horizon_s is None else horizon_s
    done = 0
    while (upcoming := env.peek()) <= stop and upcoming != float("inf"):
        env.step()
        if on_step is not None and len(replica.rows) > done:
            done = len(replica.rows)
            on_step(env.now, sum(s.finish_s is not None for s in states) if done % 256 == 0 else -1)
    end = env.now if horizon_s is None else horizon_s
    table = request_table(states, {s.request.request_id for s in replica.scheduler.running})
    return RunTables(table, step_table(replica.rows), adapter_table(catalogue, replica.uses, table), end)


def limit(request: Request, config: EngineConfig) -> int:
    """Output tokens after which a request ends: its own, or what `max_model_len` leaves."""
    return min(request.output_tokens, config.max_model_len - request.prompt_tokens)
