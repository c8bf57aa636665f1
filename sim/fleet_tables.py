"""A fleet's run as tables: those of one engine, with a `replica` column, and one row per replica."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from sim.fleet import Fleet
from sim.tables import ASKED, NOT_SENT, AdapterUse, RunTables, StepTotals, adapter_table, request_frame, request_table

if TYPE_CHECKING:
    from sim.compiled import CompiledReplica, CompiledState
    from sim.replica import Replica
    from sim.state import RequestState


def fleet_tables(fleet: Fleet) -> RunTables:
    """The tables of a fleet that has run.

    `requests` also have `replica` (-1: at the router), `requeues` and `lost_tokens`; `steps` (by their start) and `moves`
    (by replica) have `replica`; `adapters` are summed over the fleet, with `replicas`, how many of them loaded each.
    """
    requests = _compiled_requests(fleet) if fleet.shared is not None else _requests(fleet)
    for name in ("replica", "requeues", "lost_tokens"):
        requests[name] = [getattr(ticket, name) for ticket in fleet.tickets]
    uses, homes = uses_of(fleet)
    adapters = adapter_table(fleet.catalogue, uses, requests)
    adapters["replicas"] = [homes.get(adapter, 0) for adapter in adapters["adapter"]]
    steps, moves = _joined(fleet)
    totals = tuple(StepTotals.summed(engine.totals for engine in member.lives) for member in fleet.members)
    return RunTables(requests, steps, adapters, fleet.end_s, moves, replica_table(fleet, requests), totals)


def _requests(fleet: Fleet) -> pd.DataFrame:
    current = set().union(*(cast("Replica", member.engine).running_rows() for member in fleet.members))
    return request_table([cast("RequestState", ticket.state) for ticket in fleet.tickets], current)


def _compiled_requests(fleet: Fleet) -> pd.DataFrame:
    """Gathered engine by engine: each request's attempt that counts."""
    states = [cast("CompiledState", ticket.state) for ticket in fleet.tickets]
    engines = [cast("CompiledReplica", engine) for member in fleet.members for engine in member.lives]
    number = {id(engine): i for i, engine in enumerate(engines)}
    where = np.array([-1 if s.engine is None else number[id(s.engine)] for s in states], dtype=np.int64)
    place = np.array([s.place for s in states], dtype=np.int64)
    earlier = np.array([s.earlier for s in states], dtype=np.int64).reshape(len(states), 2)
    became: dict[str, npt.NDArray[Any]] = {name: np.full(len(states), missing) for name, missing in NOT_SENT.items()}
    for i, engine in enumerate(engines):
        there = np.nonzero(where == i)[0]
        known = engine.states()
        for name, column in became.items():
            column[there] = known[name][place[there]]
    became["preemptions"] = became["preemptions"] + earlier[:, 0]
    became["skips"] = became["skips"] + earlier[:, 1]
    rows = np.array([s.row for s in states], dtype=np.int64)
    return request_frame({"request_id": rows, **{k: getattr(fleet.requests, k)[rows] for k in ASKED}}, became)


def _joined(fleet: Fleet) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Steps by their start, and moves by replica."""
    parts: tuple[list[pd.DataFrame], list[pd.DataFrame]] = ([], [])
    for member in fleet.members:
        lives = [engine.frames() for engine in member.lives]
        for whole, frames in zip(parts, zip(*lives, strict=True), strict=True):
            part = pd.concat(frames, ignore_index=True)
            part.insert(0, "replica", member.index)
            if "step" in part:
                part["step"] = range(len(part))  # its engines' steps, one after the other
            whole.append(part)
    steps, moves = (pd.concat(whole, ignore_index=True) for whole in parts)
    return steps.sort_values(["start_s", "replica"], kind="stable", ignore_index=True), moves


def replica_table(fleet: Fleet, requests: pd.DataFrame) -> pd.DataFrame:
    """One row per replica: its status at the end, requests sent and finished, failures, and the seconds it was paid for."""
    finished = requests[requests["status"] == "finished"].groupby("replica").size()
    return pd.DataFrame(
        [
            {
                "replica": m.index, "status": m.status, "sent": m.sent, "finished": int(finished.get(m.index, 0)),
                "failures": m.failures, "paid_s": m.paid_s,
            }
            for m in fleet.members
        ]
    )  # fmt: skip


def uses_of(fleet: Fleet) -> tuple[dict[int, AdapterUse], dict[int, int]]:
    """Each adapter's use summed over all replicas, and the number of replicas that loaded it."""
    total: dict[int, AdapterUse] = {}
    homes: dict[int, int] = {}
    for member in fleet.members:
        loaded: set[int] = set()
        for engine in member.lives:
            for adapter, use in engine.uses.items():
                summed = total.setdefault(adapter, AdapterUse())
                for f in fields(AdapterUse):
                    setattr(summed, f.name, getattr(summed, f.name) + getattr(use, f.name))
                if use.activations:
                    loaded.add(adapter)
        for adapter in loaded:
            homes[adapter] = homes.get(adapter, 0) + 1
    return total, homes
