"""A fleet's run as tables: those of one engine, with a `replica` column, and one row per replica."""

from __future__ import annotations

from dataclasses import fields

import pandas as pd

from sim.fleet import Fleet
from sim.tables import AdapterUse, MoveRow, RunTables, StepRow, adapter_table, request_table, row_table


def fleet_tables(fleet: Fleet) -> RunTables:
    """The tables of a fleet that has run.

    `requests` also have `replica` (-1: at the router), `requeues` and `lost_tokens`; `steps` (by their start) and `moves`
    (by replica) have `replica`; `adapters` are summed over the fleet, with `replicas`, how many of them loaded each.
    """
    current = {s.request.request_id for member in fleet.members for s in member.engine.scheduler.running}
    requests = request_table([ticket.state for ticket in fleet.tickets], current)
    for name in ("replica", "requeues", "lost_tokens"):
        requests[name] = [getattr(ticket, name) for ticket in fleet.tickets]
    uses, homes = uses_of(fleet)
    adapters = adapter_table(fleet.catalogue, uses, requests)
    adapters["replicas"] = [homes.get(adapter, 0) for adapter in adapters["adapter"]]
    return RunTables(
        requests, _joined(fleet, "rows", StepRow), adapters, fleet.end_s, _joined(fleet, "moves", MoveRow),
        replica_table(fleet, requests),
    )  # fmt: skip


def _joined(fleet: Fleet, rows: str, kind: type[StepRow | MoveRow]) -> pd.DataFrame:
    parts = []
    for member in fleet.members:
        part = row_table([row for engine in member.lives for row in getattr(engine, rows)], kind)
        part.insert(0, "replica", member.index)
        if "step" in part:
            part["step"] = range(len(part))  # its engines' steps, one after the other
        parts.append(part)
    whole = pd.concat(parts, ignore_index=True)
    return whole.sort_values(["start_s", "replica"], kind="stable", ignore_index=True) if kind is StepRow else whole


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
