"""`python -m benchmarks.sweep_scale`: what a sweep of 48 runs of about 20 000 requests each takes on two processes.

6 values of `engine.max_loras`, 4 of `adapters.count` and 2 seeds on a shipped profile; prints the seconds and the requests.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from sim.sweep import sweep

SCENARIO = """
[model]
geometry = "llama-3.1-8b"
[engine]
max_cpu_loras = 256
max_lora_rank = 16
max_model_len = 8192
[adapters]
rank = 16
[workload]
kind = "synthetic"
rate_rps = {rate_rps}
duration_s = 1000
prompt = {{ kind = "lognormal", median = 150, sigma = 1.0, max = 4000 }}
output = {{ kind = "lognormal", median = 120, sigma = 0.8, max = 2000 }}
popularity = {{ kind = "zipf", s = 1.0 }}
[backend]
kind = "profile"
profile = "h100-llama-3.1-8b"
"""
SETS = {"engine.max_loras": [4, 8, 16, 32, 64, 128], "adapters.count": [32, 64, 128, 256]}
SEEDS = 2


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m benchmarks.sweep_scale", description=__doc__)
    flags.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    flags.add_argument("--requests", type=int, default=20_000, help="mean requests a run (default 20000)")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "scale.toml"
        file.write_text(SCENARIO.format(rate_rps=args.requests / 1000))
        started = time.perf_counter()
        results = sweep(str(file), SETS, out=Path(name) / "sweep", seeds=SEEDS, jobs=args.jobs)
        seconds = time.perf_counter() - started
    steps, requests = int(results["steps"].sum()), int(results["requests"].sum())
    print(
        f"{len(results)} runs, {requests} requests, {steps} steps in {seconds:.0f} s on {args.jobs} processes"
        f" ({os.cpu_count()} cores): {seconds / len(results):.1f} s a run, {requests / seconds:.0f} requests/s,"
        f" {int((results['status'] != 'ok').sum())} refused"
    )


if __name__ == "__main__":
    main()
