"""A catalogue that changes: who is popular drifts, adapters are born and retired. Ranks become adapter ids here."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workloads.errors import WorkloadError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def epochs(arrival_s: FloatArray, period_s: float) -> IntArray:
    """Which period each arrival falls into, int64[n] from 0."""
    return (arrival_s // period_s).astype(np.int64)


def drift(n: int, periods: int, top: int, keep: float, rng: np.random.Generator) -> IntArray:
    """Ids of ranks, int64[periods, n]: from one period to the next a share `keep` of the `top` ranks' adapters stays.

    The others change places with adapters drawn from below.
    """
    if not (0 < top < n and 0 <= keep <= 1):
        raise WorkloadError(f"drift needs top from 1 to below {n} adapters and keep from 0 to 1; got {top}, {keep}")
    table = np.empty((periods, n), dtype=np.int64)
    table[0] = np.arange(1, n + 1)
    leaving = min(round(top * (1 - keep)), n - top)
    for period in range(1, periods):
        row = table[period - 1].copy()
        out = rng.choice(top, leaving, replace=False)
        into = top + rng.choice(n - top, leaving, replace=False)
        row[out], row[into] = row[into], row[out]
        table[period] = row
    return table


def churn(n: int, periods: int, alive: int, share: float, rng: np.random.Generator) -> IntArray:
    """Ids of ranks, int64[periods, alive]: each period a `share` of the adapters alive is retired and born anew.

    Born adapters take the retired ones' ranks under ids never used before, so `n` ids must be enough.
    """
    born = round(alive * share)
    if not 0 < alive <= n or not 0 <= share <= 1 or alive + born * (periods - 1) > n:
        raise WorkloadError(
            f"churn of {born} adapters in each of {periods - 1} periods beside {alive} alive needs"
            f" {alive + born * (periods - 1)} adapters, adapters.count is {n}"
        )
    table = np.empty((periods, alive), dtype=np.int64)
    table[0] = np.arange(1, alive + 1)
    for period in range(1, periods):
        row = table[period - 1].copy()
        first = alive + born * (period - 1) + 1
        row[rng.choice(alive, born, replace=False)] = np.arange(first, first + born)
        table[period] = row
    return table
