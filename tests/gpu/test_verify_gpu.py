"""Exactness in the loop on a GPU: tokens alone and in any batch, and live steps of a run computed again."""

from __future__ import annotations

import numpy as np
import pytest

from backend.base import AdapterShape, EngineLimits
from backend.geometry import load_geometry
from backend.live import LiveBackend
from backend.measure import ALL_MODULES
from backend.verify import VerifyingBackend

pytestmark = pytest.mark.gpu

RANKS = (8, 16, 64, 32)


def live(limits: EngineLimits, *, deterministic: bool) -> LiveBackend:
    backend = LiveBackend(
        load_geometry("llama-3.2-1b"), limits, 800, device="cuda", seed=1, deterministic=deterministic
    )
    for slot, rank in enumerate(RANKS):
        adapter = AdapterShape(slot + 1, rank, ALL_MODULES)
        backend.stage(adapter)
        backend.load(adapter, slot)
    return backend


def test_a_request_gets_the_same_tokens_alone_and_in_any_batch() -> None:
    from exactness import Story, tokens_of, tokens_together

    rng = np.random.default_rng(7)
    stories = [Story(int(rng.integers(3, 90)), 12, int(rng.integers(-1, len(RANKS)))) for _ in range(40)]
    backend = VerifyingBackend(live(EngineLimits(4, 64, 48, 2048, 2048, 16, 0.9), deterministic=True), 7)
    alone = [tokens_of(backend, story) for story in stories]
    for seed in range(2):
        together = tokens_together(backend, stories, np.random.default_rng(seed), most=60)
        assert together == alone, f"{sum(a != b for a, b in zip(together, alone, strict=True))} of 40 requests differ"
    found = backend.report()
    print(found)
    assert found["tokens_that_differ"] == 0
    assert found["largest_logit_error"] == 0
    backend.close()


def test_sampled_steps_have_the_same_lora_bits_adapter_by_adapter() -> None:
    from exactness import Story, tokens_together

    rng = np.random.default_rng(8)
    stories = [Story(int(rng.integers(3, 90)), 12, int(rng.integers(-1, len(RANKS)))) for _ in range(40)]
    backend = VerifyingBackend(live(EngineLimits(4, 64, 48, 2048, 2048, 16, 0.9), deterministic=False), 5)
    tokens_together(backend, stories, np.random.default_rng(0), most=60)
    found = backend.report()
    print(found)
    assert backend.found.lora_rows > 10_000
    assert backend.found.largest_logit_error < 2e-2
    backend.close()
