"""Popularity laws: which adapter a request names. Each draws ids 1 … n, 1 the most popular."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workloads.errors import WorkloadError
from workloads.requests import BASE

IntArray = npt.NDArray[np.int64]


def zipf_mandelbrot(n: int, size: int, s: float, q: float, rng: np.random.Generator) -> IntArray:
    """`p(r) ~ (r + q) ** -s` over ranks 1 … n; `q` flattens the head, `s` = 0 is uniform, `q` = 0 is Zipf's law."""
    if n < 1 or s < 0 or q < 0:
        raise WorkloadError(f"zipf_mandelbrot needs at least one adapter, s >= 0 and q >= 0; got {n}, {s}, {q}")
    weights = (np.arange(1, n + 1) + q) ** -float(s)
    edges = np.cumsum(weights / weights.sum())
    return np.minimum(np.searchsorted(edges, rng.random(size), side="right"), n - 1).astype(np.int64) + 1


def slora_power(n: int, size: int, alpha: float, rng: np.random.Generator) -> IntArray:
    """S-LoRA's generator (Sheng et al. 2024): `floor(n * U ** (1 / alpha))`. alpha = 1 is *uniform*; smaller is skewed."""
    if n < 1 or not alpha > 0:
        raise WorkloadError(f"slora_power needs at least one adapter and alpha > 0; got {n}, {alpha}")
    return np.minimum(np.floor(n * rng.random(size) ** (1 / alpha)), n - 1).astype(np.int64) + 1


def with_base(adapters: IntArray, base_share: float, rng: np.random.Generator) -> IntArray:
    """Turn a share of the requests into requests to the base model."""
    if not 0 <= base_share <= 1:
        raise WorkloadError(f"base_share is {base_share}, must be from 0 to 1")
    return np.where(rng.random(len(adapters)) < base_share, BASE, adapters)
