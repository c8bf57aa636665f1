"""What the compiled replay does for a request does not grow with the batch it runs in, nor with its output."""

from __future__ import annotations

import numpy as np
import pytest
import simpy

from backend.base import EngineLimits
from backend.geometry import load_geometry
from backend.profile import load_profile
from backend.replay import ReplayBackend
from sim import compiled_inputs
from sim.compiled import CompiledReplica
from sim.compiled_inputs import Shared
from sim.config import EngineConfig
from workloads.adapters import Catalogue
from workloads.requests import RequestTable

pytestmark = pytest.mark.skipif(compiled_inputs._native is None, reason="built without a C++ compiler")

REQUESTS = 2000
ADAPTERS = 4


def looked_at(config: EngineConfig, output: int, prefix: int = 0, adapters: int = ADAPTERS) -> float:
    """How often the engine looks at a request; outputs are of `output` tokens in the mean, all at once ask for more than it seats."""
    rng = np.random.default_rng(output)
    n = REQUESTS
    requests = RequestTable(
        np.zeros(n), rng.integers(50, 150, n), rng.integers(output // 2, output * 3 // 2, n),
        rng.integers(0, adapters + 1, n), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64), np.full(n, prefix),
    )  # fmt: skip
    limits = EngineLimits(config.max_loras, 16, config.max_num_seqs, 8192, config.max_model_len, config.block_size, 0.9)
    backend = ReplayBackend(load_profile("h100-llama-3.1-8b"), load_geometry("llama-3.1-8b"), limits, 100_000)
    shared = Shared(requests, Catalogue.uniform(adapters, [8, 16]), config, backend)
    engine = CompiledReplica(simpy.Environment(), shared, registered=range(1, adapters + 1), keep_rows=False)
    for row in range(n):
        engine.add_row(row)
    engine.finish(float("inf"))
    assert engine.finished == n
    return engine.looked_at / n


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("caching", [False, True])
def test_a_request_is_looked_at_as_it_comes_and_goes(caching: bool, asynchronous: bool) -> None:
    """Admitted, first token, last token; with plans that overlap once more until the last token lands."""
    for seats in (8, 512):
        config = EngineConfig(
            max_loras=ADAPTERS, max_num_seqs=seats, enable_prefix_caching=caching, async_scheduling=asynchronous
        )
        for output in (20, 1000):
            assert looked_at(config, output) == pytest.approx(4.0 if asynchronous else 3.0, rel=0.1)


@pytest.mark.parametrize("seats", [8, 512])
def test_who_loads_an_adapter_does_not_look_at_the_others(seats: int) -> None:
    """More adapters than slots, so that requests wait for them and load them."""
    config = EngineConfig(max_loras=64, max_num_seqs=seats)
    assert looked_at(config, 100, adapters=500) == pytest.approx(3.0, rel=0.1)


def test_a_common_beginning_is_filled_once() -> None:
    """A prompt that others begin with, too, adds nothing to it."""
    config = EngineConfig(max_loras=ADAPTERS, max_num_seqs=64)
    assert looked_at(config, 200, prefix=48) == pytest.approx(3.0, rel=0.1)
