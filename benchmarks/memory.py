"""`python -m benchmarks.memory [--data DIR] [--out FILE]`: the memory model beside what real vLLM reported, by row.

Two vLLM 0.24 facts on an H100 are built in. DIR may hold `real_vllm_runs/memory.csv` with columns `source, model,
max_loras, max_lora_rank, status, kv_cache_tokens`: vLLM 0.8.5 probes on a 63.43 GiB GPU, 2048 batched tokens and
sequences.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from backend.base import EngineLimits
from backend.errors import BackendError
from backend.geometry import ModelGeometry, load_geometry
from backend.memory import EXTRA_VOCAB_ROWS_0_8, GIB, MemoryPlan, memory_plan

H100_BYTES = 85017493504
"""`torch.cuda.get_device_properties(0).total_memory` of an NVIDIA H100 80GB HBM3."""

H100_BLOCKS = {32: 26655, 8: 27759}
"""`max_loras` -> KV blocks of 16 that vLLM 0.24 reported: Llama-3.1-8B, rank 16, utilization 0.9."""

PROBE_BYTES = int(63.43 * GIB)
"""Capacity of the probes' GPU, from their out-of-memory messages."""

PROBE_MODELS = {"llama-3.1-8b-instruct": ("llama-3.1-8b", 131072), "qwen-2.5-7b-instruct": ("qwen2.5-7b", 32768)}
"""A probe's model -> shipped geometry and the `max_model_len` it was started with."""

COLUMNS = ["engine", "model", "max_loras", "max_lora_rank", "measured_tokens", "model_tokens"]


def h100() -> pd.DataFrame:
    """Predicted and measured KV tokens of the two H100 engines."""
    rows: list[tuple[object, ...]] = []
    for slots, blocks in H100_BLOCKS.items():
        limits = EngineLimits(slots, 16, 256, 8192, 16384, 16, 0.9)
        plan = memory_plan(load_geometry("llama-3.1-8b"), limits, H100_BYTES)
        rows.append(("vLLM 0.24, H100", "llama-3.1-8b", slots, 16, blocks * 16, plan.num_gpu_blocks * 16))
    return _table(rows)


def probe_plan(geometry: ModelGeometry, max_loras: int, max_lora_rank: int, max_model_len: int) -> MemoryPlan:
    """The plan of one vLLM 0.8.5 probe. Raises `BackendError` where that server should have refused to start."""
    limits = EngineLimits(max_loras, max_lora_rank, 2048, 2048, max_model_len, 16, 0.9)
    return memory_plan(geometry, limits, PROBE_BYTES, extra_vocab_rows=EXTRA_VOCAB_ROWS_0_8)


def read_probes(file: Path) -> pd.DataFrame:
    """All probes in `file`, started or failed."""
    measured = pd.read_csv(file)
    return measured[measured["source"] == "estimator_probe"]


def probes(file: Path) -> pd.DataFrame:
    """Predicted and measured KV tokens of every successful probe in `file`; no start predicted = 0 tokens."""
    measured = read_probes(file)
    measured = measured[measured["status"] == "ok"]
    numbers = measured[["max_loras", "max_lora_rank", "kv_cache_tokens"]].astype(int).to_numpy().tolist()
    rows: list[tuple[object, ...]] = []
    for model, (slots, rank, held) in zip(measured["model"], numbers, strict=True):
        name, length = PROBE_MODELS[model]
        try:
            tokens = probe_plan(load_geometry(name), slots, rank, length).num_gpu_blocks * 16
        except BackendError:
            tokens = 0
        rows.append(("vLLM 0.8.5, 63.43 GiB", name, slots, rank, held, tokens))
    return _table(rows)


def _table(rows: list[tuple[object, ...]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["error"] = table["model_tokens"] / table["measured_tokens"] - 1
    return table


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    flags.add_argument("--data", type=Path, help="folder with real_vllm_runs/memory.csv; without it, the H100 only")
    flags.add_argument("--out", type=Path, help="write the rows there as CSV")
    return flags


def main() -> None:
    """Print the tables and the worst error of each."""
    flags = parser()
    args = flags.parse_args()
    tables = [h100()]
    if args.data is not None:
        file = args.data / "real_vllm_runs" / "memory.csv"
        if not file.is_file():
            flags.error(f"--data {args.data}: has no real_vllm_runs/memory.csv")
        tables.append(probes(file))
    for table in tables:
        print(table.to_string(index=False, formatters={"error": "{:+.4f}".format}))
        print(f"worst: {table['error'].abs().max():.2%} of {len(table)} rows\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        pd.concat(tables).to_csv(args.out, index=False, float_format="%.5f", lineterminator="\n")
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
