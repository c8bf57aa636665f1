"""The simulation: SimPy processes for arrivals and a replica."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import simpy

from backend.base import Backend
from sim.compiled import ROWS_AT_ONCE, CompiledReplica, Rows
from sim.compiled_inputs import Shared, supports
from sim.config import EngineConfig
from sim.errors import ScenarioError
from sim.replica import Process, Replica
from sim.state import RequestState
from sim.tables import ASKED, MoveRow, RunTables, StepRow, adapter_table, request_frame, request_table, row_table
from workloads.adapters import Catalogue
from workloads.requests import BASE, Request, RequestTable

OnStep = Callable[[float, int], None]
"""Told of the time and of the requests finished so far (-1: not counted just now)."""


def refuse_impossible(
    requests: RequestTable, catalogue: Catalogue, config: EngineConfig, backend: Backend, pinned: Sequence[int]
) -> None:
    """Raise `ScenarioError` for what no engine could serve, before the clock starts."""
    for adapter in catalogue:
        if adapter.rank > config.max_lora_rank:
            raise ScenarioError(
                f"adapter {adapter.name} has rank {adapter.rank}, more than engine.max_lora_rank ({config.max_lora_rank})"
            )
    if len(pinned) > config.max_loras:
        raise ScenarioError(
            f"adapters.pinned names {len(pinned)} adapters, more than engine.max_loras ({config.max_loras})"
        )
    if len(requests) == 0:
        return
    capacity = backend.capacity()
    room = (capacity.num_gpu_blocks - 1) * capacity.block_size
    total = requests.prompt_tokens + requests.output_tokens
    named = requests.adapter != BASE
    shut_out = named & ~np.isin(requests.adapter, pinned) & (len(pinned) == config.max_loras)
    wrong = (total > config.max_model_len) | (total > room) | (requests.adapter > len(catalogue)) | shut_out
    if not wrong.any():
        return
    row = int(np.argmax(wrong))
    where, asked = f"workload request {row}", int(requests.adapter[row])
    if total[row] > config.max_model_len:
        raise ScenarioError(
            f"{where}: {requests.prompt_tokens[row]} prompt + {requests.output_tokens[row]} output tokens are more than"
            f" engine.max_model_len ({config.max_model_len})"
        )
    if total[row] > room:
        raise ScenarioError(f"{where}: {total[row]} tokens, the KV cache holds {room}")
    if asked > len(catalogue):
        raise ScenarioError(f"{where}: adapter {asked}, the catalogue has {len(catalogue)}")
    raise ScenarioError(
        f"{where}: adapter {catalogue[asked].name} can never run,"
        f" adapters.pinned takes all engine.max_loras ({config.max_loras}) slots"
    )


def simulate(
    requests: RequestTable,
    catalogue: Catalogue,
    config: EngineConfig,
    backend: Backend,
    *,
    pinned: Sequence[int] = (),
    registered: Sequence[int] = (),
    check: bool = False,
    horizon_s: float | None = None,
    on_step: OnStep | None = None,
    step_rows: bool = True,
    on_rows: Rows | None = None,
    fast_forward: bool = True,
) -> RunTables:
    """Run `requests` through one replica on `backend`, to the end or to `horizon_s` seconds.

    `pinned`: ids of adapters that are loaded before the start and never evicted; each keeps one of `max_loras` for
    itself. `registered`: ids that were added in this order before the start, as far as caches hold them. `check`: verify the
    invariants after every step. Unfinished requests stay `running` or `waiting` in the tables. `on_step(now, finished)` is
    called as time passes. `step_rows`: keep a row a step and move; with `on_rows` they are handed to it as they come, and
    are not in the tables. `fast_forward`: use the compiled loop where it knows the engine (`sim.compiled.supports`); the
    tables are the same.
    Raises `ScenarioError` for a request or adapter that the engine could never serve, `IntegrityError` if a check fails.
    """
    refuse_impossible(requests, catalogue, config, backend, pinned)
    stop_s = float("inf") if horizon_s is None else horizon_s
    env = simpy.Environment()
    if fast_forward and not check and supports(config, backend):
        shared = Shared(requests, catalogue, config, backend)
        engine = CompiledReplica(
            env, shared, pinned=pinned, registered=registered, keep_rows=step_rows, on_rows=on_rows
        )
        _play_compiled(env, requests, engine, stop_s, on_step)
        end_s = max(env.now, engine.now_s) if horizon_s is None else horizon_s
        became = engine.states()
        rows = became["row"]
        asked = {name: getattr(requests, name)[rows] for name in ASKED}
        table = request_frame({"request_id": rows, **asked}, became)
        steps, moves = engine.frames()
        if on_rows is not None:
            on_rows(steps, moves)
            steps, moves = row_table([], StepRow), row_table([], MoveRow)
        return RunTables(
            table, steps, adapter_table(catalogue, engine.uses, table), end_s, moves, totals=(engine.totals,)
        )
    replica = Replica(
        env, catalogue, config, backend, pinned=pinned, registered=registered, check=check, keep_rows=step_rows
    )
    states = _play(env, requests, config, replica, stop_s, on_step, on_rows)
    end_s = env.now if horizon_s is None else horizon_s
    table = request_table(states, replica.running_rows())
    steps, moves = row_table(replica.rows, StepRow), row_table(replica.moves, MoveRow)
    return RunTables(
        table, steps, adapter_table(catalogue, replica.uses, table), end_s, moves, totals=(replica.totals,)
    )


def _play(
    env: simpy.Environment,
    requests: RequestTable,
    config: EngineConfig,
    replica: Replica,
    stop_s: float,
    on_step: OnStep | None,
    on_rows: Rows | None,
) -> list[RequestState]:
    """Step by step; returns the requests that arrived."""
    states: list[RequestState] = []

    def arrivals() -> Process:
        for request in requests:
            if request.arrival_s > env.now:
                yield env.timeout(request.arrival_s - env.now)
            states.append(RequestState(request, limit(request, config)))
            replica.add(states[-1])

    env.process(arrivals())
    env.process(replica.run())
    done = 0
    while (upcoming := env.peek()) <= stop_s and upcoming != float("inf"):
        env.step()
        if replica.totals.steps == done:
            continue
        done = replica.totals.steps
        if on_step is not None:
            on_step(env.now, sum(s.finish_s is not None for s in states) if done % 256 == 0 else -1)
        if on_rows is not None and len(replica.rows) >= ROWS_AT_ONCE:
            _hand_over(replica, on_rows)
    if on_rows is not None:
        _hand_over(replica, on_rows)
    return states


def _hand_over(replica: Replica, on_rows: Rows) -> None:
    on_rows(row_table(replica.rows, StepRow), row_table(replica.moves, MoveRow))
    replica.rows.clear()
    replica.moves.clear()


def _play_compiled(
    env: simpy.Environment, requests: RequestTable, engine: CompiledReplica, stop_s: float, on_step: OnStep | None
) -> None:
    """From arrival to arrival; the engine catches up in between."""

    def arrivals() -> Process:
        for row, arrival_s in enumerate(requests.arrival_s.tolist()):
            if arrival_s > env.now:
                yield env.timeout(arrival_s - env.now)
            engine.add_row(row)
            if on_step is not None and row % 1024 == 0:
                on_step(env.now, engine.finished)

    env.process(arrivals())
    while (upcoming := env.peek()) <= stop_s and upcoming != float("inf"):
        env.step()
    engine.finish(stop_s)
    if on_step is not None:
        on_step(engine.now_s, engine.finished)


def limit(request: Request, config: EngineConfig) -> int:
    """Output tokens after which a request ends: its own, or what `max_model_len` leaves."""
    return min(request.output_tokens, config.max_model_len - request.prompt_tokens)
