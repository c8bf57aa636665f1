"""`python -m benchmarks.validation --data DIR`: docs/validation.md and its figures, from measured runs of real vLLM.

DIR has `vllm_h100/online/` and `real_vllm_runs/` (docs/validation.md says what they are). Published runs are taken from
`benchmarks/results/published_runs.csv`, which `python -m benchmarks.published_runs` writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib as mpl
import pandas as pd

from backend.errors import BackendError
from benchmarks.live_vs_replay import measured_when
from benchmarks.markdown import markdown
from benchmarks.validation_traces import document, figure, validations
from sim.errors import ScenarioError
from sim.published import boundary, clean, read_runs, shipped, unseen
from sim.published_grids import PREDICTED, coverage, decisions, over_seeds, smape

RUNS_FILE = Path(__file__).parent / "results" / "published_runs.csv"
LIVE_FILE = Path(__file__).parent / "results" / "live_vs_replay_h100.json"
DOCS = Path(__file__).parents[1] / "docs"


STRANGERS = """## Servers of strangers

1 002 published runs of vLLM servers by other people (Agullo et al., arXiv 2508.08343), {judged} of them of vLLM 0.8.5 on a 64 GB GPU
that the memory model can judge: what each start did, and what was predicted (accidents such as ports in use are left out).
"""

PREDICTED_RUNS = """What their clients saw: {made} of {clean} clean rows (ids in `sim/published_costs.json`) and the micro-measurements
published beside them say what is known of these servers (`python -m benchmarks.published_runs --data DIR/real_vllm_runs --fit`).
{runs} of the other {others} clean rows are simulated for their whole hour, {seeds} seed(s) each: `python -m benchmarks.published_runs
--data DIR/real_vllm_runs` (`--every N`: every N-th, `--seeds`); for runs of your own:

```
multilora validate --runs runs_public.csv --lengths lengths_reconstructed.csv
```

`smape`: mean over runs of 2|p − m| / (p + m), p being the mean over seeds; `bias`: median of p / m − 1.
"""

RESIDUALS = """![Predicted over measured, every run](images/validation_runs.png)
"""

INTERVALS = """How often the measured value lies in the 95 % interval of its seeds, and how wide that is (`half_width`: median, of the value).
Seeds draw lengths and early ends anew; arrivals are the clients' own. `_with_costs`: and all steps of a run may take longer or less long
by what the fit does not know of them ({spread} of a logarithm, standard deviation: each training run's mean ITL beside what the other
training runs and the micro-measurements say of it), carried to each metric by simulating the run once more, so much slower. What the
front end costs, and that models end early, is not carried.
"""

DECISIONS = """Decisions read from the grids: for each load the best `max_loras` (throughput, and of those within 2 % of it the lowest
mean TTFT), and for each `max_loras` the most adapters whose mean TTFT is under a second, in steps of the grid.
"""

MECHANISMS = """What it took. Each shows in the data; its cause is read from vLLM's source and its users' reports, not tried on a server. Costs were
fitted to the training rows alone, but which terms there are was chosen with sight of the errors of others, too.


- The clients drew all gaps between requests from one generator of a known seed in order of wake-up: made again, the requests of an
  hour are the real ones to some per mille.
- The first request of an adapter loads a tokenizer in the API server, {first_use_ms:.0f} ms by the micro-measurements (the pause between two lone requests); meanwhile
  nothing else passes. With 384 adapters the first minute's requests wait ten seconds: that is their P99 TTFT.
- The clients read `/metrics` every two seconds. vLLM keeps a line for every pair of sets (running adapters, waiting adapters) that it
  ever saw, and writes them all: up to half a second in which no request and no token passes. Tokens of one request that wait
  meanwhile come in one chunk and count as one, so that mean ITL is up to 15 % above what the engine takes.
- The grid of the LoRA kernels spans all `max_loras` slots and all rows of the step; a step of 128 rows and more uses other tiles.
- The scheduler walks over every waiting request whose adapter finds no slot: milliseconds where thousands wait.
- Models end 1 to 6 % of the answers early.
"""

LIVE = """## Live against replay

The same scenario executed step by step on our own backend and replayed from its profile
(`python -m benchmarks.live_vs_replay demo-azure --profile {profile} --duration-s {duration_s:.0f}`, {gpu}, {date}).
`longer_steps` is how far the replay would move if every step took 1 % longer: what queues waits for all that goes before it.
`drawn_loads_p10`, `_p90`: between which it moves in eight of ten replays whose adapter loads are drawn from those measured.
`as_it_was`: what a replay is off by that has the live run's own loads and a host as fast as its was.
"""

SHARES = ("difference", "longer_steps", "drawn_loads_p10", "drawn_loads_p90", "as_it_was")
"""Its columns that are relative."""

SINCE = """The profile has been measured anew since (faster kernels or reads from disk, see CHANGELOG.md), the comparison has not.
"""

NOT_YET = """## Not validated

vLLM 0.5.0; runs whose client was the limit (`client_flag`). Median and P99 ITL of strangers' runs are not predicted. No run of real
vLLM at `max_loras` 4 or 16 is in the data: not measured.
"""


def strangers(data: Path, results: Path) -> str:
    """The section on published runs, from DIR and from the rows that were predicted."""
    runs = read_runs(data / "real_vllm_runs" / "runs_public.csv")
    known, rows, judged = shipped(), clean(runs), boundary(runs)
    parts = [STRANGERS.format(judged=int(judged["runs"].sum())), markdown(judged, ()) + "\n"]
    if results.is_file():
        table = pd.read_csv(results)
        others = len(unseen(rows, known))
        counts = {"made": len(rows) - others, "clean": len(rows), "others": others}
        counts |= {"runs": table["run_id"].nunique(), "seeds": table["seed"].nunique()}
        shares = (
            "smape", "median", "p90", "bias", "exact", "within_one",
            "inside", "half_width", "inside_with_costs", "half_width_with_costs",
        )  # fmt: skip
        parts += [PREDICTED_RUNS.format(**counts), markdown(smape(table), shares) + "\n"]
        for model, own in table.groupby("model"):
            parts += [f"{model}:\n", markdown(smape(own), shares) + "\n"]
        parts += [RESIDUALS, DECISIONS, markdown(decisions(table), shares) + "\n"]
        spread = " and ".join(f"{one.spread:.3f}" for one in known.values())
        parts.append(INTERVALS.format(spread=spread))
        intervals = coverage(table)
        parts.append(
            (markdown(intervals, shares) if len(intervals) else "Not measured: the table has one seed.") + "\n"
        )
        first_use = sum(one.front_end.first_use_s for one in known.values()) / len(known)
        parts.append(MECHANISMS.format(first_use_ms=1e3 * first_use))
    return "\n".join(parts)


def residuals(results: Path, file: Path) -> None:
    """Predicted over measured of every run, a panel a metric."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    runs = over_seeds(pd.read_csv(results))
    drawn, axes = plt.subplots(1, len(PREDICTED), figsize=(3 * len(PREDICTED), 3), constrained_layout=True)
    for name, axis in zip(PREDICTED, axes, strict=True):
        for model, own in runs.groupby("model"):
            ratio = own[f"predicted_{name}"] / own[f"measured_{name}"]
            axis.plot(own[f"measured_{name}"], ratio, ".", markersize=4, label=model)
        axis.axhline(1, color="0.5", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=name, xlabel="measured")
    axes[0].set_ylabel("predicted / measured")
    axes[0].legend(fontsize=7)
    drawn.savefig(file, dpi=110)
    plt.close(drawn)


def live_against_replay(file: Path) -> str:
    """The section on our own backend, from a measured comparison."""
    data = json.loads(file.read_text())
    parts = [LIVE.format(profile=data["profile"], duration_s=data["duration_s"], **{k: data["device"][k] for k in ("gpu", "date")})]  # fmt: skip
    if data.get("profile_measured") != measured_when(data["profile"]):
        parts.append(SINCE)
    for name in [key for key, value in data.items() if isinstance(value, dict) and "completed" in value]:
        rows = [
            {"metric": key, **value} for key, value in data[name].items() if isinstance(value, dict) and "live" in value
        ]
        parts += [f"{name}:\n", markdown(pd.DataFrame(rows).astype({"live": float, "replay": float}), SHARES) + "\n"]  # fmt: skip
        if kinds := data[name].get("by_kind"):
            parts.append(f"Mean milliseconds of a step's parts, by its kind:\n\n{markdown(pd.DataFrame(kinds), ())}\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.validation", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with vllm_h100/online/ and real_vllm_runs/")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write validation.md into (default: docs)")
    args = parser.parse_args(argv)
    folder = args.data / "vllm_h100" / "online"
    try:
        results = validations(folder)
        text = "\n".join([document(results), strangers(args.data, RUNS_FILE), live_against_replay(LIVE_FILE), NOT_YET])
    except (BackendError, ScenarioError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (args.docs / "images").mkdir(parents=True, exist_ok=True)
    figure(results, args.docs / "images" / "validation_steps.png")
    if RUNS_FILE.is_file():
        residuals(RUNS_FILE, args.docs / "images" / "validation_runs.png")
    (args.docs / "validation.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
