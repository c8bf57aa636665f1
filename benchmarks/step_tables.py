"""Decode and prefill steps of ours beside those of vLLM: what `benchmarks.step --vllm DIR` prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from backend.base import EngineLimits, StepBatch
from backend.features import StepFeatures
from backend.profile import load_profile


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


def _predictor(profile: str, limits: EngineLimits, rank: int) -> Callable[..., float]:
    """Milliseconds that the profile says of a step of (tokens, context) requests over so many adapters in turn, one like the other."""
    predictor = load_profile(profile).predictor
    ranks = dict.fromkeys(range(limits.max_loras), rank)

    def predict(query: list[int], context: int, adapters: int) -> float:
        count = len(query)
        slots = tuple(i % adapters if adapters else -1 for i in range(count))
        step = StepBatch(tuple(query), (context,) * count, slots, (True,) * count, ())
        return sum(predictor.predict_lasting(StepFeatures.of(step, ranks, max_loras=limits.max_loras))[:2]) * 1e3

    return predict


def compare_profile(
    decodes: pd.DataFrame, prompts: pd.DataFrame, profile: str, limits: EngineLimits, rank: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Print steps that were repeated, as these are, over what a profile says of them, whose steps came in random order."""
    predict = _predictor(profile, limits, rank)
    grid = decodes[decodes["context"] == 490].copy()
    cells = zip(grid["B"], grid["D"], strict=True)
    grid["over_profile"] = grid["median_ms"] / [predict([1] * size, 506, adapters) for size, adapters in cells]
    table = grid.pivot_table(index="B", columns="D", values="over_profile")
    print(f"milliseconds over what {profile} says, decodes by requests and adapters:\n{table.round(3).to_string()}")
    prompts = prompts.copy()
    steps = zip(prompts["tokens"], prompts["prompts"], prompts["D"], strict=True)
    prompts["over_profile"] = prompts["median_ms"] / [predict([t // n] * n, 0, d) for t, n, d in steps]
    print(prompts[["tokens", "prompts", "D", "median_ms", "over_profile"]].round(3).to_string(index=False))
    return table, prompts
