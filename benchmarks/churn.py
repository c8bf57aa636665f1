"""Thousands of live steps under KV pressure and adapter churn: `python -m benchmarks.churn [--requests N] [--out FILE.csv]`.

The simulation's own scheduler, KV cache and adapter manager drive the live backend: more requests than the KV cache holds
(they are preempted), 200 adapters of ranks 8 to 64 over 16 slots and 32 host places. Writes a row a thousand steps, with
device memory in use, and prints what must hold: every scheduled row executed, memory flat, all logits finite.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from backend.around import AroundLive
from backend.base import AdapterShape, LoadTiming, StepBatch, StepTiming
from backend.errors import BackendError
from backend.geometry import load_geometry
from backend.live import LiveBackend
from backend.measure import describe_device
from benchmarks.outputs import csv_file
from sim.config import EngineConfig
from sim.engine import simulate
from sim.run import limits_of
from sim.tables import RunTables
from workloads.adapters import Catalogue
from workloads.requests import RequestTable

ADAPTERS = 200
RANKS = (8, 16, 32, 64)
PROMPT, OUTPUT, RUNNING = 120, 120, 32
KV_TOKENS = RUNNING * (PROMPT + OUTPUT) // 2
"""Half of what the running requests come to need."""

CONFIG = EngineConfig(
    max_loras=16,
    max_cpu_loras=32,
    max_lora_rank=64,
    max_num_seqs=RUNNING,
    max_num_batched_tokens=256,
    max_model_len=1024,
)


class Watched(AroundLive):
    """A live backend that counts rows and moves, and looks at the logits of every step without waiting for them."""

    def __init__(self, live: LiveBackend, every: int) -> None:
        super().__init__(live)
        self.every = every
        self.rows_computed = self.steps = self.loads = 0
        self.bad = torch.zeros((), dtype=torch.int64, device=live.device)
        self.table: list[tuple[int, int, int, int, int]] = []

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        """As the live backend; counted."""
        self.loads += 1
        return super().load(adapter, slot)

    def execute(self, batch: StepBatch) -> StepTiming:
        """As the live backend; rows, samples and memory are watched."""
        timing = self.live.execute(batch)
        samples = sum(batch.samples)
        if samples:
            self.bad += (~self.live.decoder.logits[:samples].isfinite()).any().long()
        self.steps += 1
        self.rows_computed += sum(batch.query_lens)
        if self.steps == 1 or self.steps % self.every == 0:
            allocated, used = _memory(self.live.device)
            self.table.append((self.steps, self.rows_computed, self.loads, allocated, used))
        return timing


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes that torch has allocated on the device, and bytes in use there; 0 on the CPU."""
    if device.type != "cuda":
        return 0, 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(0)
    return torch.cuda.memory_allocated(), total - free


def requests(count: int, seed: int = 20261124) -> RequestTable:
    """`count` requests faster than they are served, adapters by Zipf's law over `ADAPTERS`."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, ADAPTERS + 1)
    return RequestTable(
        arrival_s=np.cumsum(rng.exponential(0.01, count)),
        prompt_tokens=np.clip(rng.lognormal(np.log(PROMPT), 0.7, count), 2, 600).astype(np.int64),
        output_tokens=np.clip(rng.lognormal(np.log(OUTPUT), 0.7, count), 1, 400).astype(np.int64),
        adapter=rng.choice(ADAPTERS + 1, count, p=np.append(0.1, 0.9 * weights / weights.sum())),
    )


def churn(geometry: str, device: str, count: int, every: int = 1000) -> tuple[Watched, RunTables]:
    """Serve `count` requests; after every step the invariants are checked."""
    limits = limits_of(CONFIG)
    live = LiveBackend(load_geometry(geometry), limits, KV_TOKENS // limits.block_size, device=device)
    watched = Watched(live, every)
    catalogue = Catalogue.uniform(ADAPTERS, RANKS)
    tables = simulate(requests(count), catalogue, CONFIG, watched, check=True)
    return watched, tables


def report(watched: Watched, tables: RunTables) -> dict[str, object]:
    """What happened, and what must hold of it."""
    scheduled = int(tables.steps["tokens"].sum())
    flat = [row for row in watched.table if row[0] >= watched.table[-1][0] // 5]
    return {
        "steps": watched.steps,
        "requests_finished": int((tables.requests["status"] == "finished").sum()),
        "preemptions": int(tables.steps["preempted"].sum()),
        "adapter_loads": watched.loads,
        "rows_scheduled": scheduled,
        "rows_computed": watched.rows_computed,
        "steps_with_logits_not_finite": int(watched.bad),
        "allocated_bytes_growth": flat[-1][3] - flat[0][3],
        "device_bytes_growth": flat[-1][4] - flat[0][4],
    }


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(prog="python -m benchmarks.churn", description=__doc__)
    flags.add_argument("--requests", type=int, default=1100, help="to serve; each takes about ten steps")
    flags.add_argument("--backend", default="cuda", choices=("cuda", "cpu"))
    flags.add_argument("--geometry", default="llama-3.1-8b", help="a shipped geometry or a config.json")
    flags.add_argument(
        "--out", type=csv_file, default=Path("churn.csv"), help="the CSV file to write; facts lie beside it"
    )
    args = flags.parse_args(argv)
    try:
        watched, tables = churn(args.geometry, args.backend, args.requests)
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    columns = ["step", "rows_computed", "adapter_loads", "allocated_bytes", "device_used_bytes"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(watched.table, columns=columns).to_csv(args.out, index=False)
    facts = report(watched, tables)
    args.out.with_suffix(".json").write_text(
        json.dumps({**describe_device(args.backend), "geometry": args.geometry, **facts}, indent=1) + "\n"
    )
    for key, value in facts.items():
        print(f"{key:32}{value:>14}")
    holds = (
        facts["rows_scheduled"] == facts["rows_computed"]
        and watched.steps == len(tables.steps) == watched.live.steps_executed
        and not facts["steps_with_logits_not_finite"]
        and facts["allocated_bytes_growth"] == 0
    )
    print("holds" if holds else "DOES NOT HOLD: every row computed once, logits finite, allocated memory flat")
    watched.close()
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
