"""The memory model gives real vLLM's KV blocks within 2 %, from geometry and named terms."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.base import EngineLimits
from backend.errors import BackendError
from backend.geometry import load_geometry
from backend.memory import EXTRA_VOCAB_ROWS_0_8, GIB, MIB, NON_TORCH_BYTES, allocator_bytes, lora_tensors, memory_plan
from benchmarks.memory import H100_BYTES, PROBE_MODELS, h100, probe_plan, probes, read_probes

PROBES = Path(__file__).parents[2] / "shared" / "data" / "real_vllm_runs" / "memory.csv"
needs_probes = pytest.mark.skipif(not PROBES.is_file(), reason="../shared/data/real_vllm_runs is not here")


def limits(max_loras: int = 8, rank: int = 16, **changes: int) -> EngineLimits:
    sizes = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 16384, "block_size": 16, **changes}
    return EngineLimits(max_loras, rank, gpu_memory_utilization=0.9, **sizes)


def test_h100_blocks() -> None:
    table = h100()
    assert set(table["measured_tokens"]) == {26655 * 16, 27759 * 16}
    assert (table["error"].abs() < 0.02).all()


@needs_probes
def test_probes() -> None:
    table = probes(PROBES)
    assert len(table) == 65
    assert set(table["model"]) == {"llama-3.1-8b", "qwen2.5-7b"}
    assert (table["error"].abs() < 0.02).all()


@needs_probes
def test_exactly_the_servers_that_failed_do_not_fit() -> None:
    """The failed probes gave no constant: they test the model where it was not looked at."""
    table = read_probes(PROBES)
    assert (table["status"] == "ok").value_counts().to_dict() == {True: 65, False: 19}
    for row in table.itertuples():
        name, length = PROBE_MODELS[row.model]
        try:
            probe_plan(load_geometry(name), int(row.max_loras), int(row.max_lora_rank), length)
            fits = True
        except BackendError:
            fits = False
        assert fits == (row.status == "ok"), (name, row.max_loras, row.max_lora_rank)


@needs_probes
def test_failed_servers_had_the_kv_memory_the_plan_gives() -> None:
    table = read_probes(PROBES)
    table = table[table["kv_available_gib"].notna()]
    assert len(table) == 8
    for row in table.itertuples():
        name, _ = PROBE_MODELS[row.model]
        plan = probe_plan(load_geometry(name), int(row.max_loras), int(row.max_lora_rank), 16)
        assert plan.kv_bytes / GIB == pytest.approx(row.kv_available_gib, abs=0.08)


def test_lora_buffers_per_slot() -> None:
    """vLLM 0.8.5's `model_load_gib`: 5 MiB a rank of the linears, 0.505 of the embeddings, 6 a slot extra rows."""
    llama, qwen = load_geometry("llama-3.1-8b"), load_geometry("qwen2.5-7b")
    one = limits(1, 8)
    embeddings = 2 * (128256 + 4096) * 2 * 8
    assert sum(lora_tensors(llama, one)) == 8 * 5 * MIB + embeddings
    assert sum(lora_tensors(llama, one, EXTRA_VOCAB_ROWS_0_8)) == 8 * 5 * MIB + embeddings + 6 * MIB
    assert sum(lora_tensors(qwen, one, EXTRA_VOCAB_ROWS_0_8)) == qwen.lora_bytes(8)


@pytest.mark.parametrize(
    ("mebibytes", "reserved"),
    [
        ([1, 1], 2),
        ([0.25, 1, 0.75], 2),
        ([0.25, 1, 1], 4),
        ([7] * 4, 40),
        ([38.5], 40),
        ([10], 10),
        ([9.5], 20),
        ([9, 11], 20),  # a large tensor fills the gap that a middle one left
        ([10.5, 1.5], 12),  # and a middle one the rest of a rounded large one
        ([15, 13, 3], 16 + 14 + 20),  # rests of 1 MiB hold nothing of the large pool
        ([1.5, 0.5], 20 + 2),  # small tensors stay out of large segments
    ],
)
def test_allocator_packs_as_torch_does(mebibytes: list[float], reserved: int) -> None:
    assert allocator_bytes(int(m * MIB) for m in mebibytes) == reserved * MIB


@needs_probes
@pytest.mark.parametrize("model", PROBE_MODELS)
def test_packing_explains_what_the_buffers_alone_do_not(model: str) -> None:
    """What a model's servers hold besides weights, LoRA segments and KV is one number: no constant is involved."""
    table = read_probes(PROBES)
    table = table[(table["model"] == model) & (table["status"] == "ok")]
    geometry = load_geometry(PROBE_MODELS[model][0])
    packed, plain = [], []
    for row in table.itertuples():
        slots = limits(int(row.max_loras), int(row.max_lora_rank))
        tensors = list(lora_tensors(geometry, slots, EXTRA_VOCAB_ROWS_0_8))
        kv = row.kv_cache_tokens * geometry.kv_bytes_per_token
        packed.append((kv + allocator_bytes(tensors)) / GIB)
        plain.append((kv + sum(tensors)) / GIB)
    assert max(packed) - min(packed) < 0.04
    assert max(plain) - min(plain) > 0.4


@needs_probes
def test_probe_lengths_are_those_of_the_file() -> None:
    lengths = read_probes(PROBES).groupby("model")["max_model_len"].unique()
    assert {model: list(values) for model, values in lengths.items()} == {m: [n] for m, (_, n) in PROBE_MODELS.items()}


def test_a_plan_adds_up() -> None:
    plan = memory_plan(load_geometry("llama-3.1-8b"), limits(), H100_BYTES)
    assert plan.usable_bytes == int(H100_BYTES * 0.9)
    assert plan.non_torch_bytes == NON_TORCH_BYTES
    spent = plan.weights_bytes + plan.lora_bytes + plan.lora_fragmentation_bytes + plan.activation_bytes
    left = plan.usable_bytes - spent - plan.non_torch_bytes - plan.kv_bytes
    assert 0 <= left < 16 * 131072
    assert plan.kv_bytes == plan.num_gpu_blocks * 16 * 131072


def test_more_slots_cost_kv_blocks() -> None:
    llama = load_geometry("llama-3.1-8b")
    blocks = [memory_plan(llama, limits(slots), H100_BYTES).num_gpu_blocks for slots in (1, 8, 32, 128)]
    assert blocks == sorted(set(blocks), reverse=True)


def test_a_model_that_does_not_fit_is_an_error_that_says_by_how_much() -> None:
    with pytest.raises(BackendError, match=r"does not fit: 16\.0 GiB .* \(\d+\.\d\d GiB short\)"):
        memory_plan(load_geometry("llama-3.1-8b"), limits(), 16 << 30)
