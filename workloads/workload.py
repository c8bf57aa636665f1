"""What a source of traffic amounts to: requests, the adapters that they name, and what to know of how it was made."""

from __future__ import annotations

from dataclasses import dataclass

from workloads.requests import RequestTable


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, the names of adapters 1 … n, and what a reader of the results must know of how they were made."""

    requests: RequestTable
    adapter_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
