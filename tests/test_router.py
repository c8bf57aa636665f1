"""Routers and placement, on fleets made of plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.autoscaling import Steady, wanted
from sim.placement import PLACEMENTS, Weight
from sim.router import ROUTERS, affinity, bounded


@dataclass
class Seen:
    index: int
    outstanding: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    max_loras: int = 2
    resident: set[int] = field(default_factory=set)
    running_adapters: set[int] = field(default_factory=set)
    waiting_adapters: set[int] = field(default_factory=set)


def router(name: str, bound: float = 1.25):
    return ROUTERS[name](bound, 7)


@given(st.sampled_from(sorted(ROUTERS)), st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 5))
def test_every_router_chooses_a_candidate(name: str, loads: list[int], adapter: int) -> None:
    views = [Seen(2 * i, load) for i, load in enumerate(loads)]
    assert router(name).choose(adapter, views) in views


def test_round_robin_takes_turns_also_when_one_is_missing() -> None:
    r, views = router("round_robin"), [Seen(i) for i in range(3)]
    assert [r.choose(0, views).index for _ in range(4)] == [0, 1, 2, 0]
    assert [r.choose(0, [views[0], views[2]]).index for _ in range(3)] == [2, 0, 2]


def test_least_outstanding_takes_the_least_and_equals_in_turn() -> None:
    r = router("least_outstanding")
    assert r.choose(0, [Seen(0, 3), Seen(1, 1), Seen(2, 2)]).index == 1
    equal = [Seen(i, 1) for i in range(3)]
    assert [r.choose(0, equal).index for _ in range(3)] == [2, 0, 1]


def test_affinity_goes_where_the_adapter_is_until_that_is_too_full() -> None:
    r = router("adapter_affinity")
    assert r.choose(5, [Seen(0, 2), Seen(1, 3, resident={5}), Seen(2, 2)]).index == 1
    assert r.choose(5, [Seen(0, 2), Seen(1, 9, resident={5}), Seen(2, 3)]).index == 0
    assert r.choose(0, [Seen(0, 2), Seen(1, 3, resident={5}), Seen(2, 1)]).index == 2


@given(st.lists(st.integers(0, 100), min_size=1, max_size=8), st.floats(1.0, 3.0))
def test_bounded_loads_leave_someone_and_bind_everyone(loads: list[int], bound: float) -> None:
    views = [Seen(i, load) for i, load in enumerate(loads)]
    free = bounded(views, bound)
    assert free
    assert all(view.outstanding < bound * (1 + sum(loads)) / len(loads) + 1 for view in free)


def test_rendezvous_moves_only_the_adapters_of_the_replica_that_left() -> None:
    r, views = router("rendezvous"), [Seen(i) for i in range(5)]
    before = {a: r.choose(a, views).index for a in range(1, 301)}
    after = {a: r.choose(a, views[:4]).index for a in range(1, 301)}
    assert all(after[a] == before[a] for a in before if before[a] != 4)
    counts = [list(before.values()).count(i) for i in range(5)]
    assert min(counts) > 30, "300 adapters over 5 replicas: some are left out"


def test_bounded_hashing_moves_on_to_the_next_when_full() -> None:
    plain, bounding = router("rendezvous"), router("bounded_hashing", 1.0)
    first = plain.choose(3, [Seen(i) for i in range(3)]).index
    views = [Seen(i, 30 if i == first else 0) for i in range(3)]
    assert plain.choose(3, views).index == first
    assert bounding.choose(3, views).index != first


@pytest.mark.parametrize(
    ("view", "tier"),
    [
        (Seen(0, running_adapters={1, 2}), 1.0),
        (Seen(0, running_adapters={2}), 0.8),
        (Seen(0, running_adapters={2}, waiting_adapters={1}), 0.6),
        (Seen(0, running_adapters={2}, waiting_adapters={3}), 0.0),
    ],
)
def test_tiers_of_the_gateway_scorer(view: Seen, tier: float) -> None:
    assert affinity(1, view) == tier


def test_gateway_scores_add_queue_cache_and_affinity() -> None:
    r = router("gateway_scorers")
    assert r.choose(1, [Seen(0), Seen(1, running_adapters={1})]).index == 1
    assert r.choose(1, [Seen(0), Seen(1, waiting=5, running_adapters={1})]).index == 0
    assert r.choose(1, [Seen(0), Seen(1, kv_usage=0.9, running_adapters={1})]).index == 0


WEIGHTS = st.lists(st.tuples(st.floats(0, 100), st.sampled_from([8, 16, 64])), min_size=1, max_size=40)


@given(st.sampled_from(sorted(PLACEMENTS)), WEIGHTS, st.integers(1, 6), st.integers(1, 4), st.floats(0.1, 1.0))
def test_every_adapter_has_a_home(name: str, weights: list, replicas: int, copies: int, hot_share: float) -> None:
    given_ = [Weight(i, load, rank) for i, (load, rank) in enumerate(weights, start=1)]
    homes = PLACEMENTS[name](given_, replicas, copies, hot_share)
    assert homes.keys() == {w.adapter for w in given_}
    for chosen in homes.values():
        assert 0 < len(set(chosen)) == len(chosen) <= replicas
        assert list(chosen) == sorted(chosen)
        assert set(chosen) <= set(range(replicas))
    if name == "packed":
        assert all(len(chosen) == 1 for chosen in homes.values())


def test_packing_balances_load_and_ranks() -> None:
    homes = PLACEMENTS["packed"]([Weight(i, load, 8) for i, load in enumerate([4, 3, 3, 2, 2, 2], start=1)], 2, 1, 1)
    load = {1: 4, 2: 3, 3: 3, 4: 2, 5: 2, 6: 2}
    assert [sum(load[a] for a, (home,) in homes.items() if home == i) for i in (0, 1)] == [8, 8]
    ranks = PLACEMENTS["packed"]([Weight(1, 0, 64), Weight(2, 0, 8), Weight(3, 0, 8), Weight(4, 0, 48)], 2, 1, 1)
    assert ranks[1] == (0,)
    assert ranks[2] == ranks[3] == ranks[4] == (1,)


def test_hot_adapters_get_copies() -> None:
    weights = [Weight(1, 60, 8), Weight(2, 20, 8), Weight(3, 10, 8), Weight(4, 10, 8)]
    homes = PLACEMENTS["hot_copies"](weights, 3, 2, 0.7)
    assert [len(homes[a]) for a in (1, 2, 3, 4)] == [2, 2, 1, 1]


def test_the_autoscaling_rule() -> None:
    views = [Seen(0, 30), Seen(1, 10)]
    assert wanted(views, "outstanding", 10, 0.1) == 4
    assert wanted(views, "outstanding", 19, 0.1) == 2  # within the tolerance
    assert wanted([Seen(0), Seen(1)], "outstanding", 10, 0.1) == 0


def test_falls_are_held_back() -> None:
    steady = Steady(10.0, 3)
    assert [steady(t, n) for t, n in ((5, 1), (9, 2), (11, 1), (25, 1))] == [3, 3, 2, 1]
