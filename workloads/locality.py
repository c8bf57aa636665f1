"""Temporal locality: real adapter requests come in runs, independent draws do not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workloads.errors import WorkloadError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def lru_stack(n: int, size: int, distances: FloatArray, rng: np.random.Generator) -> IntArray:
    """Ranks int64[size] by the LRU-stack model (Mattson 1970; Spirn 1976).

    Each request takes the adapter at a position of the list ordered by last use, position d with weight `distances[d]`
    (0 = used last), and moves it to the top. An LRU cache of k slots then hits with the weight of the first k positions.
    The list begins in rank order. All adapters become equally popular in the long run, whatever the distances.
    """
    if not 0 < len(distances) <= n or distances.min() < 0 or not distances.sum() > 0:
        raise WorkloadError(f"lru_stack needs 1 to {n} distances >= 0, not all zero; got {len(distances)}")
    edges = np.cumsum(distances)
    positions = np.searchsorted(edges, rng.random(size) * edges[-1], side="right")
    stack = list(range(n - 1, -1, -1))  # the top is at the end, where a list moves least
    drawn = np.empty(size, dtype=np.int64)
    for i, position in enumerate(np.minimum(positions, len(distances) - 1).tolist()):
        adapter = stack.pop(-1 - position)
        stack.append(adapter)
        drawn[i] = adapter
    return drawn


def repeat(ranks: IntArray, share: float, mean_gap: float, rng: np.random.Generator) -> IntArray:
    """`ranks` in which a `share` of the requests repeats the adapter of an earlier one, a geometric gap back.

    `mean_gap` >= 1: requests back, on average. Popularity stays what it was: who is repeated was drawn by it.
    """
    if not (0 <= share < 1 and mean_gap >= 1):
        raise WorkloadError(f"repeat needs share from 0 to below 1 and mean_gap >= 1; got {share}, {mean_gap}")
    size = len(ranks)
    index = np.arange(size)
    source = index - rng.geometric(1 / mean_gap, size)
    source = np.where((rng.random(size) < share) & (source >= 0), source, index)
    # Chains of repeats are followed to their origin, twice as far each time.
    while (further := source[source]).tobytes() != source.tobytes():
        source = further
    repeated: IntArray = ranks[source]
    return repeated
