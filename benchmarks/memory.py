"""`python -m benchmarks.memory [FILE]`: the memory model beside what real vLLM reported, row by row.

FILE: a CSV with columns `source, model, max_loras, max_lora_rank, status, kv_cache_tokens` (vLLM 0.8.5 probes on a
63.43 GiB GPU, 2048 batched tokens and sequences). Two vLLM 0.24 facts on an H100 are built in.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from backend.base import EngineLimits
from backend.geometry import load_geometry
from backend.memory import GIB, memory_plan

H100_BYTES = 85017493504
"""`torch.cuda.get_device_properties(0).total_memory` of an NVIDIA H100 80GB HBM3."""

H100_BLOCKS = {32: 26655, 8: 27759}
"""`max_loras` -> KV blocks of 16 that vLLM 0.24 reported: Llama-3.1-8B, rank 16, utilization 0.9."""

MODELS = {"llama-3.1-8b-instruct": "llama-3.1-8b", "qwen-2.5-7b-instruct": "qwen2.5-7b"}


def h100() -> pd.DataFrame:
    """Predicted and measured KV tokens of the two H100 engines."""
    rows = []
    for slots, blocks in H100_BLOCKS.items():
        limits = EngineLimits(slots, 16, 256, 8192, 16384, 16, 0.9)
        plan = memory_plan(load_geometry("llama-3.1-8b"), limits, H100_BYTES)
        rows.append(("vLLM 0.24, H100", "llama-3.1-8b", slots, 16, blocks * 16, plan.num_gpu_blocks * 16))
    return _table(rows)


def probes(file: Path) -> pd.DataFrame:
    """Predicted and measured KV tokens of every successful probe in `file`."""
    measured = pd.read_csv(file)
    measured = measured[(measured["source"] == "estimator_probe") & (measured["status"] == "ok")]
    rows = []
    for row in measured.itertuples():
        geometry = load_geometry(MODELS[str(row.model)])
        limits = EngineLimits(int(row.max_loras), int(row.max_lora_rank), 2048, 2048, 16, 16, 0.9)
        plan = memory_plan(geometry, limits, int(63.43 * GIB))
        tokens = plan.num_gpu_blocks * 16
        rows.append(
            ("vLLM 0.8.5, 63.43 GiB", geometry.name, row.max_loras, row.max_lora_rank, row.kv_cache_tokens, tokens)
        )
    return _table(rows)


def _table(rows: list[tuple[object, ...]]) -> pd.DataFrame:
    table = pd.DataFrame(
        rows, columns=["engine", "model", "max_loras", "max_lora_rank", "measured_tokens", "model_tokens"]
    )
    table["error"] = table["model_tokens"] / table["measured_tokens"] - 1
    return table


def main() -> None:
    """Print both tables and the worst error of each."""
    tables = [h100()] + [probes(Path(name)) for name in sys.argv[1:]]
    for table in tables:
        print(table.to_string(index=False, float_format=lambda v: f"{v:+.4f}"))
        print(f"worst: {table['error'].abs().max():.2%}")


if __name__ == "__main__":
    main()
