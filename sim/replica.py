"""One replica: the engine loop, as a SimPy process around scheduler, adapter manager and backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Generator, Sequence
from functools import partial
from typing import Any
from zlib import crc32

import pandas as pd
import simpy

from backend.base import NO_SLOT, AdapterShape, Backend, StepBatch
from backend.contention import Contention
from sim.adapter_manager import AdapterManager, Move
from sim.config import EngineConfig
from sim.errors import IntegrityError
from sim.flight import Flight, Landing
from sim.integrity import Progress, check_step
from sim.kv_cache import BlockPool
from sim.loading import LoadLane
from sim.scheduler import Scheduler, StepPlan
from sim.state import RequestState
from sim.tables import AdapterUse, MoveRow, StepRow, StepTotals, row_table
from workloads.adapters import Catalogue
from workloads.requests import BASE

Process = Generator[simpy.Event, Any, None]


class Replica:
    """One engine: while it has requests it plans a step, moves adapters, executes, and applies the outcome."""

    def __init__(
        self,
        env: simpy.Environment,
        catalogue: Catalogue,
        config: EngineConfig,
        backend: Backend,
        *,
        pinned: Sequence[int] = (),
        registered: Sequence[int] = (),
        check: bool = False,
        keep_rows: bool = True,
    ) -> None:
        self.env = env
        self.catalogue = catalogue
        self.config = config
        self.backend = backend
        self.check = check
        capacity = backend.capacity()
        self.pool = BlockPool(capacity.num_gpu_blocks, capacity.block_size, prefix_caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(config, self.pool, pinned)
        self.manager = AdapterManager(config.max_loras, config.host_loras, config.lora_eviction_policy, self._cost)
        self.contention = getattr(backend, "contention", Contention())
        self.lane = LoadLane(env, self.manager, partial(self._carry_out, slower=self.contention.load))
        self.moves: list[MoveRow] = []
        self.live = bool(getattr(backend, "needs_block_tables", False))
        self.rows: list[StepRow] = []
        self.totals = StepTotals()
        self.keep_rows = keep_rows
        self.uses: dict[int, AdapterUse] = {}
        self._progress = Progress(1000 + 10 * config.max_num_seqs)
        self._arrival = env.event()
        self._flying: Flight | None = None
        self._gpu_free_s = 0.0
        self._lane_moves: list[Move] = []
        self._preload(pinned, registered)

    def _cost(self, adapter: int) -> float:
        """What bringing an adapter back costs, up to a factor: its bytes go with its rank."""
        shape = self.catalogue[adapter]
        return float(shape.rank * len(shape.target_modules))

    def _preload(self, pinned: Sequence[int], registered: Sequence[int]) -> None:
        """Pinned and registered adapters are there before the first request, as those named on an engine's command line are."""
        for adapter in registered:
            self.manager.bring(adapter)
        for move in self.manager.take():
            self._carry_out(move, self.env.now)
        self.uses.clear()
        self.moves.clear()
        for adapter in pinned:
            self.manager.bring(adapter)
            self.manager.pin(adapter)
        for move in self.manager.take():
            self._carry_out(move, self.env.now)

    def add(self, state: RequestState) -> None:
        """A request arrives; it wakes an idle engine."""
        self.scheduler.add(state)
        if not self._arrival.triggered:
            self._arrival.succeed()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self.scheduler.waiting)

    @property
    def outstanding(self) -> int:
        """Requests that wait or run."""
        return len(self.scheduler.running) + self.waiting

    @property
    def kv_usage(self) -> float:
        """Used share of the KV blocks."""
        return self.pool.used / max(1, self.pool.used + self.pool.free)

    @property
    def resident(self) -> Collection[int]:
        """The adapters in slots."""
        return self.manager.slots

    @property
    def running_adapters(self) -> Collection[int]:
        """Adapters of the running requests."""
        return {state.adapter for state in self.scheduler.running} - {BASE}

    @property
    def waiting_adapters(self) -> Collection[int]:
        """Adapters of the waiting requests."""
        return {state.adapter for state in self.scheduler.waiting} - {BASE}

    def unfinished(self) -> list[RequestState]:
        """All that wait or run, by their rows."""
        return sorted(self.scheduler.unfinished(), key=lambda state: state.row)

    @property
    def now_s(self) -> float:
        """The simulation's clock, which is this engine's."""
        return float(self.env.now)

    def finish(self, until_s: float) -> None:
        """Nothing: the simulation has played all that there was."""

    def kill(self) -> None:
        """Nothing: its process has been interrupted."""

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Step rows and moves."""
        return row_table(self.rows, StepRow), row_table(self.moves, MoveRow)

    def running_rows(self) -> set[int]:
        """Rows of the running requests."""
        return {state.row for state in self.scheduler.running}

    def run(self) -> Process:
        """The engine loop: never idle while a request can be scheduled (I10)."""
        while True:
            if not (self.scheduler.running or self.scheduler.waiting or self._flying):
                self._arrival = self.env.event()
                yield self._arrival
            yield from self._step()

    def _step(self) -> Process:
        plan = self._plan()
        launched = self._launch(plan) if plan.tokens else None
        if self.config.async_scheduling:
            # `EngineCore.step_with_batch_queue`: the next step is planned while this one runs.
            landing, self._flying = self._flying, launched
        else:
            landing = launched
        if landing is not None:
            yield Landing(self.env, max(0.0, landing.end_s - self.env.now))
            self._land(landing)
            yield self.env.timeout(0.0)
        elif launched is None and not plan.preempted:
            if not self.lane.loading:
                raise IntegrityError("I10: the engine has requests and plans nothing")
            self._arrival = self.env.event()
            yield self.env.any_of([self._arrival, self.lane.arrived])

    def _plan(self) -> StepPlan:
        overlapped = self.config.lora_loading == "overlapped"
        plan = self.scheduler.schedule(self.env.now, self.lane.resident() if overlapped else self.manager.slots)
        if plan.awaiting:
            running = {state.adapter for state in self.scheduler.running} - {BASE}
            self._lane_moves += self.lane.start(plan.awaiting, running)
        for item in plan.admitted:
            if item.state.first_scheduled_s is None:
                item.state.first_scheduled_s = self.env.now
                item.state.cached_tokens = item.found
        self._progress.note(len(plan.preempted), sum(item.samples for item in plan.scheduled))
        return plan

    def _launch(self, plan: StepPlan) -> Flight:
        adapters = list(dict.fromkeys(i.state.adapter for i in plan.scheduled if i.state.adapter != BASE))
        if self.config.lora_order == "set":
            adapters.sort(key=lambda adapter: crc32(str(adapter).encode()))
        moves = self._touch(adapters)
        stage_s, copy_s = 0.0, 0.0
        for move in moves:
            seconds = self._carry_out(move, self.env.now + stage_s + copy_s)
            if move.kind == "load":
                copy_s += seconds
            else:
                stage_s += seconds
        if self.check:
            check_step(self.scheduler, self.manager, plan, self.lane.loading)
        idle_s = max(0.0, self.env.now + stage_s + copy_s - self._gpu_free_s)
        timing = self.backend.execute(self._batch(plan, idle_s))
        if self.lane.loading:
            slower = self.contention.of_step(plan.tokens)
            timing = dataclasses.replace(timing, device_s=timing.device_s * slower)
        start_s = max(self.env.now, self._gpu_free_s)
        # Reading adapters and preparing the step is the host's work: it goes on while the GPU still runs the last step.
        # The copy into the slots is queued on the GPU before the step itself.
        ready_s = max(self.env.now + stage_s + timing.host_s, self._gpu_free_s)
        self._gpu_free_s = ready_s + copy_s + timing.device_s
        moves, self._lane_moves = self._lane_moves + moves, []
        return Flight(
            plan, timing, moves, stage_s + copy_s, start_s, self._gpu_free_s, len(adapters), self.pool.used, self.pool.free
        )  # fmt: skip

    def _touch(self, adapters: list[int]) -> list[Move]:
        for adapter in adapters:
            use = self.uses.setdefault(adapter, AdapterUse())
            use.step_uses += 1
            use.hits += adapter in self.manager.slots
        self.manager.apply(adapters)
        return self.manager.take()

    def _carry_out(self, move: Move, at_s: float, slower: float = 1.0) -> float:
        """Have the backend do a move that begins at `at_s`; returns the seconds it takes, a load `slower` times what it says."""
        use = self.uses.setdefault(move.adapter, AdapterUse())
        seconds = 0.0
        match move.kind:
            case "stage":
                use.stages += 1
                seconds = self.backend.stage(self.shape(move.adapter)).elapsed_s
            case "load":
                use.activations += 1
                seconds = self.backend.load(self.shape(move.adapter), move.slot).elapsed_s * slower
            case "evict":
                use.evictions += 1
            case "drop":
                self.backend.drop(move.adapter)
        if self.keep_rows:
            self.moves.append(MoveRow(at_s, at_s + seconds, move.kind, move.adapter, move.slot))
        return seconds

    def shape(self, adapter_id: int) -> AdapterShape:
        """What the backend must know of an adapter."""
        a = self.catalogue[adapter_id]
        return AdapterShape(a.adapter_id, a.rank, a.target_modules, a.folder, a.scaling)

    def _batch(self, plan: StepPlan, idle_s: float) -> StepBatch:
        slots = self.manager.slots
        batch = plan.scheduled
        lengths = tuple([item.tokens for item in batch]), tuple([item.computed for item in batch])
        in_slots = tuple([slots[i.state.adapter] if i.state.adapter != BASE else NO_SLOT for i in batch])
        samples = tuple([item.samples for item in batch])
        if not self.live:
            return StepBatch(*lengths, in_slots, samples, skipped=len(plan.skipped), idle_s=idle_s)
        tables = tuple([tuple(item.state.blocks) for item in batch])
        decodes = tuple([i.tokens == 1 and i.computed >= i.state.request.prompt_tokens for i in batch])
        return StepBatch(*lengths, in_slots, samples, tables, decodes)

    def _land(self, flight: Flight) -> None:
        """A step has ended: its tokens are out."""
        finished = self.scheduler.update(flight.plan)
        now = self.env.now
        for item in flight.plan.scheduled:
            if item.samples and item.state.first_token_s is None:
                item.state.first_token_s = now
        for state in finished:
            state.finish_s = now
        row = self._row(flight, len(finished))
        self.totals.add(row)
        if self.keep_rows:
            self.rows.append(row)

    def _row(self, flight: Flight, finished: int) -> StepRow:
        plan, timing = flight.plan, flight.timing
        prefills = [item.tokens for item in plan.scheduled if item.computed < item.state.request.prompt_tokens]
        kinds = [move.kind for move in flight.moves]
        return StepRow(
            self.totals.steps, flight.start_s, flight.end_s, timing.device_s, timing.host_s, flight.load_s, plan.tokens,
            sum(prefills), len(prefills), len(plan.scheduled) - len(prefills), len(self.scheduler.running),
            len(self.scheduler.waiting), flight.adapters, len(plan.admitted), len(plan.preempted), len(plan.skipped),
            finished, sum(item.found for item in plan.admitted), kinds.count("stage"), kinds.count("load"),
            kinds.count("evict"), flight.used_blocks, flight.free_blocks, timing.extrapolated,
        )  # fmt: skip
