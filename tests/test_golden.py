"""The scheduler and the LRU managers decide as the real vLLM did, step for step, in recorded logs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from sim.adapter_manager import AdapterManager
from sim.config import EngineConfig
from sim.kv_cache import BlockPool
from sim.scheduler import Scheduler
from sim.state import RequestState
from workloads.requests import Request

HERE = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "vllm_golden"
FILES = sorted((SHARED if SHARED.is_dir() else HERE).glob("*.json.gz"))


def modelled(config: dict) -> bool:
    """What this version models: synchronous, first come first served, no prefix cache, chunked prefill."""
    return (
        not config["enable_prefix_caching"]
        and not config["async_scheduling"]
        and config["policy"] == "fcfs"
        and config["enable_chunked_prefill"]
        and not config["watermark"]
        and config["scheduler_reserve_full_isl"]
        and not config.get("static_loras")
        and config["lora_order"] == "sched"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_steps_equal_vllm(file: Path) -> None:
    log = json.loads(gzip.decompress(file.read_bytes()))
    if log["kind"] != "schedule" or not modelled(log["config"]) or log["trace"].get("aborts"):
        pytest.skip("uses what this version does not model (priority, prefix cache, async, aborts, …)")
    c = log["config"]
    loras = c["max_loras"] if c["enable_lora"] else 1
    config = EngineConfig(
        max_loras=loras,
        max_cpu_loras=c["max_cpu_loras"] if c["enable_lora"] else None,
        max_num_seqs=c["max_num_seqs"],
        max_num_batched_tokens=c["max_num_batched_tokens"],
        max_model_len=c["max_model_len"],
        block_size=c["block_size"],
        long_prefill_token_threshold=c["long_prefill_token_threshold"],
    )
    pool = BlockPool(c["num_blocks"] - 1, c["block_size"])
    scheduler = Scheduler(config, pool)
    manager = AdapterManager(loras, config.host_loras)
    rows = log["trace"]["requests"]
    rejected = set(log["trace"].get("rejected", [])) | set(log.get("rejected", []))
    arrived = 0
    for step in log["steps"]:
        while arrived < len(rows) and rows[arrived][0] <= step["t"]:
            at, prompt, output, adapter = rows[arrived][:4]
            if arrived not in rejected and prompt < config.max_model_len:
                request = Request(arrived, float(at), prompt, output, adapter)
                scheduler.add(RequestState(request, min(output, config.max_model_len - prompt)))
            arrived += 1
        plan = scheduler.schedule()
        where = f"step {step['k']}"
        first = len(plan.scheduled) - len(plan.admitted)
        run = [[s.request.request_id, n] for s, n, _ in plan.scheduled[:first]]
        adm = [
            [s.request.request_id, n, 0, int(again)]
            for (s, n, _), again in zip(plan.scheduled[first:], plan.resumed, strict=True)
        ]
        assert run == step.get("run", []), where
        assert adm == step.get("adm", []), where
        assert [s.request.request_id for s in plan.preempted] == step.get("pre", []), where
        assert [s.request.request_id for s in plan.skipped] == step.get("skip", []), where
        free = pool.free
        adapters = list(dict.fromkeys(s.adapter for s, _, _ in plan.scheduled if s.adapter))
        moves = manager.apply(adapters) if c["enable_lora"] else []
        finished = [s.request.request_id for s in scheduler.update(plan)]
        assert [free, pool.free] == step["free"], where
        assert finished == step.get("fin", []), where
        assert [s.request.request_id for s in scheduler.waiting] == step.get("wait", []), where
        names = {"stage": "load", "drop": "cpu-", "load": "gpu+", "evict": "gpu-"}
        events = [e for e in step.get("lev", []) if e[0] != "cpu+"]
        ours = [[names[m.kind], m.adapter] + ([m.slot] if m.slot >= 0 else []) for m in moves]
        assert ours == events, where
        if "slots" in step:
            assert sorted(manager.slots, key=manager.slots.__getitem__) == [a for a in step["slots"] if a]
            assert list(manager.host) == step["cpu"], where
    assert log["steps"]
