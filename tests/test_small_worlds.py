"""Worlds whose answer is known: LRU under independent references, and two adapters that share one slot, by hand."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from worlds import WorldBackend

from sim.config import EngineConfig
from sim.engine import simulate
from sim.metrics import summarise
from sim.tables import RunTables
from workloads.adapters import Catalogue
from workloads.requests import RequestTable


def run(arrival: list[float] | np.ndarray, adapter: list[int] | np.ndarray, slots: int, output: int) -> RunTables:
    """Prompts of 5 tokens; host memory holds every adapter. A step costs 1 ms + 10 µs a token, a load 2 ms, a stage 5 ms."""
    n, count = len(arrival), int(np.max(adapter))
    requests = RequestTable(np.asarray(arrival, float), np.full(n, 5), np.full(n, output), np.asarray(adapter))
    config = EngineConfig(
        max_loras=slots, max_cpu_loras=count, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, block_size=4
    )
    return simulate(requests, Catalogue.uniform(count, [8]), config, WorldBackend(64, slots), check=True)


def lru_hit_rate(popularity: np.ndarray, slots: int) -> float:
    """King's formula: the probability that the next reference is among the last `slots` distinct ones."""
    hit = 0.0
    for order in permutations(range(len(popularity)), slots):
        chance, left = 1.0, 1.0
        for item in order:
            chance *= popularity[item] / left
            left -= popularity[item]
        hit += chance * popularity[list(order)].sum()
    return hit


def test_king_by_hand() -> None:
    """One slot hits if the same comes twice: the sum of squares. All slots always hit."""
    p = np.array([0.5, 0.3, 0.2])
    assert lru_hit_rate(p, 1) == pytest.approx(0.25 + 0.09 + 0.04)
    assert lru_hit_rate(p, 3) == pytest.approx(1.0)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_the_hit_rate_of_lru_under_independent_references(slots: int) -> None:
    """One request at a time, one step each, drawn independently: every use is a reference."""
    popularity = 1.0 / np.arange(1, 7)
    popularity /= popularity.sum()
    n = 6000
    adapter = np.random.default_rng(5).choice(np.arange(1, 7), n, p=popularity)
    summary = summarise(run(0.02 * np.arange(n), adapter, slots, 1))
    expected = lru_hit_rate(popularity, slots)
    assert summary["steps"] == n
    assert summary["adapter_hit_rate"] == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / n))
    assert summary["adapter_activations"] == pytest.approx(n * (1 - float(str(summary["adapter_hit_rate"]))))


def che_hit_rate(popularity: np.ndarray, slots: int) -> float:
    """Che's approximation: an adapter is there if it was used within the time in which `slots` distinct ones are."""
    low, high = 0.0, 1e9
    for _ in range(200):
        time = (low + high) / 2
        low, high = (time, high) if (1 - np.exp(-popularity * time)).sum() < slots else (low, time)
    return float((popularity * (1 - np.exp(-popularity * low))).sum())


@pytest.mark.parametrize("slots", [8, 32])
def test_the_hit_rate_of_lru_is_near_che_for_many_adapters(slots: int) -> None:
    """128 adapters, Zipf: too many for King's sum. Che's error is below a percent there, the draw's at most 4 sigma."""
    popularity = 1.0 / np.arange(1, 129)
    popularity /= popularity.sum()
    n = 6000
    adapter = np.random.default_rng(7).choice(np.arange(1, 129), n, p=popularity)
    summary = summarise(run(0.02 * np.arange(n), adapter, slots, 1))
    expected = che_hit_rate(popularity, slots)
    assert 0.3 < expected < 0.8
    assert summary["adapter_hit_rate"] == pytest.approx(expected, abs=0.01 + 4 * np.sqrt(expected * (1 - expected) / n))


def test_two_adapters_on_one_slot_by_hand() -> None:
    """Both are there at 0, and adapter 2 waits for the slot until adapter 1 has ended.

    1: 5 ms stage + 2 ms load + 1.05 ms prefill, a decode of 1.01 ms. 2: the same after it.
    """
    tables = run([0.0, 0.0], [1, 2], slots=1, output=2)
    requests = tables.requests.sort_values("adapter")
    first, finish = [0.00805, 0.01711], [0.00906, 0.01812]
    assert requests["first_token_s"].tolist() == pytest.approx(first)
    assert requests["finish_s"].tolist() == pytest.approx(finish)
    assert requests["first_scheduled_s"].tolist() == pytest.approx([0.0, 0.00906])
    assert len(tables.steps) == 4
    summary = summarise(tables)
    assert summary["adapter_hit_rate"] == pytest.approx(2 / 4)
    assert summary["adapter_evictions"] == 1


def test_two_adapters_on_two_slots_by_hand() -> None:
    """They share both steps: 14 ms of loads + 1.1 ms, then 1.02 ms."""
    tables = run([0.0, 0.0], [1, 2], slots=2, output=2)
    assert tables.requests["first_token_s"].tolist() == pytest.approx([0.0151] * 2)
    assert tables.requests["finish_s"].tolist() == pytest.approx([0.01612] * 2)
    assert len(tables.steps) == 2
