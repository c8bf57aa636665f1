"""What a step took in real vLLM 0.8.5 servers, fitted to published measurements of them alone.

Without adapters a step costs a constant, so much a decode, a cached key and a prompt token; with D distinct adapters in the
batch it is so many times longer: c0 + c1 D. Closed batches of up to 1 000 requests, of 220 requests with 1 to 140 adapters,
and single requests, Llama-3.1-8B, rank 8, 300 slots (Agullo et al., arXiv 2508.08343).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from backend.features import StepFeatures

MODEL = "llama-3.1-8b-instruct"


@dataclass(frozen=True, slots=True)
class MeasuredSteps:
    """Stands for a profile's predictor; milliseconds. `error`: greatest relative error on what it was fitted to."""

    constant: float
    decode: float
    key: float
    prompt_token: float
    c0: float
    c1: float
    error: float

    def base_ms(self, decodes: float, keys: float, prompt_tokens: float) -> float:
        return self.constant + self.decode * decodes + self.key * keys + self.prompt_token * prompt_tokens

    def predict(self, f: StepFeatures) -> tuple[float, float, bool]:
        """(device_s, host_s, extrapolated) as a predictor says it; the host's part is not known apart."""
        ms = self.base_ms(f.decodes, f.kv_tokens, f.rows - f.decodes)
        return 1e-3 * ms * (self.c0 + self.c1 * f.active_adapters if f.active_adapters else 1.0), 0.0, False


def measured_steps(data: Path) -> MeasuredSteps:
    """Fit to compute.csv and compute_steps.csv in `data`."""
    steps = pd.read_csv(data / "compute_steps.csv")
    runs = pd.read_csv(data / "compute.csv")[["repo_path", "num_prompts"]]
    steps = steps[steps["model"] == MODEL].merge(runs, on="repo_path")
    out = steps["request_output_tokens"]
    batch = steps["num_prompts"] * out / steps["steps"]
    plain = (steps["max_loras"] == 0) & (out > 1)
    decodes = batch[plain].to_numpy()
    matrix = np.stack([np.ones_like(decodes), decodes, decodes * out[plain].to_numpy() / 2], 1)
    took = steps.loc[plain, "step_mean_ms"].to_numpy()
    constant, decode, key = _least_relative(matrix, took)
    prompts = (steps["max_loras"] == 0) & (out == 1)
    prompt_token = (steps.loc[prompts, "step_mean_ms"].median() - constant) / 2048  # every step was full
    adapted = steps[(steps["unique_adapters_in_batch"] > 0) & (steps["max_loras"] > 0)]
    single = adapted["phase"].str.startswith("preload")
    # Of the closed batch of 220, about 208 decode in the mean step.
    rows = np.where(single, 1.0, 208.0)
    base = constant + decode * rows + key * rows * adapted["request_output_tokens"] / 2
    distinct = adapted["unique_adapters_in_batch"].to_numpy(float)
    factors = np.stack([base, base * distinct], 1)
    lora = adapted["step_mean_ms"].to_numpy()
    c0, c1 = _least_relative(factors, lora)
    fits = (matrix @ [constant, decode, key] / took, factors @ [c0, c1] / lora)
    error = max(float(np.abs(ratio - 1).max()) for ratio in fits)
    return MeasuredSteps(constant, decode, key, float(prompt_token), c0, c1, error)


def _least_relative(matrix: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> list[float]:
    solution: list[float] = np.linalg.lstsq(matrix / target[:, None], np.ones(len(target)), rcond=None)[0].tolist()
    return solution


def load_s(data: Path) -> float:
    """Seconds of a copy from host memory into a slot: the median of those servers' medians."""
    loads = pd.read_csv(data / "loading.csv")
    chosen = loads[(loads["model"] == MODEL) & loads["activation_median_ms"].notna()]
    return float(chosen["activation_median_ms"].median()) / 1e3
