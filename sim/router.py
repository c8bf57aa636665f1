"""Which replica gets a request: policies that look at what a router could see, and at nothing else.

Pure policy: no clock, no I/O, no metrics. Equals are told apart in turn, so that none is favoured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np

from workloads.requests import BASE


class View(Protocol):
    """What an engine tells a router of itself, as of now."""

    @property
    def index(self) -> int:
        """The replica's number."""
        ...

    @property
    def outstanding(self) -> int:
        """Requests that were sent to it and have not finished."""
        ...

    @property
    def waiting(self) -> int:
        """Those of them that do not run (`vllm:num_requests_waiting`)."""
        ...

    @property
    def kv_usage(self) -> float:
        """Used share of its KV blocks (`vllm:kv_cache_usage_perc`)."""
        ...

    @property
    def max_loras(self) -> int: ...

    @property
    def resident(self) -> Collection[int]:
        """The adapters in its GPU slots."""
        ...

    @property
    def running_adapters(self) -> Collection[int]:
        """Adapters of its running requests (`vllm:lora_requests_info`)."""
        ...

    @property
    def waiting_adapters(self) -> Collection[int]:
        """Adapters of its waiting requests (`vllm:lora_requests_info`)."""
        ...


class Router(Protocol):
    """A routing policy; it may keep a memory of its own choices."""

    def choose(self, adapter: int, candidates: Sequence[View]) -> View:
        """The replica for a request of `adapter` (0 = base); `candidates` is not empty, by rising index."""
        ...


class _Turn:
    """Breaks ties: the candidate after the one chosen last comes first."""

    def __init__(self) -> None:
        self._last = -1

    def least(self, candidates: Sequence[View], key: Callable[[View], float]) -> View:
        """The candidate of the smallest `key`."""
        after = self._last + 1
        span = max(view.index for view in candidates) + 1
        chosen = min(candidates, key=lambda view: (key(view), (view.index - after) % span))
        self._last = chosen.index
        return chosen


class RoundRobin:
    """Each in turn, whatever it has to do."""

    def __init__(self) -> None:
        self._turn = _Turn()

    def choose(self, adapter: int, candidates: Sequence[View]) -> View:
        del adapter
        return self._turn.least(candidates, lambda _: 0)


class Random:
    """Any of them, alike; the seed decides."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def choose(self, adapter: int, candidates: Sequence[View]) -> View:
        del adapter
        return candidates[int(self._rng.integers(len(candidates)))]


class LeastOutstanding:
    """The one with the fewest unfinished requests."""

    def __init__(self) -> None:
        self._turn = _Turn()

    def choose(self, adapter: int, candidates: Sequence[View]) -> View:
        del adapter
        return self._turn.least(candidates, lambda view: view.outstanding)


def bounded(candidates: Sequence[View], bound: float) -> list[View]:
    """Those that may take one more request: with it, none has more than `bound` times its part of all, rounded up.

    The rule of consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, arXiv 1608.01350), whose
    `1 + epsilon` is `bound`; never empty for `bound` >= 1.
    """
    most = math.ceil(bound * (1 + sum(view.outstanding for view in candidates)) / len(candidates))
    return [view for view in candidates if view.outstanding < most]


class AdapterAffinity:
    """The least busy of those that have the adapter in a slot, while their load is bounded; else the least busy."""

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._turn = _Turn()

    def choose(self, adapter: int, candidates: Sequence[View]) -> View:
        warm = [] if adapter == BASE else [v for v in bounded(candidates, self._bound) if adapter in v.resident]
        return self._turn.least(warm or candidates, lambda view: view.outstanding)


def weight(adapter: int, index: int) -> int:
    """A hash of adapter and replica, the same on every machine and in every run."""
    return int.from_bytes(blake2b(f"{adapter}:{index}".encode(), digest_size=8).digest(), "big")


class Rendezvous:
    """The replica whose hash with the adapter is greatest (Thaler and Ravishankar); base goes to the least busy.

    When a replica leaves, only its own adapters move. With `bound` the next greatest takes what would overload it.
    """

    def __init__(self, bound: float | None = None) -> None:
        self._bound = bound
        self._turn = _Turn()
        self._weights: dict[tuple[int, int], int] = {}

    def choose(self, adapter: int, candidates: Sequence[View]) -> View:
        if adapter == BASE:
            return self._turn.least(candidates, lambda view: view.outstanding)
        free = candidates if self._bound is None else bounded(candidates, self._bound)
        return max(free, key=lambda view: self._weight(adapter, view.index))

    def _weight(self, adapter: int, index: int) -> int:
        key = (adapter, index)
        if key not in self._weights:
            self._weights[key] = weight(*key)
        return self._weights[key]


QUEUE_WEIGHT, KV_WEIGHT, LORA_WEIGHT = 2.0, 2.0, 1.0
"""How much each score of `GatewayScorers` counts."""


class GatewayScorers:
    """Gateway API Inference Extension's scorers for queue, KV cache and LoRA affinity, summed; the highest score wins.

    Affinity (`lora_affinity.go`): 1 if requests of the adapter run there, 0.8 if running and waiting requests name fewer
    adapters than `max_loras`, 0.6 if some wait there, else 0. Queue: 1 for the shortest, 0 for the longest. Its prefix
    scorer is left out, and metrics are read without the scraping delay.
    """

    def __init__(self) -> None:
        self._turn = _Turn()

    def choose(self, adapter: int, candidates: Sequence[View]) -> View:
        lengths = [view.waiting for view in candidates]
        longest, spread = max(lengths), max(lengths) - min(lengths)

        def score(view: View) -> float:
            queue = (longest - view.waiting) / spread if spread else 1.0
            lora = affinity(adapter, view) if adapter != BASE else 0.0
            return QUEUE_WEIGHT * queue + KV_WEIGHT * (1.0 - view.kv_usage) + LORA_WEIGHT * lora

        return self._turn.least(candidates, lambda view: -score(view))


def affinity(adapter: int, view: View) -> float:
    """The tier of one replica for an adapter (`GatewayScorers`)."""
    running, waiting = set(view.running_adapters), set(view.waiting_adapters)
    if adapter in running:
        return 1.0
    if len(running | waiting) < view.max_loras:
        return 0.8
    return 0.6 if adapter in waiting else 0.0


ROUTERS: Mapping[str, Callable[[float, int], Router]] = {
    "round_robin": lambda _bound, _seed: RoundRobin(),
    "random": lambda _bound, seed: Random(seed),
    "least_outstanding": lambda _bound, _seed: LeastOutstanding(),
    "adapter_affinity": lambda bound, _seed: AdapterAffinity(bound),
    "rendezvous": lambda _bound, _seed: Rendezvous(),
    "bounded_hashing": lambda bound, _seed: Rendezvous(bound),
    "gateway_scorers": lambda _bound, _seed: GatewayScorers(),
}
"""`fleet.router` by name; each takes `fleet.load_bound` and the run's seed."""
