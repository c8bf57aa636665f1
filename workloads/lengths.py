"""Length distributions of prompts and outputs, in tokens."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from workloads.errors import WorkloadError

IntArray = npt.NDArray[np.int64]


def fixed(tokens: int, size: int) -> IntArray:
    """Always `tokens`."""
    if tokens < 1:
        raise WorkloadError(f"tokens is {tokens}, must be >= 1")
    return np.full(size, tokens, dtype=np.int64)


def lognormal(median: float, sigma: float, low: int, high: int, size: int, rng: np.random.Generator) -> IntArray:
    """Log-normal around `median` with log-deviation `sigma`, clipped to [low, high]."""
    if not (median > 0 and sigma >= 0 and 1 <= low <= high):
        raise WorkloadError(
            f"lognormal needs median > 0, sigma >= 0, 1 <= min <= max; got {median}, {sigma}, {low}, {high}"
        )
    return np.clip(np.rint(rng.lognormal(np.log(median), sigma, size)), low, high).astype(np.int64)


def quantiles(
    tokens: npt.NDArray[np.float64], size: int, rng: np.random.Generator, shares: npt.NDArray[np.float64] | None = None
) -> IntArray:
    """Draws between quantiles: a share `shares[i]` of the draws is at most `tokens[i]`, straight in between.

    `shares`: from 0 to 1, rising; evenly spaced where left out.
    """
    if len(tokens) < 2 or tokens[0] < 1 or (np.diff(tokens) < 0).any():
        raise WorkloadError("quantiles need at least two token counts >= 1, in rising order")
    grid = np.linspace(0, 1, len(tokens)) if shares is None else shares
    if len(grid) != len(tokens) or grid[0] != 0 or grid[-1] != 1 or (np.diff(grid) <= 0).any():
        raise WorkloadError("quantiles need a share for each token count, rising from 0 to 1")
    drawn = np.interp(rng.random(size), grid, tokens)
    return np.rint(drawn).astype(np.int64)


def empirical(histogram: Mapping[int, float], size: int, rng: np.random.Generator) -> IntArray:
    """Draws from a histogram {tokens: weight}; zero-token bins count as one token."""
    values = np.maximum(np.array(list(histogram), dtype=np.int64), 1)
    weights = np.array(list(histogram.values()), dtype=float)
    if len(values) == 0 or weights.min() < 0 or not weights.sum() > 0:
        raise WorkloadError("an empirical length needs a histogram with positive weight")
    return rng.choice(values, size, p=weights / weights.sum())


def read_histogram(path: Path) -> dict[int, float]:
    """A histogram from a CSV with columns `tokens,weight`. Errors name file and line."""
    if not path.is_file():
        raise WorkloadError(f"{path}: no such file; want a CSV with columns tokens,weight")
    histogram: dict[int, float] = {}
    with path.open(newline="") as file:
        rows = csv.reader(file)
        if next(rows, []) != ["tokens", "weight"]:
            raise WorkloadError(f"{path}:1: columns must be tokens,weight")
        for line, row in enumerate(rows, start=2):
            try:
                tokens, weight = int(row[0]), float(row[1])
            except (ValueError, IndexError) as error:
                raise WorkloadError(f"{path}:{line}: {','.join(row)} must be a token count and a weight") from error
            if tokens < 1 or not weight >= 0:
                raise WorkloadError(f"{path}:{line}: tokens must be >= 1 and weight >= 0")
            histogram[tokens] = histogram.get(tokens, 0.0) + weight
    return histogram
