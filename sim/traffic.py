"""What a plan is tried on: the requests of one seed, faster, or those of some ranks alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from backend.geometry import load_geometry
from sim.catalogue import catalogue_of, drawn_from, pinned_ids
from workloads.adapters import Catalogue
from workloads.build import build_workload
from workloads.requests import BASE, RequestTable

if TYPE_CHECKING:
    from sim.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Traffic:
    """One seed's requests and the adapters that they name."""

    requests: RequestTable
    catalogue: Catalogue
    pinned: tuple[int, ...] = ()

    @property
    def rate_rps(self) -> float:
        """Requests per second between the first and the last arrival."""
        times = self.requests.arrival_s
        return (len(times) - 1) / max(1e-9, float(times[-1] - times[0])) if len(times) > 1 else 0.0

    def faster(self, factor: float) -> Traffic:
        """The same requests, `factor` times as fast: common random numbers for every rate and every deployment."""
        return replace(self, requests=replace(self.requests, arrival_s=self.requests.arrival_s / factor))


def traffic_of(scenario: Scenario, seed: int) -> Traffic:
    """The scenario's requests with another seed. Raises `WorkloadError` as the workload does."""
    workload = build_workload(
        scenario.workload, adapter_count=drawn_from(scenario), seed=seed, base_dir=scenario.base_dir
    )
    catalogue = catalogue_of(scenario, workload, load_geometry(scenario.geometry))
    return Traffic(workload.requests, catalogue, pinned_ids(scenario, catalogue))


def keep_ranks(traffic: Traffic, low: int, high: int, *, base: bool) -> Traffic:
    """The requests of adapters with low < rank <= high, and those of the base model if `base`; ids are made anew."""
    kept = [a for a in traffic.catalogue if low < a.rank <= high]
    new = np.full(len(traffic.catalogue) + 1, -1, dtype=np.int64)
    new[[a.adapter_id for a in kept]] = np.arange(1, len(kept) + 1)
    new[BASE] = BASE if base else -1
    requests = traffic.requests
    adapter = new[requests.adapter]
    chosen = requests.take(adapter >= 0)
    catalogue = Catalogue(tuple(replace(a, adapter_id=i) for i, a in enumerate(kept, start=1)))
    pinned = tuple(int(new[p]) for p in traffic.pinned if new[p] > 0)
    return Traffic(replace(chosen, adapter=adapter[adapter >= 0]), catalogue, pinned)


def merged(traffic: Traffic, adapter: int) -> Traffic:
    """The requests of one adapter (0: of the base model) as those of a model that it was merged into: no adapters are left."""
    chosen = traffic.requests.take(traffic.requests.adapter == adapter)
    return Traffic(replace(chosen, adapter=np.full(len(chosen), BASE, dtype=np.int64)), Catalogue(()))
