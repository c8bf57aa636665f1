"""The part of docs/validation.md on single runs whose requests were logged: their steps, and the same requests in a closed loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd

from backend.online import online_runs
from backend.profile import load_profile
from benchmarks.host_waves import levels
from benchmarks.markdown import markdown
from sim.validate import SEEDS, Run, Validation, validate

PROFILE = "vllm-0.24-h100-llama-3.1-8b"
RUNS = (("ml32_rate8", 32), ("ml32b_rate8", 32), ("ml8_rate8", 8), ("ml32_rate16", 32))
BARS = {
    "output_throughput": 0.03,
    "mean_ttft_ms": 0.10,
    "p99_ttft_ms": 0.15,
    "mean_tpot_ms": 0.03,
    "p99_tpot_ms": 0.06,
}
"""What is aimed at with the host fitted to the first 10 s: relative error of each metric."""


def validations(folder: Path) -> list[Validation]:
    """Each run of `folder`, predicted from the profile made without it."""
    profile = load_profile(PROFILE)
    runs = [Run(folder / f"{name}_requests.csv", folder / f"{name}_steps.csv", slots) for name, slots in RUNS]
    return [validate(run, profile, rank=16, runs=online_runs(PROFILE, profile)) for run in runs]


def figure(results: Sequence[Validation], file: Path) -> None:
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


def bars(results: Sequence[Validation]) -> pd.DataFrame:
    """Errors of the metrics that are aimed at, and whether what was measured lies in the simulated intervals."""
    rows = []
    for result in results:
        loop = result.loop.set_index("metric")
        for metric, bar in BARS.items():
            one = loop.loc[metric]
            row: dict[str, object] = {"run": result.name, "metric": metric, "aim": bar}
            for name in ("blind", "host_fitted"):
                low, high = (one[f"{name}_{end}"] / one["measured"] - 1.0 for end in ("low", "high"))
                row |= {name: one[f"{name}_error"], f"{name}_95": f"{100 * low:+.0f} to {100 * high:+.0f} %"}
            rows.append({**row, "host_known": one["host_known_error"]})
    return pd.DataFrame(rows)


def inside(results: Sequence[Validation]) -> pd.DataFrame:
    """How often what was measured lies in the simulated 95 % interval, over all runs: of the metrics aimed at, and of all latencies."""
    rows = []
    for name in ("blind", "host_fitted"):
        row: dict[str, object] = {"simulated": name}
        for label, wanted in (("of those aimed at", list(BARS)), ("of all", None)):
            hits = []
            for result in results:
                loop = result.loop.set_index("metric").loc[:"p99_e2e_ms"]
                loop = loop if wanted is None else loop.loc[wanted]
                hits += (
                    (loop["measured"] >= loop[f"{name}_low"]) & (loop["measured"] <= loop[f"{name}_high"])
                ).tolist()
            row[label] = f"{sum(hits)} of {len(hits)}"
        rows.append(row)
    return pd.DataFrame(rows)


def document(results: Sequence[Validation]) -> str:
    """The section."""
    shares = ("aim", "blind", "host_fitted", "host_known")
    parts = [HEAD.format(seeds=SEEDS), markdown(bars(results), shares) + "\n"]
    parts += [INSIDE, markdown(inside(results), ()) + "\n", FOUND]
    runs = online_runs(PROFILE, load_profile(PROFILE))
    if runs is not None:
        table, spread = levels(runs)
        lie = {"windows": spread.windows, "slow": spread.expected(1.3, 10.0), "fast": spread.expected(0.9, 10.0)}
        parts += [WAVES.format(**lie), markdown(table.round(2), ()) + "\n"]
    parts.append(RUN_BY_RUN)
    for result in results:
        parts.append(f"### {result.name}\n")
        if result.steps is not None:
            errors = ("mape", "p95", "bias", "device_mape", "best", "noise", "mape_host_fitted", "p95_host_fitted")
            parts.append(markdown(result.steps, errors) + "\n")
        told = ["metric", "measured"]
        told += [f"{name}{end}" for name in ("blind", "host_fitted", "host_known") for end in ("", "_error")]
        parts.append(markdown(result.loop[told], tuple(name for name in told if name.endswith("_error"))) + "\n")
    return "\n".join(parts)


HEAD = """# Held against real vLLM

Everything below is printed by `python -m benchmarks.validation --data DIR`, which writes this file; for runs of your own:

```
multilora validate --trace NAME_requests.csv --steps NAME_steps.csv --max-loras 8
```

Measured: four online runs of vLLM 0.24.0 on an H100 (Llama-3.1-8B shape, 32 adapters of rank 16, Poisson arrivals, 40 s; three
machines: `ml32_rate8` and `ml32_rate16` ran on the same one). The shipped profile `vllm-0.24-h100-llama-3.1-8b` has the GPU's part from
one decode grid and one prefill grid at `max_loras` 32, and the host's part from these four runs. **Each run is predicted from a profile
made without it**: `validate` finds out by the steps themselves that a run is among those of the profile, and leaves it out.

`blind`: nothing of the run is known but that it is like one of six runs reported of such machines, or unlike all (`backend/host_spread.py`).
`host_fitted`: the host's seconds of the first 10 s of its step log are known, too: which level the run is then likely to have follows from
what 10 s of one run differ from its rest by. Both draw how the host's speed goes from the other runs, {seeds} seeds; the
figure is their median, `_95` holds 95 % of them. `host_known` is no prediction: the host is as fast at
every time as the run's log says, so that its error is that of everything else: GPU, scheduler, adapter moves.
"""

INSIDE = """How often what was measured lies in the interval (throughput, and mean, P50, P90 and P99 of TTFT, TPOT and E2E):
"""

FOUND = """## What is known of the errors

- **The host's speed goes in waves.** One thread launches every kernel, on a virtual machine. Launches of steps with prompts are fast for
  some seconds, then slow, then as before, whatever is in the step; what decodes take of the host rises and falls with them.
  Nothing grows over a run (the table below). Their cause (neighbours on the machine's cores?) was not measured.
- Step costs of 3 % MAPE, p95 10 %, over all steps are not reached, blind or fitted. A function of the composition cannot: see what the best
  factor for each composition, found with sight of the run itself, leaves (`best`); `noise` is what is left if each step
  is predicted by its nearest steps of the same kind in time.
- With the speed given (`host_known`) every aim of the closed loop is met. Without it, the errors left are what waves did after the
  first 10 s: levels of 10 s of one run lie further apart than those of these whole runs, or of five of the six that are reported of such
  machines (`backend.host_spread.RUN_LAUNCH_MS`); the sixth was a third slower. So a beginning near the middle says little, and a very slow
  one that the run is slow.
- The prefill grid seems to have been measured in a slow wave: its launches take longer than live ones do on average, while decodes of a
  grid, one batch repeated, take less of the host than live ones. So the host comes from live runs, as a factor on the grid's shape: a
  coefficient for each term, fitted to 10 s, took waves for compositions.
- A decode that follows a step with prompts takes longer (the batch is set up anew), and between two steps pass moments that no step's
  log counts.
- From 128 rows on an adapter costs less, as vLLM's kernels split their sums less often there; both costs are fitted to the grid.
- Of steps that the GPU bounds a grid of 256 and 8192 rows says little between; where live runs waited for the GPU they say what it takes.
- Scatter makes P99s: mean launches alone leave P99 TTFT short. One machine (`ml32b`) has single long launches that the others lack: its
  P99 TTFT stays short.
- Which adapters vLLM reloads hangs on the order in which it walks a step's set of adapters (`engine.lora_order = "set"`): in the
  order of the requests the run with 8 slots would load far fewer (`tests/test_validate.py`). Its requests queue for slots: which wait
  is decided anew by every step's time, so TTFT differs by tens of per cent between seeds.
- `max_loras` 8 is predicted from grids of 32: the grids of the LoRA kernels span all slots, and what a slot costs was measured
  on the kernels alone (`python -m benchmarks.slot_tiles`), never on these runs.
"""

WAVES = """The level of each run's host, measured over what a profile made from the other runs predicts, and how alike (correlation) the ratios of two
steps are by the seconds between them. Levels of 10 s lie {windows:.3f} of a logarithm from their run's (standard deviation):
of a run whose first 10 s are at 1.3 a level of {slow:.2f} is expected, of one at 0.9 {fast:.2f} (`backend.host_spread`).
"""

RUN_BY_RUN = """## Run by run

Steps: relative error of every step in which no adapter moved, by composition (`bias`: its mean; `device_mape`: error of the GPU's part
alone, over the step; `best`, `noise`: see above; `_host_fitted`: on the steps after the first 10 s).

![Relative error of every step](images/validation_steps.png)
"""
