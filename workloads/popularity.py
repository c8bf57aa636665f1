"""Popularity laws: how often each adapter is asked for. Each gives shares float64[n] of ranks 1 … n that sum to 1."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt

from workloads.errors import WorkloadError
from workloads.requests import BASE

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

PUNICA = ("distinct", "uniform", "skewed", "identical")


def zipf_mandelbrot(n: int, s: float, q: float = 0.0) -> FloatArray:
    """`p(r) ~ (r + q) ** -s`; `q` flattens the head, `s` = 0 is uniform, `q` = 0 is Zipf's law."""
    if n < 1 or s < 0 or q < 0:
        raise WorkloadError(f"zipf_mandelbrot needs at least one adapter, s >= 0 and q >= 0; got {n}, {s}, {q}")
    # From logarithms, so that steep laws over many adapters do not run out of range.
    logs = -s * np.log(np.arange(1, n + 1) + q)
    return shares(np.exp(logs - logs[0]))


def slora_power(n: int, alpha: float) -> FloatArray:
    """S-LoRA's generator (Sheng et al. 2024), `floor(n * U ** (1 / alpha))`. alpha = 1 is *uniform*; smaller is skewed."""
    if n < 1 or not alpha > 0:
        raise WorkloadError(f"slora_power needs at least one adapter and alpha > 0; got {n}, {alpha}")
    return np.diff((np.arange(n + 1) / n) ** alpha)


def punica(n: int, shape: str) -> FloatArray:
    """Punica's four shapes (Chen et al. 2024).

    `uniform`: the first √n adapters alike; `skewed`: each 1.5 times as popular as the next; `identical`: one for all;
    `distinct`: all adapters in turn, which `in_turn` draws.
    """
    if shape not in PUNICA:
        raise WorkloadError(f"punica's shape is {shape}, must be one of {', '.join(PUNICA)}")
    ranks = np.arange(n)
    weights = {
        "distinct": np.ones(n),
        "uniform": (ranks < np.ceil(np.sqrt(n))).astype(float),
        "skewed": 1.5 ** -ranks.astype(float),
        "identical": (ranks == 0).astype(float),
    }[shape]
    return shares(weights)


def read_weights(path: Path) -> FloatArray:
    """Shares from a CSV with columns `adapter,weight`, in its order. Errors name file and line."""
    if not path.is_file():
        raise WorkloadError(f"{path}: no such file; want a CSV with columns adapter,weight")
    weights = []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        if next(rows, []) != ["adapter", "weight"]:
            raise WorkloadError(f"{path}:1: columns must be adapter,weight")
        for line, row in enumerate(rows, start=2):
            try:
                _, weight = row
                weights.append(float(weight))
            except ValueError as error:
                raise WorkloadError(f"{path}:{line}: {','.join(row)} must be an adapter and a weight") from error
            if not 0 <= weights[-1] < float("inf"):
                raise WorkloadError(f"{path}:{line}: weight is {weight}, must be finite and >= 0")
    return shares(np.array(weights))


def shares(weights: FloatArray) -> FloatArray:
    """Weights scaled to sum to 1."""
    if len(weights) == 0 or not np.isfinite(weights).all() or weights.min() < 0 or not weights.sum() > 0:
        raise WorkloadError("popularity weights must be finite, >= 0, and not all zero")
    scaled: FloatArray = weights / weights.sum()
    return scaled


def draw(p: FloatArray, size: int, rng: np.random.Generator) -> IntArray:
    """Independent draws of ranks 0 … n - 1."""
    edges = np.cumsum(p)
    found = np.searchsorted(edges, rng.random(size) * edges[-1], side="right")
    ranks: IntArray = np.minimum(found, len(p) - 1).astype(np.int64, copy=False)
    return ranks


def in_turn(n: int, size: int) -> IntArray:
    """Ranks 0 … n - 1 one after the other, again and again."""
    return np.arange(size, dtype=np.int64) % n


def with_base(adapters: IntArray, base_share: float, rng: np.random.Generator) -> IntArray:
    """Turn a share of the requests into requests to the base model."""
    if not 0 <= base_share <= 1:
        raise WorkloadError(f"base_share is {base_share}, must be from 0 to 1")
    return np.where(rng.random(len(adapters)) < base_share, BASE, adapters)
