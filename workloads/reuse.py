"""How adapters are reused: LRU stack distances, hit curves, and what independent draws would give."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

FIRST = -1
"""Stack distance of an adapter's first request."""


def stack_distances(adapter: IntArray) -> IntArray:
    """For each request the number of other adapters used since its adapter's last one, int64[n]; -1 = never before.

    Mattson et al. 1970. An LRU cache of k slots hits exactly the requests with a distance of 0 … k - 1.
    """
    size = len(adapter)
    tree = [0] * (size + 1)  # Fenwick tree over positions: 1 where an adapter was used last
    last: dict[int, int] = {}
    out = np.empty(size, dtype=np.int64)
    for now, who in enumerate(adapter.tolist(), start=1):
        before = last.get(who)
        if before is None:
            out[now - 1] = FIRST
        else:
            count, i = 0, now - 1
            while i:
                count += tree[i]
                i &= i - 1
            i = before
            while i:
                count -= tree[i]
                i &= i - 1
            out[now - 1] = count
            i = before
            while i <= size:
                tree[i] -= 1
                i += i & -i
        i = now
        while i <= size:
            tree[i] += 1
            i += i & -i
        last[who] = now
    return out


def hit_curve(distances: IntArray, slots: IntArray) -> FloatArray:
    """LRU hit ratio with each number of `slots`, first requests of an adapter counted as misses."""
    reused = np.sort(distances[distances >= 0])
    return np.searchsorted(reused, slots, side="left") / max(1, len(distances))


def che(p: FloatArray, slots: IntArray) -> FloatArray:
    """Che's approximation of the LRU hit ratio under independent draws with shares `p` (Che et al. 2002)."""
    hits = []
    for k in slots:
        if k >= np.count_nonzero(p):
            hits.append(1.0)
            continue
        span = brentq(lambda t, k=k: float((-np.expm1(-p * t)).sum()) - k, 0.0, 1e12)
        hits.append(float((p * -np.expm1(-p * span)).sum()))
    return np.array(hits)
