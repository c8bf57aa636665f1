"""`python -m benchmarks.validation --data DIR`: docs/validation.md and its figures, from measured runs of real vLLM.

DIR has `vllm_h100/online/` and `real_vllm_runs/` (docs/validation.md says what they are). The shipped vLLM profile was made from the grids beside
them, never from these runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
import pandas as pd

from backend.errors import BackendError
from backend.profile import load_profile
from sim.errors import ScenarioError
from sim.published import boundary, clean, itl_errors, read_runs, shipped_costs, smape
from sim.validate import Run, Validation, validate

PROFILE = "vllm-0.24-h100-llama-3.1-8b"
RUNS = (("ml32_rate8", 32), ("ml32b_rate8", 32), ("ml8_rate8", 8), ("ml32_rate16", 32))
RUNS_FILE = Path(__file__).parent / "results" / "published_runs.csv"
DOCS = Path(__file__).parents[1] / "docs"


def markdown(table: pd.DataFrame, percent: tuple[str, ...]) -> str:
    """A table as Markdown; columns of `percent` as percentages."""

    def cell(name: str, value: object) -> str:
        if not isinstance(value, float):
            return str(value)
        if pd.isna(value):
            return "–"
        return f"{value:.1%}".replace("%", " %") if name in percent else f"{value:.4g}"

    rows = [[cell(str(name), value) for name, value in row.items()] for row in table.to_dict("records")]
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(results: list[Validation], file: Path) -> None:
    """Relative errors of every step over time, by kind, one panel a run."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(len(results), 1, figsize=(9, 2.2 * len(results)), sharex=True, constrained_layout=True)
    for result, axis in zip(results, axes, strict=True):
        if result.errors is None:
            continue
        prompts = ~result.errors["decode_only"]
        for chosen, label in ((~prompts, "decodes"), (prompts, "with prompts")):
            part = result.errors[chosen]
            axis.plot(part["t_s"], 100 * part["error"], ".", markersize=3, label=label)
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.set(title=result.name, ylabel="error, %")
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel("s since the run began")
    drawn.savefig(file, dpi=110)
    plt.close(drawn)


def document(results: list[Validation]) -> str:
    """The whole of docs/validation.md."""
    parts = [HEAD]
    for result in results:
        parts.append(f"## {result.name}\n")
        if result.steps is not None:
            shares = ("mape", "p95", "bias", "device_mape", "noise", "mape_host_fitted", "p95_host_fitted")
            parts.append(markdown(result.steps, shares) + "\n")
        parts.append(markdown(result.loop, ("blind_error", "host_fitted_error")) + "\n")
    return "\n".join([*parts, TAIL])


HEAD = """# Held against real vLLM

Everything below is printed by `python -m benchmarks.validation --data DIR`, which writes this file; for runs of your own:

```
multilora validate --trace NAME_requests.csv --steps NAME_steps.csv --max-loras 8
```

Measured: four online runs of vLLM 0.24.0 on an H100 (Llama-3.1-8B shape, 32 adapters of rank 16, Poisson arrivals, 40 s; three
machines). The shipped profile `vllm-0.24-h100-llama-3.1-8b` was made from one decode grid, one prefill grid and adapter loads at
`max_loras` 32: no step of these runs made it.

For each run, two tables. Steps: relative error of every step in which no adapter moved, by composition (`bias`: its mean;
`device_mape`: error of the GPU's part alone, over the step; `noise`: error that is left if a step is predicted by the median of its
neighbours in time of the same kind, which is the machine's own scatter; `_host_fitted`: with the host's seconds fitted to
the first 10 s of the run, on the steps after them). Closed loop: the same requests simulated, `blind` with nothing fitted,
`host_fitted` with the host's seconds of the first 10 s.

![Relative error of every step](images/validation_steps.png)
"""

TAIL = """## What is known of the errors

- The GPU's part is right to a few per cent. What was missing was that vLLM's LoRA kernels take 32 rows together, whole or not.
- Steps with prompts of more than 256 rows are bound by the host, which launches them kernel by kernel while the GPU waits: a step is
  the longer of launches and GPU. Launches of like steps differ widely within one run, in waves of seconds (`noise` above, the
  figure): no function of the composition can know that, and the first 10 s of a run do not tell its later waves.
- A decode that follows a step with prompts takes longer (the batch is set up anew); only step logs show it, so it is in the
  host-fitted columns alone.
- Which adapters vLLM reloads hangs on the order in which it walks a step's set of adapters (`engine.lora_order = "set"`): in the
  order of the requests the run with 8 slots would load far fewer (`tests/test_validate.py`).
- P99 TTFT is too short, because the scatter of the launches is not simulated, only their mean.
- `max_loras` 8 is predicted from a profile of 32: the GPU's part comes out a few per cent too long, for the grids of the LoRA
  kernels grow with `max_loras`, which one grid at 32 does not show.
- Step costs of 3 % MAPE over all steps are not reached, and P99 TTFT within 15 % is not reached on every run.
"""


STRANGERS = """## Servers of strangers

1 002 published runs of vLLM servers by other people (Agullo et al., arXiv 2508.08343), 783 of them of vLLM 0.8.5 on a 64 GB GPU that
the memory model can judge: what each start did, and what was predicted (accidents such as ports in use are left out).
"""

STEP_COSTS = """Mean ITL of the clean rows that did not make the costs, from the mean batch, rate and lengths that their servers had (the
queue is not simulated here; `smape`: mean of 2|p − m| / (p + m)):
"""

PREDICTED_RUNS = """What their clients saw: step costs come from a tenth of the clean rows (ids in `sim/published_costs.json`; each step costs a
constant, and so much a request, adapter, idle slot and prompt token), all else from the scheduler, the memory model and the
published loads. `python -m benchmarks.published_runs --data DIR/real_vllm_runs --every 14 --out
benchmarks/results/published_runs.csv` made the rows ({count} of the others, one seed, an hour simulated each); your own:

```
multilora validate --runs runs_public.csv --lengths lengths_reconstructed.csv --every 14
```

`smape`: mean of 2|p − m| / (p + m); `bias`: median of p / m − 1.
"""

NOT_YET = """## Not validated

The published runs in a closed loop (throughput, TTFT; `python -m benchmarks.published_runs` does it and takes hours): not measured where no table of
them stands above. vLLM 0.5.0, several seeds with an interval, the optimum `max_loras` and the TTFT knee of each grid: not measured.
TTFT of the clients has an HTTP server in it that is not modelled.
"""


def strangers(data: Path, results: Path) -> str:
    """The section on published runs, from DIR and from the rows that were predicted."""
    runs = read_runs(data / "real_vllm_runs" / "runs_public.csv")
    parts = [STRANGERS, markdown(boundary(runs), ()) + "\n", STEP_COSTS]
    parts.append(markdown(itl_errors(clean(runs), shipped_costs()), ("smape", "p90")) + "\n")
    if results.is_file():
        rows = pd.read_csv(results)
        parts += [PREDICTED_RUNS.format(count=len(rows)), markdown(smape(rows), ("smape", "p90", "bias")) + "\n"]
    return "\n".join([*parts, NOT_YET])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.validation", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with vllm_h100/online/ and real_vllm_runs/")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write validation.md into (default: docs)")
    args = parser.parse_args(argv)
    folder = args.data / "vllm_h100" / "online"
    try:
        profile = load_profile(PROFILE)
        runs = [Run(folder / f"{name}_requests.csv", folder / f"{name}_steps.csv", slots) for name, slots in RUNS]
        results = [validate(run, profile, rank=16) for run in runs]
        text = document(results) + "\n" + strangers(args.data, RUNS_FILE)
    except (BackendError, ScenarioError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (args.docs / "images").mkdir(parents=True, exist_ok=True)
    figure(results, args.docs / "images" / "validation_steps.png")
    (args.docs / "validation.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
