"""Which replicas may serve which adapter. Pure policy over each adapter's load and rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from workloads.adapters import Catalogue
from workloads.requests import RequestTable

Homes = dict[int, tuple[int, ...]]
"""Adapter id -> indexes of its replicas, rising."""


@dataclass(frozen=True, slots=True)
class Weight:
    """What an adapter asks for: `load` (its share of the traffic, in any unit) and `rank` (its share of the memory)."""

    adapter: int
    load: float
    rank: int


def weights_of(requests: RequestTable, catalogue: Catalogue) -> list[Weight]:
    """What placement goes by: each adapter's tokens in the traffic itself (a forecast that comes true) and its rank."""
    tokens = np.bincount(
        requests.adapter, weights=requests.prompt_tokens + requests.output_tokens, minlength=len(catalogue) + 1
    )
    return [Weight(a.adapter_id, float(tokens[a.adapter_id]), a.rank) for a in catalogue]


def everywhere(weights: Sequence[Weight], replicas: int, copies: int, hot_share: float) -> Homes:
    """Every adapter on every replica."""
    del copies, hot_share
    return {w.adapter: tuple(range(replicas)) for w in weights}


def packed(weights: Sequence[Weight], replicas: int, copies: int, hot_share: float) -> Homes:
    """One home each, by decreasing load: where the fuller of load and ranks is least (longest processing time first)."""
    del copies, hot_share
    return _pack(weights, replicas, {})


def hot_copies(weights: Sequence[Weight], replicas: int, copies: int, hot_share: float) -> Homes:
    """`copies` homes for the hottest adapters, those that make up `hot_share` of the load together; one for the others."""
    total, seen, wanted = sum(w.load for w in weights), 0.0, {}
    for w in _by_load(weights):
        if seen >= hot_share * total:
            break
        wanted[w.adapter] = min(copies, replicas)
        seen += w.load
    return _pack(weights, replicas, wanted)


def _by_load(weights: Sequence[Weight]) -> list[Weight]:
    return sorted(weights, key=lambda w: (-w.load, -w.rank, w.adapter))


def _pack(weights: Sequence[Weight], replicas: int, wanted: Mapping[int, int]) -> Homes:
    load, rank = [0.0] * replicas, [0.0] * replicas
    all_load = sum(w.load for w in weights) or 1.0
    all_ranks = sum(w.rank * wanted.get(w.adapter, 1) for w in weights)
    homes: Homes = {}
    for w in _by_load(weights):
        count = wanted.get(w.adapter, 1)
        share, ranks = w.load / count / all_load, w.rank / all_ranks
        fullness = [(max(load[i] + share, rank[i] + ranks), load[i], i) for i in range(replicas)]
        chosen = sorted(i for _, _, i in sorted(fullness)[:count])
        for i in chosen:
            load[i] += share
            rank[i] += ranks
        homes[w.adapter] = tuple(chosen)
    return homes


Placement = Callable[[Sequence[Weight], int, int, float], Homes]

PLACEMENTS: Mapping[str, Placement] = {"everywhere": everywhere, "packed": packed, "hot_copies": hot_copies}
"""`fleet.placement` by name; each takes the weights, the number of replicas, `fleet.copies` and `fleet.hot_share`."""
