"""Arrival processes: when requests come."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workloads.errors import WorkloadError

FloatArray = npt.NDArray[np.float64]


def gamma(rate_rps: float, duration_s: float, cv: float, rng: np.random.Generator) -> FloatArray:
    """Renewal arrivals with gamma gaps of mean `1 / rate_rps` and coefficient of variation `cv`, in [0, duration_s).

    `cv` 1 is a Poisson process; above 1 arrivals come in bursts.
    """
    if not (rate_rps > 0 and duration_s > 0 and cv > 0):
        raise WorkloadError(f"arrivals need rate_rps, duration_s and cv > 0; got {rate_rps}, {duration_s}, {cv}")
    shape = cv**-2
    chunks: list[FloatArray] = []
    clock = 0.0
    while clock < duration_s:
        count = int((duration_s - clock) * rate_rps * 1.1) + 64
        times = clock + np.cumsum(rng.gamma(shape, 1 / (rate_rps * shape), count))
        chunks.append(times)
        clock = float(times[-1])
    times = np.concatenate(chunks)
    return times[times < duration_s]


def poisson(rate_rps: float, duration_s: float, rng: np.random.Generator) -> FloatArray:
    """Poisson arrivals at `rate_rps` in [0, duration_s)."""
    return gamma(rate_rps, duration_s, 1.0, rng)
