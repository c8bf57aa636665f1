"""`python -m benchmarks.workload_scale`: seconds and memory of a million requests over 10,000 adapters.

Each way of making them runs in a process of its own, so that its peak memory is its own (imports included).
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from workloads.build import build_workload

ADAPTERS = 10_000
LOGNORMAL = {"kind": "lognormal", "median": 300, "sigma": 1.0, "max": 8000}
STREAM = {"kind": "synthetic", "rate_rps": 10_000, "duration_s": 100, "prompt": LOGNORMAL, "output": LOGNORMAL}
ZIPF = {"popularity": {"kind": "zipf_mandelbrot", "s": 1.14, "q": 3.6}}
WAYS: dict[str, dict[str, object]] = {
    "poisson, zipf_mandelbrot": STREAM | ZIPF,
    "gamma, repeats, drift": STREAM
    | ZIPF
    | {
        "arrival": "gamma",
        "cv": 3.0,
        "locality": {"kind": "repeat", "share": 0.8, "mean_gap": 4},
        "drift": {"period_s": 10, "top": 10, "keep": 0.5},
    },
    "lru_stack": STREAM | {"locality": {"kind": "lru_stack", "distances": (0.9 ** np.arange(200)).tolist()}},
    "sessions": STREAM
    | ZIPF
    | {"rate_rps": 2600, "sessions": {"turns": 4, "think_s": 1.0, "system_tokens": 100, "max_tokens": 32768}},
    "table from Parquet": {"kind": "table", "path": "trace.parquet"},
}


def write_trace(folder: Path) -> None:
    """A million rows of the generic table."""
    n = 1_000_000
    names = np.array([f"adapter-{i}" for i in range(ADAPTERS)])[np.arange(n) % ADAPTERS]
    columns = {"arrival_s": np.arange(n) / 1e4, "prompt_tokens": np.full(n, 300), "output_tokens": np.full(n, 300)}
    pd.DataFrame(columns | {"adapter": names}).to_parquet(folder / "trace.parquet", index=False)


def measure(way: str, folder: Path) -> None:
    """Make the requests of `way` and print what it took."""
    count = None if way.startswith("table") else ADAPTERS
    started = time.perf_counter()
    requests = build_workload(WAYS[way], adapter_count=count, seed=0, base_dir=folder).requests
    seconds = time.perf_counter() - started
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{way:26}{len(requests):>10} requests{seconds:8.2f} s{peak_mib:8.0f} MiB at most")


def main() -> None:
    """Measure every way, each in a new process."""
    if len(sys.argv) == 3:
        measure(sys.argv[1], Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as name:
        write_trace(Path(name))
        for way in WAYS:
            subprocess.run([sys.executable, "-m", "benchmarks.workload_scale", way, name], check=True)


if __name__ == "__main__":
    main()
