"""Decode and prefill steps of ours beside those of vLLM: what `benchmarks.step --vllm DIR` prints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd


def _geomean(values: pd.Series[float]) -> float:
    return float(np.exp(np.log(values).mean()))


def compare_decode(ours: pd.DataFrame, vllm: Path) -> pd.DataFrame:
    """Print whole steps and their GPU part beside vLLM's, what LoRA adds, and time over floor; returns the table."""
    theirs = pd.read_csv(vllm / "decode_grid.csv").query("max_loras == 32").set_index(["B", "D"])
    grid = ours[ours["context"] == 490].set_index(["B", "D"])
    both = grid.join(theirs[["median_ms", "sample_ms"]].add_prefix("vllm_"), how="inner")
    both["whole"] = both["vllm_median_ms"] / both["median_ms"]
    both["gpu"] = both["vllm_sample_ms"] / both["device_ms"]
    both["over_floor"] = both["median_ms"] / both["floor_ms"]
    none = both["device_ms"].groupby("B").transform("first")
    none_floor = both["floor_ms"].groupby("B").transform("first")
    both["lora_ms"] = both["device_ms"] - none
    both["lora_floor_ms"] = both["floor_ms"] - none_floor
    columns = ["median_ms", "device_ms", "host_ms", "floor_ms", "vllm_median_ms", "vllm_sample_ms", "whole", "gpu"]
    print(both[[*columns, "over_floor", "lora_ms", "lora_floor_ms"]].round(2).to_string())
    many = both[both.index.get_level_values("D") == 32]
    one = both[both.index.get_level_values("D") == 1]
    print(
        f"vLLM / ours, whole step: geometric mean {_geomean(both['whole']):.3f}, least {both['whole'].min():.3f}; "
        f"GPU part: geometric mean {_geomean(both['gpu']):.3f}, least {both['gpu'].min():.3f}, "
        f"with 32 adapters least {many['gpu'].min():.3f}"
    )
    few = both[both.index.get_level_values("B") <= 32]
    print(
        f"over floor at B <= 32: at most {few['over_floor'].max():.3f}; one adapter adds at most "
        f"{one['lora_ms'].max():.3f} ms"
    )
    return both


def compare_prefill(ours: pd.DataFrame, vllm: Path) -> pd.DataFrame:
    """Print prefill steps beside vLLM's, and what LoRA adds to ours; returns the table."""
    theirs = pd.read_csv(vllm / "prefill.csv").query("max_loras == 32 and rep > 0")
    theirs = theirs.rename(columns={"n_prompts": "prompts", "step_ms": "vllm_ms"})
    medians = theirs.groupby(["tokens", "prompts", "D"])[["vllm_ms"]].median()
    both = ours.set_index(["tokens", "prompts", "D"]).join(medians)
    both["vllm/ours"] = both["vllm_ms"] / both["median_ms"]
    both["lora_share"] = both["device_ms"] / both["device_ms"].groupby(["tokens", "prompts"]).transform("first") - 1
    print(both.round(3).to_string())
    return both
