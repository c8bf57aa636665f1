"""The simulation: SimPy processes for arrivals and a replica."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import simpy

from backend.base import Backend
from sim.config import EngineConfig
from sim.errors import ScenarioError
from sim.replica import Process, Replica
from sim.state import RequestState
from sim.tables import MoveRow, RunTables, StepRow, adapter_table, request_table, row_table
from workloads.adapters import Catalogue
from workloads.requests import BASE, Request, RequestTable


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
    full = len(pinned) == config.max_loras
    capacity = backend.capacity()
    room = (capacity.num_gpu_blocks - 1) * capacity.block_size
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
        if full and request.adapter != BASE and request.adapter not in pinned:
            raise ScenarioError(
                f"workload request {request.request_id}: adapter {catalogue[request.adapter].name} can never run,"
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
    on_step: Callable[[float, int], None] | None = None,
) -> RunTables:
    """Run `requests` through one replica on `backend`, to the end or to `horizon_s` seconds.

    `pinned`: ids of adapters that are loaded before the start and never evicted; each keeps one of `max_loras` for
    itself. `registered`: ids that were added in this order before the start, as far as caches hold them. `check`: verify the invariants after every step. Unfinished requests stay `running` or `waiting` in the
    tables. `on_step(now, finished)` is called as time passes.
    Raises `ScenarioError` for a request or adapter that the engine could never serve, `IntegrityError` if a check fails.
    """
    refuse_impossible(requests, catalogue, config, backend, pinned)
    env = simpy.Environment()
    replica = Replica(env, catalogue, config, backend, pinned=pinned, registered=registered, check=check)
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
    adapters, steps = adapter_table(catalogue, replica.uses, table), row_table(replica.rows, StepRow)
    return RunTables(table, steps, adapters, end, row_table(replica.moves, MoveRow))


def limit(request: Request, config: EngineConfig) -> int:
    """Output tokens after which a request ends: its own, or what `max_model_len` leaves."""
    return min(request.output_tokens, config.max_model_len - request.prompt_tokens)
