"""Whole serving steps on this GPU: `python -m benchmarks.step --out FILE.csv [--vllm DIR]`.

Writes FILE.csv (decode steps: requests B, distinct adapters D; `host_ms` is the part that the GPU does not see, `floor_ms`
reading weights, adapters and KV once at the copy bandwidth measured in this run), FILE_prefill.csv (steps of prompts, with
the share of the measured dense rate), FILE_first.csv (prompts of lengths that were not there before, once and again),
FILE_loads.csv (adapters, host to slot), FILE_kernels.csv (GPU time of steps by kernel, from torch's profiler) and FILE.json
(GPU, versions, date, bandwidth, dense rate). `--vllm DIR` prints the comparison with `decode_grid.csv` and `prefill.csv` of that
folder, `--profile NAME` with what a profile says; with `--only compare` nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from backend.base import EngineLimits
from backend.errors import BackendError
from backend.geometry import load_geometry
from benchmarks.outputs import csv_file
from benchmarks.step_kernels import kernels, show_kernels
from benchmarks.step_tables import compare_decode, compare_prefill, compare_profile

PARTS = ("decode", "prefill", "first", "loads", "kernels", "compare")
RANK = 16
LIMITS = EngineLimits(32, RANK, 256, 8192, 16384, 16, 0.9)
SIZES = (1, 4, 8, 16, 32, 64, 128, 256)
ADAPTERS = (0, 1, 2, 4, 8, 16, 32)
FRESH = tuple(range(301, 3000, 97))
"""Prompt tokens of the part `first`: no other part has steps of so many rows."""
PROMPTS = ((128, 1), (256, 1), (512, 1), (512, 4), (1024, 1), (2048, 1), (2048, 4), (4096, 1), (8192, 1), (8192, 4))

TURNS = 26
"""Steps of each batch of prompts, the first two dropped: single ones differ by several percent, and an adapter adds as little."""


class Bench:
    """A live engine as the vLLM runs had it (32 slots of rank 16), all slots loaded; facts measured beside it."""

    def __init__(self, geometry: str) -> None:
        import torch

        from backend.base import AdapterShape
        from backend.live import LiveBackend
        from backend.measure import ALL_MODULES, device_bytes
        from backend.memory import memory_plan

        if not torch.cuda.is_available():
            raise BackendError("benchmarks.step: torch sees no CUDA device here")
        self.bandwidth, self.dense = _copy_bytes_per_s(), _dense_flops_per_s()
        self.geometry = load_geometry(geometry)
        self.limits = LIMITS
        blocks = memory_plan(self.geometry, self.limits, device_bytes("cuda")).num_gpu_blocks
        self.backend = LiveBackend(self.geometry, self.limits, blocks, device="cuda")
        self.adapters = [AdapterShape(slot + 1, RANK, ALL_MODULES) for slot in range(self.limits.max_loras)]
        for slot, adapter in enumerate(self.adapters):
            self.backend.stage(adapter)
            self.backend.load(adapter, slot)

    def batch(self, query: list[int], context: list[int], adapters: int) -> Any:
        """Requests over `adapters` slots in turn (0: none), each with KV blocks of its own; None if they do not fit."""
        from backend.compositions import Room, compose

        slots = [i % adapters if adapters else -1 for i in range(len(query))]
        room = Room(self.limits, self.backend.num_gpu_blocks, {RANK: tuple(range(self.limits.max_loras))})
        return compose(query, context, slots, room)

    def times(self, steps: Sequence[Sequence[Any]], skipped: int) -> list[pd.DataFrame]:
        """Milliseconds of each sequence of steps but its first `skipped`: elapsed, device, host.

        The sequences, alike but for their adapters, take turns, step by step, each turn in an order of its own: as a GPU grows
        warm its clock falls, and it takes some time to rise after a step that used more power. Neither must be in what adapters add.
        """
        from backend.compositions import again

        draw, taken = np.random.default_rng(0), []
        for turn in zip(*steps, strict=True):
            times = {i: self.backend.execute(again(turn[i])) for i in draw.permutation(len(turn)).tolist()}
            taken.append([times[i] for i in range(len(turn))])
        taken = taken[skipped:]
        columns = ["elapsed", "device", "host"]
        return [
            pd.DataFrame([(t.elapsed_s * 1e3, t.device_s * 1e3, t.host_s * 1e3) for t in each], columns=columns)
            for each in zip(*taken, strict=True)
        ]


def _copy_bytes_per_s() -> float:
    """Bytes read plus written a second by device copies of 2 GiB."""
    import torch

    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source))


def _dense_flops_per_s() -> float:
    import torch

    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(a)
    return float(2 * 8192**3) / _seconds(lambda: torch.mm(a, a, out=out))


def _seconds(run: Any, repeats: int = 20) -> float:
    import torch

    run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def decode(bench: Bench) -> pd.DataFrame:
    """33 consecutive decode steps from a context of 490 tokens (as the vLLM grid), the first two dropped; and longer contexts."""
    rows, g = [], bench.geometry
    table = 0 if g.tie_word_embeddings else g.vocab_size * g.hidden_size * g.dtype_bytes  # of which a step reads B rows
    weights = g.weights_bytes - table
    contexts = [(490, ADAPTERS), (2048, (0, 8)), (8192, (0, 8))]
    for context, choices in contexts:
        for size in SIZES:
            steps = {
                d: [bench.batch([1] * size, [context + i] * size, d) for i in range(33)] for d in choices if d <= size
            }
            if any(each[-1] is None for each in steps.values()):
                continue
            for adapters, t in zip(steps, bench.times(list(steps.values()), 2), strict=True):
                moved = weights + adapters * g.lora_bytes(RANK)
                moved += size * (context + 16) * g.kv_bytes_per_token
                rows.append(
                    {
                        "B": size,
                        "D": adapters,
                        "rank": RANK,
                        "context": context,
                        "median_ms": t.elapsed.median(),
                        "p10_ms": t.elapsed.quantile(0.1),
                        "p90_ms": t.elapsed.quantile(0.9),
                        "device_ms": t.device.median(),
                        "host_ms": t.host.median(),
                        "floor_ms": moved / bench.bandwidth * 1e3,
                    }
                )
    return pd.DataFrame(rows)


def prefill(bench: Bench) -> pd.DataFrame:
    """Steps of whole prompts; `dense_share`: their arithmetic at the measured dense rate over the time they took."""
    g, rows = bench.geometry, []
    linear = 2 * g.num_layers * sum(a * b for a, b in g.linears().values())
    for tokens, prompts in PROMPTS:
        counts = [d for d in (0, 1, 4) if d <= prompts]
        steps = [[bench.batch([tokens // prompts] * prompts, [0] * prompts, d)] * TURNS for d in counts]
        for adapters, t in zip(counts, bench.times(steps, 2), strict=True):
            each = tokens // prompts
            pairs = prompts * each * (each + 1) // 2
            flops = linear * tokens + 4 * g.num_layers * g.num_heads * g.head_dim * pairs
            flops += 2 * g.vocab_size * g.hidden_size * prompts
            rows.append(
                {
                    "tokens": tokens,
                    "prompts": prompts,
                    "D": adapters,
                    "median_ms": t.elapsed.median(),
                    "p10_ms": t.elapsed.quantile(0.1),
                    "p90_ms": t.elapsed.quantile(0.9),
                    "device_ms": t.device.median(),
                    "host_ms": t.host.median(),
                    "dense_share": flops / bench.dense / (t.device.median() * 1e-3),
                }
            )
    return pd.DataFrame(rows)


def first(bench: Bench) -> pd.DataFrame:
    """Steps of one prompt of a length that was not there before: the first time, and the median of five more.

    A served prompt is nearly always of a new length; a profile is made of steps that were there before.
    """
    rows = []
    for tokens in FRESH:
        step = bench.batch([tokens], [0], 1)
        (t,) = bench.times([[step] * 6], 0)
        once, later = t.iloc[0], t.iloc[1:].median()
        row = {"tokens": tokens, "first_ms": once["elapsed"], "again_ms": later["elapsed"]}
        rows.append(row | {"first_device_ms": once["device"], "again_device_ms": later["device"]})
    return pd.DataFrame(rows)


def loads(bench: Bench) -> pd.DataFrame:
    """Adapters copied from pinned host memory into a slot, one after the other, each waited for."""
    rows = []
    for i, adapter in enumerate(bench.adapters[:20]):
        t = bench.backend.load(adapter, i)
        rows.append({"nbytes": t.nbytes, "elapsed_ms": t.elapsed_s * 1e3, "gb_per_s": t.nbytes / t.elapsed_s / 1e9})
    return pd.DataFrame(rows)


def measure(args: argparse.Namespace, parts: list[str]) -> None:
    from backend.measure import describe_device

    bench = Bench(args.geometry)
    tables: dict[str, Callable[[Bench], pd.DataFrame]] = {
        "decode": decode,
        "prefill": prefill,
        "first": first,
        "loads": loads,
        "kernels": kernels,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        path = args.out if part == "decode" else args.out.with_name(f"{args.out.stem}_{part}.csv")
        tables[part](bench).to_csv(path, index=False, float_format="%.6g")
        print(f"{part}: {path}", flush=True)
    facts = {
        **describe_device("cuda"),
        "geometry": args.geometry,
        "copy_gb_per_s": round(bench.bandwidth / 1e9, 1),
        "dense_tflop_per_s": round(bench.dense / 1e12, 1),
    }
    args.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    flags.add_argument(
        "--out", type=csv_file, default=Path("step.csv"), help="the CSV file to write; others lie beside it"
    )
    flags.add_argument("--geometry", default="llama-3.1-8b", help="a shipped geometry or a config.json")
    flags.add_argument("--vllm", type=Path, help="folder with vLLM's decode_grid.csv and prefill.csv")
    flags.add_argument("--profile", help="a shipped profile or a profile folder to hold the steps against")
    flags.add_argument("--only", choices=PARTS, action="append", help="measure this part (repeatable); default: all")
    args = flags.parse_args(argv)
    parts = [p for p in (args.only or PARTS) if p != "compare"]
    try:
        if parts:
            measure(args, parts)
        if args.vllm and args.out.is_file():
            compare_decode(pd.read_csv(args.out), args.vllm)
        prompts = args.out.with_name(f"{args.out.stem}_prefill.csv")
        if args.vllm and prompts.is_file():
            compare_prefill(pd.read_csv(prompts), args.vllm)
        if args.profile:
            tables = pd.read_csv(args.out), pd.read_csv(prompts)
            compare_profile(*tables, args.profile, LIMITS, RANK)
        traced = args.out.with_name(f"{args.out.stem}_kernels.csv")
        if traced.is_file():
            show_kernels(pd.read_csv(traced))
    except (BackendError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
