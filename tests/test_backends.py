"""The live CPU backend executes every step; a profile measured with it replays; predictions are sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backend.base import AdapterShape, EngineLimits, StepBatch
from backend.errors import BackendError
from backend.features import StepFeatures
from backend.geometry import load_geometry
from backend.live import GRAPH_SIZES, LiveBackend
from backend.measure import ALL_MODULES, measure_profile
from backend.profile import load_profile, shipped_profiles
from backend.step_inputs import DECODE_TILE, lay_out
from sim.run import run_scenario

SCENARIO = """
[model]
geometry = "tiny"
[engine]
max_loras = 2
max_cpu_loras = 3
max_num_seqs = 8
max_num_batched_tokens = 64
max_model_len = 512
max_lora_rank = 16
[adapters]
count = 5
ranks = [8, 16]
[workload]
kind = "synthetic"
rate_rps = 20
duration_s = 1
prompt = { kind = "fixed", tokens = 90 }
output = { kind = "fixed", tokens = 4 }
popularity = { kind = "uniform" }
base_share = 0.2
[backend]
kind = "cpu"
"""


def test_every_step_is_executed_on_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SCENARIO)
    result = run_scenario(str(tmp_path / "s.toml"), out=tmp_path / "run")
    assert result.summary["steps_executed_on_device"] == len(result.tables.steps) > 20
    assert (result.tables.requests["status"] == "finished").all()
    assert (result.tables.steps["device_s"] > 0).all()
    assert result.tables.adapters["stages"].sum() >= 4


def small_backend() -> LiveBackend:
    limits = EngineLimits(2, 16, 8, 64, 512, 16, 0.9)
    backend = LiveBackend(load_geometry("tiny"), limits, 64, device="cpu")
    for slot, rank in enumerate((8, 16)):
        adapter = AdapterShape(slot + 1, rank, ALL_MODULES)
        backend.stage(adapter)
        backend.load(adapter, slot)
    return backend


def test_batching_never_changes_an_answer() -> None:
    """Prefill then decode of three requests together and one by one: the same logits, whatever the neighbours."""
    tables = ((0, 1, 2), (3, 4, 5), (6, 7, 8))
    slots = (0, 1, -1)
    together = small_backend()
    together.execute(StepBatch((20, 7, 30), (0, 0, 0), slots, (True,) * 3, tables))
    together.execute(StepBatch((1, 1, 1), (20, 7, 30), slots, (True,) * 3, tables))
    grouped = together.decoder.logits[:3].clone()
    for i, length in enumerate((20, 7, 30)):
        alone = small_backend()
        alone.execute(StepBatch((length,), (0,), slots[i : i + 1], (True,), tables[i : i + 1]))
        alone.execute(StepBatch((1,), (length,), slots[i : i + 1], (True,), tables[i : i + 1]))
        torch.testing.assert_close(alone.decoder.logits[0], grouped[i], rtol=1e-3, atol=1e-3)


def test_chunked_prefill_gives_the_same_answer() -> None:
    whole, chunks = small_backend(), small_backend()
    table = ((4, 9, 2),)
    whole.execute(StepBatch((40,), (0,), (1,), (True,), table))
    chunks.execute(StepBatch((17,), (0,), (1,), (False,), table))
    chunks.execute(StepBatch((23,), (17,), (1,), (True,), table))
    torch.testing.assert_close(whole.decoder.logits[0], chunks.decoder.logits[0], rtol=1e-3, atol=1e-3)


def test_shared_prefix_blocks_give_the_same_answer() -> None:
    """A request that finds its first block, in the very step that computes it, answers as if it were alone."""
    alone, shared = small_backend(), small_backend()
    alone.execute(StepBatch((20,), (0,), (1,), (True,), ((6, 7),)))
    alone.execute(StepBatch((1,), (20,), (1,), (True,), ((6, 7),), (True,)))
    shared.execute(StepBatch((30, 4), (0, 16), (1, 1), (True, True), ((3, 4), (3, 5))))
    shared.execute(StepBatch((1, 1), (30, 20), (1, 1), (True, True), ((3, 4), (3, 5)), (True, True)))
    torch.testing.assert_close(shared.decoder.logits[1], alone.decoder.logits[0], rtol=1e-3, atol=1e-3)


def test_a_single_last_prompt_token_is_no_decode() -> None:
    whole, chunks = small_backend(), small_backend()
    whole.execute(StepBatch((17,), (0,), (1,), (True,), ((4, 9),)))
    chunks.decoder.last_token.fill_(5)
    chunks.execute(StepBatch((16,), (0,), (1,), (False,), ((4, 9),)))
    chunks.execute(StepBatch((1,), (16,), (1,), (True,), ((4, 9),), (False,)))
    torch.testing.assert_close(whole.decoder.logits[0], chunks.decoder.logits[0], rtol=1e-3, atol=1e-3)


def test_every_policy_runs_on_a_live_backend(tmp_path: Path) -> None:
    """Prefix caching, asynchronous scheduling, overlapped loading, pins: each step executed, each invariant checked."""
    rows = ["arrival_s,prompt_tokens,output_tokens,adapter,priority,prefix_id,prefix_tokens"]
    rows += [f"{i * 0.001},{40 + i % 9},{3 + i % 4},a{i % 5},{i % 2},p{i % 3},{32 + i % 9}" for i in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    head, _, tail = SCENARIO.partition("[adapters]")
    engine = 'scheduling_policy = "adapter_aware"\nlora_eviction_policy = "cost_aware"\nlora_loading = "overlapped"\n'
    adapters = '[adapters]\nranks = [8, 16]\npinned = ["a3"]\n[run]\ncheck = true\n'
    workload = '[workload]\nkind = "table"\npath = "t.csv"\n[backend]' + tail.partition("[backend]")[2]
    (tmp_path / "s.toml").write_text(f"{head}{engine}async_scheduling = true\n{adapters}{workload}")
    result = run_scenario(str(tmp_path / "s.toml"), out=tmp_path / "run")
    assert (result.tables.requests["status"] == "finished").all()
    assert result.tables.requests["cached_tokens"].sum() > 0
    assert result.summary["steps_executed_on_device"] == len(result.tables.steps)
    assert result.tables.adapters.set_index("name").loc["a3", "evictions"] == 0


def test_the_adapter_matters_and_missing_modules_are_zero() -> None:
    base, adapted, partial = small_backend(), small_backend(), small_backend()
    partial.stage(AdapterShape(9, 16, ("q_proj",)))
    partial.load(AdapterShape(9, 16, ("q_proj",)), 1)
    logits = []
    for backend, slot in ((base, -1), (adapted, 1), (partial, 1)):
        backend.execute(StepBatch((12,), (0,), (slot,), (True,), ((0,),)))
        logits.append(backend.decoder.logits[0].clone())
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])
    assert not torch.allclose(logits[0], logits[2])
    down = partial.decoder.bank.layout.layers[0]["down"]
    assert (partial.decoder.bank.b(1, down, 0) == 0).all()


@pytest.mark.parametrize(("budget", "rows"), [(1030, 1152), (2048, 2048), (5000, 5000)])
def test_a_step_as_long_as_allowed_has_a_graph_or_is_beyond_all(budget: int, rows: int) -> None:
    limits = EngineLimits(2, 16, 4, budget, 64, 4, 0.9)
    backend = LiveBackend(load_geometry("tiny"), limits, 20, device="cpu")
    assert len(backend.decoder.residual) == rows
    backend.on_cuda = True
    padding = backend._padding(StepBatch((budget,), (0,), (-1,), (True,)))
    backend.on_cuda = False
    assert (padding.rows if padding else None) == (rows if rows <= GRAPH_SIZES[-1] else None)
    backend.close()


def test_step_layout_covers_every_row() -> None:
    batch = StepBatch((1, 40, 3), (9, 5, 0), (0, -1, 1), (True, False, True), ((3,), (0, 1, 2), (5,)))
    inputs = lay_out(batch, np.array([[3, 0, 0], [0, 1, 2], [5, 0, 0]], dtype=np.int32), 16, 32)
    assert inputs.positions.tolist() == [9, *range(5, 45), 0, 1, 2]
    assert len(set(inputs.kv_slots.tolist())) == 44
    assert inputs.sample_rows.tolist() == [0, 43]
    assert inputs.token_from.tolist() == [3] + [-1] * 43
    covered = [r for t in (*inputs.decode_tiles, *inputs.prefill_tiles) for r in range(t[1], t[1] + t[3])]
    assert sorted(covered) == list(range(44))
    assert (inputs.decode_tiles[:, 3] <= DECODE_TILE).all()


def test_a_profile_measured_here_replays(tmp_path: Path) -> None:
    profile = measure_profile(geometry=load_geometry("tiny"), device="cpu", out=tmp_path / "mine", quick=True)
    assert load_profile(str(tmp_path / "mine")) == profile
    (tmp_path / "s.toml").write_text(SCENARIO)
    result = run_scenario(
        str(tmp_path / "s.toml"), backend="profile", profile=str(tmp_path / "mine"), out=tmp_path / "run"
    )
    assert result.summary["completed"] == result.summary["requests"]
    with pytest.raises(BackendError, match="exists already"):
        measure_profile(geometry=load_geometry("tiny"), device="cpu", out=tmp_path / "mine")


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_predictions_grow_with_the_work(name: str) -> None:
    predictor = load_profile(name).predictor
    ranks = dict.fromkeys(range(64), 16)

    def seconds(query: list[int], context: int, adapters: int) -> float:
        slots = tuple(i % adapters if adapters else -1 for i in range(len(query)))
        batch = StepBatch(tuple(query), (context,) * len(query), slots, (True,) * len(query))
        device_s, host_s, _ = predictor.predict(StepFeatures.of(batch, ranks))
        assert device_s > 0 <= host_s
        return device_s + host_s

    assert seconds([1] * 32, 500, 0) < seconds([1] * 32, 500, 1) < seconds([1] * 32, 500, 16)
    assert seconds([1] * 32, 500, 0) < seconds([1] * 32, 4000, 0)
    assert seconds([1] * 8, 500, 0) < seconds([1] * 256, 500, 0)
    assert seconds([512], 0, 1) < seconds([4096], 0, 1) < seconds([8192], 0, 1)


def test_unknown_profiles_and_devices_are_errors() -> None:
    with pytest.raises(BackendError, match="neither a shipped profile"):
        load_profile("no-such-gpu")
