"""The scheduler and the LRU managers decide as the real vLLM did, step for step, in recorded logs."""

from __future__ import annotations

import gzip
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import WorldBackend

from backend.base import AdapterShape, LoadTiming, StepBatch, StepTiming
from benchmarks.conformance import ScheduleReplay, compare, main, read_log
from sim import kv_cache
from sim.adapter_manager import AdapterManager
from sim.engine import simulate
from sim.eviction import AdapterCache
from sim.kv_cache import BlockPool
from sim.scheduler import Scheduler
from sim.waiting import Fcfs, Priority
from workloads.adapters import Catalogue
from workloads.requests import RequestTable

HERE = sorted((Path(__file__).parent / "golden").glob("*.json.gz"))
SHARED = Path(__file__).parents[2] / "shared" / "data" / "vllm_golden"


@pytest.mark.parametrize("file", HERE, ids=lambda f: f.stem)
def test_steps_equal_vllm(file: Path) -> None:
    steps, differences = compare(read_log(file))
    assert steps > 0
    assert not differences, differences[0]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/vllm_golden is not here")
def test_every_shared_log(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(str(f) for f in SHARED.glob("*.json.gz"))
    assert len(files) >= len(HERE)
    assert main(files) == 0, capsys.readouterr().out


class UnitBackend(WorldBackend):
    """Every step takes a second; loads take no time."""

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        super().stage(adapter)
        return LoadTiming(0.0, 1)

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        super().load(adapter, slot)
        return LoadTiming(0.0, 1)

    def execute(self, batch: StepBatch) -> StepTiming:
        super().execute(batch)
        return StepTiming(1.0, 0.0)


BUSY = [
    "d01_lora_leapfrog", "d02_kv_head_blocks", "d06_finish_frees_before_next_schedule", "d07_async_finish_lags",
    "p06_chunked_tiny_budget", "p10_prefix_by_adapter", "p12_prefix_kvpressure", "p15_async_lora",
]  # fmt: skip


@pytest.mark.parametrize("name", BUSY)
def test_the_whole_simulation_executes_the_same_batches(name: str) -> None:
    """The same through SimPy and a backend: the logs whose engine is never idle, a step a second."""
    log = read_log(Path(__file__).parent / "golden" / f"{name}.json.gz")
    steps = [[n for _, n, *_ in row.get("run", []) + row.get("adm", [])] for row in log["steps"]]
    replay = ScheduleReplay(log)
    rows = log["trace"]["requests"]
    # Between two steps, so that none ties with the end of one; asynchronous steps are planned a step earlier.
    early = 1.5 if replay.config.async_scheduling else 0.5
    arrival = np.array([max(0.0, row[0] - early) for row in rows])
    columns = [np.array(column) for column in zip(*(r[1:] for r in rows), strict=True)]
    columns[-1] = np.clip(columns[-1], 0, columns[0])
    backend = UnitBackend(log["config"]["num_blocks"], replay.config.max_loras, replay.config.block_size)
    tables = simulate(RequestTable(arrival, *columns), Catalogue.uniform(99, [8]), replay.config, backend, check=True)
    assert [list(batch.query_lens) for batch in backend.batches] == [batch for batch in steps if batch]
    landed = {i: k for k, row in enumerate(log["steps"]) for i in row.get("fin", [])}
    executed = np.cumsum([bool(batch) for batch in steps])
    for index, finish_s in enumerate(tables.requests["finish_s"]):
        assert finish_s == pytest.approx(executed[landed[index] - replay.config.async_scheduling])


def back_of_the_queue(self: Fcfs, state: Any) -> None:
    self.add(state)


def all_to_the_back(self: BlockPool, state: Any) -> None:
    for block in reversed(state.blocks):
        self.owners[block] -= 1
        if self.owners[block] == 0:
            self._free[block] = None
    state.blocks.clear()
    state.registered = 0


def untouched(self: AdapterCache, adapter: int) -> None:
    self.entries[adapter].uses += 1


def highest_slot(self: AdapterManager, adapter: int, needed: Any) -> None:
    if self.gpu.full:
        self._evict(self.gpu.victim(needed))
    slot = max(self._free)
    self._free.remove(slot)
    self.slots[adapter] = slot
    self.gpu.add(adapter)
    self._note("load", adapter, slot)


def whole_prompt_found(self: BlockPool, state: Any) -> list[int]:
    found: list[int] = []
    for index in range(state.tokens // self.block_size if self.prefix_caching else 0):
        copies: OrderedDict[int, None] = self._cached.get(
            kv_cache.block_key(state.request, index, self.block_size), OrderedDict()
        )
        if not copies:
            break
        found.append(next(iter(copies)))
    return found[: (state.tokens - 1) // self.block_size + 1]


def newest_copy(self: BlockPool, state: Any) -> list[int]:
    return [
        next(reversed(self._cached[self._keys[block]])) if self.prefix_caching else block
        for block in LOOKUP(self, state)
    ]


def without_adapter(request: Any, index: int, block_size: int) -> tuple[int, ...]:
    key = KEY(request, index, block_size)
    return (0, *key[1:]) if len(key) == 3 else key


def fits_at_once(self: Scheduler, state: Any, tokens: int, found: Any) -> bool:
    return self.pool.needed(state, tokens, found) <= self.pool.free


def always_one_more(self: Scheduler, state: Any) -> int:
    return min(state.tokens + state.placeholders - state.computed, self.config.max_model_len - state.computed - 1)


def admits_after_preemption(self: Scheduler, plan: Any, threshold: int) -> None:
    RUNNING(self, plan, threshold)
    plan.preempted.clear()


LOOKUP, KEY, RUNNING = BlockPool.lookup, kv_cache.block_key, Scheduler._schedule_running

MISTAKES: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "a preempted request goes to the back": (Fcfs, "requeue", back_of_the_queue),
    "the first admitted is preempted": (Fcfs, "victim", lambda _, running: running[0]),
    "priority preempts the latest": (Priority, "victim", lambda _, running: running[-1]),
    "a skipped request is a barrier": (Fcfs, "is_barrier", lambda *_: True),
    "freed blocks all go to the back": (BlockPool, "release", all_to_the_back),
    "blocks are never findable": (BlockPool, "register", lambda *_: None),
    "a whole prompt may be found": (BlockPool, "lookup", whole_prompt_found),
    "the newest copy is found": (BlockPool, "lookup", newest_copy),
    "adapters share blocks": (kv_cache, "block_key", without_adapter),
    "no test of the whole prompt, no watermark": (Scheduler, "_blocks_fit", fits_at_once),
    "a step after the last token": (Scheduler, "_left", always_one_more),
    "admission after a preemption": (Scheduler, "_schedule_running", admits_after_preemption),
    "a use does not refresh": (AdapterCache, "touch", untouched),
    "the highest free slot": (AdapterManager, "_load", highest_slot),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_rule_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    assert any(compare(read_log(file))[1] for file in HERE), "no log in tests/golden notices"


def test_a_difference_is_shown_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = read_log(HERE[0])
    log["steps"][1]["free"] = [1, 2]
    file = tmp_path / "wrong.json.gz"
    file.write_bytes(gzip.compress(json.dumps(log).encode()))
    assert main([str(file)]) == 1
    out = capsys.readouterr().out
    assert "wrong.json.gz: 10 steps, 1 differences" in out
    assert "step 1" in out
    assert "log  [1, 2]" in out


@pytest.mark.parametrize("text", ["", "[]", '{"format": "vllm-lora-sched-golden/1", "kind": "other"}', "{"])
def test_a_file_that_is_no_log(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    assert main([str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_a_log_that_lacks_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = read_log(HERE[0])
    del log["config"]["policy"]
    file = tmp_path / "x.json"
    file.write_text(json.dumps(log))
    assert main([str(file)]) == 2
    assert "'policy'" in capsys.readouterr().err
