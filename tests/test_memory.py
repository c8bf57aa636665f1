"""The memory model gives real vLLM's KV blocks within 2 %, from geometry and named terms."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.base import EngineLimits
from backend.errors import BackendError
from backend.geometry import load_geometry
from backend.memory import MIB, allocator_bytes, memory_plan
from benchmarks.memory import h100, probes

PROBES = Path(__file__).parents[2] / "shared" / "data" / "real_vllm_runs" / "memory.csv"


def test_h100_blocks() -> None:
    assert (h100()["error"].abs() < 0.02).all()


@pytest.mark.skipif(not PROBES.is_file(), reason="../shared/data/real_vllm_runs is not here")
def test_probes() -> None:
    table = probes(PROBES)
    assert len(table) > 50
    assert (table["error"].abs() < 0.02).all()


def test_known_sizes() -> None:
    geometry = load_geometry("llama-3.1-8b")
    assert geometry.parameters == 8_030_261_248
    assert geometry.lora_bytes(16) == 83_886_080
    assert geometry.kv_bytes_per_token == 131_072


def test_allocator_packs_as_torch_does() -> None:
    assert allocator_bytes(iter([7 * MIB] * 4)) == 40 * MIB
    assert allocator_bytes(iter([MIB, MIB])) == 2 * MIB
    assert allocator_bytes(iter([int(38.5 * MIB)])) == 40 * MIB


def test_a_model_that_does_not_fit_is_an_error() -> None:
    limits = EngineLimits(8, 16, 256, 8192, 16384, 16, 0.9)
    with pytest.raises(BackendError, match="does not fit"):
        memory_plan(load_geometry("llama-3.1-8b"), limits, 16 << 30)
