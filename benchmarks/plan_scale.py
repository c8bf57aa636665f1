"""How long a plan over three kinds of GPU and 200 adapters takes.

Two kinds are shipped profiles of Llama-3.1-8B, measured on H100s. No third GPU has been measured: the third is the first one's profile
with every step 1.6 times as long, a made-up kind that is there to be searched and says nothing about any real GPU.

    python -m benchmarks.plan_scale [--jobs N] [--rate RPS]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from backend.profile import profile_folder
from sim.plan import plan
from sim.plan_grid import Grid
from sim.scenario import Cost, load_scenario
from sim.slo import parse_slo

OWN, VLLM = "h100-llama-3.1-8b", "vllm-0.24-h100-llama-3.1-8b"
SLOWER = 1.6


def made_up(folder: Path) -> str:
    """A profile folder like the shipped one with longer steps."""
    shutil.copytree(profile_folder(OWN), folder)
    file = folder / "profile.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    for regime in data["predictor"]["regimes"].values():
        regime["device"] = [SLOWER * value for value in regime["device"]]
    file.write_text(json.dumps({**data, "gpu": f"none: {OWN} with steps x{SLOWER}"}), encoding="utf-8")
    return str(folder)


def main() -> None:
    verb = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verb.add_argument("--jobs", type=int, default=2)
    verb.add_argument("--rate", type=float, default=10.0, help="requests a second (default 10: one replica will do)")
    args = verb.parse_args()
    with tempfile.TemporaryDirectory() as name:
        third = made_up(Path(name) / "made-up")
        prices = {OWN: 2.5, VLLM: 2.5, third: 1.5}
        demo = load_scenario("demo-plan")
        scenario = replace(demo, cost=Cost(prices), workload={**demo.workload, "rate_rps": args.rate})
        found = plan(
            scenario, parse_slo("ttft_p99<=1.0s, tpot_p99<=60ms"), Grid(profiles=tuple(prices), jobs=args.jobs)
        )
    part = found.parts[0].found
    print(
        f"adapters {len(found.parts[0].traffic[0].catalogue)}, GPU kinds {len(prices)} (one made up), jobs {args.jobs}"
    )
    print(f"requests/s {args.rate:g}")
    print(f"plan: {part.replicas} x {Path(part.deployment.profile).name}, max_loras {part.deployment.engine.max_loras}")
    print(f"{found.tried} trials, answered in {found.seconds:.0f} s")


if __name__ == "__main__":
    main()
