"""How long a plan over three profiles and 200 adapters takes: two of H100s (one of them vLLM's), one of an H200.

The hourly prices are there to be searched over; put your own in their place.

    python -m benchmarks.plan_scale [--jobs N] [--rate RPS]
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from sim.plan import plan
from sim.plan_grid import Grid
from sim.scenario import Cost, load_scenario
from sim.slo import parse_slo

PRICES = {"h100-llama-3.1-8b": 2.5, "vllm-0.24-h100-llama-3.1-8b": 2.5, "h200-llama-3.1-8b": 3.5}
"""USD an hour, by profile."""


def main() -> None:
    verb = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verb.add_argument("--jobs", type=int, default=2)
    verb.add_argument("--rate", type=float, default=10.0, help="requests a second (default 10: one replica will do)")
    args = verb.parse_args()
    demo = load_scenario("demo-plan")
    scenario = replace(demo, cost=Cost(PRICES), workload={**demo.workload, "rate_rps": args.rate})
    found = plan(scenario, parse_slo("ttft_p99<=1.0s, tpot_p99<=60ms"), Grid(profiles=tuple(PRICES), jobs=args.jobs))
    part = found.parts[0].found
    print(f"adapters {len(found.parts[0].traffic[0].catalogue)}, profiles {len(PRICES)}, jobs {args.jobs}")
    print(f"requests/s {args.rate:g}")
    print(f"plan: {part.replicas} x {part.deployment.profile}, max_loras {part.deployment.engine.max_loras}")
    print(f"{found.tried} trials, answered in {found.seconds:.0f} s")


if __name__ == "__main__":
    main()
