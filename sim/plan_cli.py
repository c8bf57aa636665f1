"""`multilora plan` on the command line: flags, the printed answer, and its directory."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from backend.profile import load_profile
from sim import run_dir
from sim.deployment import interval
from sim.errors import ScenarioError
from sim.flags import whole
from sim.panels import sheet
from sim.pareto import pareto_panel, picture, points_of
from sim.plan import Plan, plan
from sim.plan_checks import unlike_vllm, vllm_command
from sim.plan_grid import Grid
from sim.plan_search import Part
from sim.scenario import Cost, Scenario, load_scenario
from sim.slo import parse_slo

MOST_RUNNERS = 16
"""Runners-up that are printed; `plan.json` has all."""


def add_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The verb `plan`."""
    verb = verbs.add_parser("plan", help="the cheapest deployment that keeps a promise")
    verb.add_argument("scenario", help="a TOML file, or a shipped scenario")
    verb.add_argument("--slo", required=True, help='such as "ttft_p99<=1.0s, tpot_p99<=60ms"')
    verb.add_argument("--attainment", type=float, help="share of requests within all bounds at once")
    verb.add_argument("--profile", nargs="+", default=[], help="GPU kinds to choose from (default: the scenario's)")
    verb.add_argument(
        "--gpu-hour-usd", nargs="+", default=[], metavar="[PROFILE=]PRICE", help="instead of cost.gpu_hour_usd"
    )
    verb.add_argument("--max-loras", type=whole, nargs="+", default=[], help="values to try (default: powers of two)")
    verb.add_argument("--max-cpu-loras", type=whole, nargs="+", default=[], help="values to try")
    verb.add_argument("--split", type=whole, nargs="*", help="ranks to split at (default: each; none given: no split)")
    verb.add_argument("--replicas", type=whole, default=64, help="most replicas to consider (default 64)")
    verb.add_argument("--seeds", type=whole, default=3, help="seeds that are judged together (default 3)")
    verb.add_argument("--duration-s", type=float, help="seconds of arrivals, instead of the scenario's")
    verb.add_argument("--jobs", type=whole, default=-1, help="processes (default: one a core)")
    verb.add_argument("--out", type=Path, help="the directory to make (default: a new one under runs/)")


def prices(texts: list[str], scenario: Scenario) -> Scenario:
    """The scenario with `[PROFILE=]PRICE` texts for prices."""
    if not texts:
        return scenario
    given: dict[str, float] = {}
    for text in texts:
        profile, _, number = text.rpartition("=")
        try:
            price = float(number)
        except ValueError:
            price = math.nan
        if not 0 < price < math.inf:
            raise ScenarioError(f"--gpu-hour-usd {text}: must be PRICE or PROFILE=PRICE, in USD, > 0")
        given[profile] = price
    return replace(scenario, cost=Cost(given, scenario.cost.model_load_gb_s))


def with_duration(scenario: Scenario, duration_s: float | None) -> Scenario:
    """The scenario with `--duration-s`, where that was given."""
    if duration_s is None:
        return scenario
    if not 0 < duration_s < math.inf:
        raise ScenarioError(f"--duration-s is {duration_s}, must be finite and > 0")
    return replace(scenario, workload={**scenario.workload, "duration_s": duration_s})


def check_counts(flags: Mapping[str, Sequence[int]], jobs: int) -> None:
    """Raise `ScenarioError` for a count below 1, and for no processes at all."""
    for flag, values in flags.items():
        if any(value < 1 for value in values):
            raise ScenarioError(f"{flag} is {min(values)}, must be >= 1")
    if jobs == 0:
        raise ScenarioError("--jobs is 0, must be a number of processes, or -1 for one a core")


def run(args: argparse.Namespace) -> None:
    """Carry out the verb."""
    promise = parse_slo(args.slo, args.attainment)
    scenario = with_duration(prices(args.gpu_hour_usd, load_scenario(args.scenario)), args.duration_s)
    counts = {"--max-loras": args.max_loras, "--max-cpu-loras": args.max_cpu_loras, "--replicas": [args.replicas]}
    check_counts({**counts, "--seeds": [args.seeds]}, args.jobs)
    out = run_dir.choose(f"plan-{scenario.name}", args.out)
    grid = Grid(
        tuple(args.profile), tuple(args.max_loras), tuple(args.max_cpu_loras),
        None if args.split is None else tuple(args.split), most_replicas=args.replicas, seeds=args.seeds, jobs=args.jobs,
    )  # fmt: skip
    answer = plan(scenario, promise, grid)
    lines = list(text(answer))
    run_dir.publish(out, lambda folder: write(folder, answer, lines))
    print("\n".join(lines))
    print(f"answered in {answer.seconds:.0f} s", file=sys.stderr)
    print(out)


def write(folder: Path, answer: Plan, lines: list[str]) -> None:
    """`plan.txt`, and `plan.json` with the same figures."""
    (folder / "plan.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = json.dumps(as_data(answer), indent=1, allow_nan=False)
    (folder / "plan.json").write_text(data + "\n", encoding="utf-8")
    points, caption = points_of(as_data(answer)), f"{answer.cost:.2f} {unit(answer)} keeps {answer.promise}"
    sheet([pareto_panel(points, unit(answer))], caption, [folder / f"pareto.{kind}" for kind in ("png", "svg")], 1)


def as_data(answer: Plan) -> dict[str, Any]:
    """What `plan.json` holds."""
    return {
        "promise": str(answer.promise),
        "cost_per_hour": answer.cost,
        "unit": unit(answer),
        "parts": [
            {
                "adapters": part.name, **asdict(part.found.deployment), "rate_rps_per_replica": rate[0],
                "rate_half_interval": None if math.isnan(rate[1]) else rate[1], "values_s": trial.values,
                "attained": trial.attained, "p99_ttft_s": trial.facts["p99_ttft_s"], "vllm": vllm_command(part.found.deployment),
            }
            for part, rate, trial in zip(answer.parts, answer.rates, answer.trials, strict=True)
        ],
        "headroom": answer.headroom, "relief": answer.binds, "notes": answer.notes,
        "runners_up": [
            {
                "change": r.change, "cost_per_hour": r.cost, "kept": r.trial.kept, "attained": r.trial.attained,
                "values_s": r.trial.values, "p99_ttft_s": r.p99_ttft_s,
            }
            for r in answer.runners
        ],
    }  # fmt: skip


def unit(answer: Plan) -> str:
    """What costs are counted in."""
    return "USD/h" if answer.priced else "GPUs"


def text(answer: Plan) -> Iterator[str]:
    """The printed answer."""
    yield f"promise   {answer.promise}"
    yield f"plan      {answer.cost:.2f} {unit(answer)} for {_rate(answer):.2f} req/s"
    for part, rate, trial in zip(answer.parts, answer.rates, answer.trials, strict=True):
        d = part.found.deployment
        fleet = f", router {d.fleet.router}, placement {d.fleet.placement}" if d.replicas > 1 else ""
        yield (
            f"  {part.name}: {d.replicas} x {d.profile}, max_loras {d.engine.max_loras}, max_cpu_loras"
            f" {d.engine.host_loras}, max_lora_rank {d.engine.max_lora_rank}{fleet}"
        )
        for name, value in trial.values.items():
            mean, half = interval([one[name] for one in trial.by_seed])
            yield f"    {name:10} {1e3 * value:9.1f} ms over all seeds; by seed {1e3 * mean:.1f} {_half(1e3 * half, '.1f')} ms"
        yield (
            f"    within every bound: {trial.attained:.2%} of the requests; sustains {rate[0]:.2f} {_half(rate[1], '.2f')}"
            f" req/s per replica, has {part.traffic[0].rate_rps / d.replicas:.2f}"
        )
        if d.replicas > 1:
            yield f"    an adapter was loaded by {trial.facts['homes']:.1f} of {d.replicas} replicas on average"
        yield f"    {_profile(part, trial.facts['extrapolated_share'])}"
    yield from _money(answer)
    yield "binds     " + _binds(answer)
    yield "headroom  " + "; ".join(f"{case}: {_said(kept)}" for case, kept in answer.headroom.items())
    yield from _runners(answer)
    yield from picture(points_of(as_data(answer)), unit(answer))
    for part in answer.parts:
        yield f"vllm      {vllm_command(part.found.deployment)}"
        if unlike := unlike_vllm(part.found.deployment.engine):
            yield f"          no vLLM flag for {', '.join(unlike)}"
    for note in answer.notes:
        yield f"note      {note}"
    yield f"tried     {answer.tried} trials of {len(answer.parts[0].traffic)} seeds"


def _half(half: float, form: str) -> str:
    return "(one seed: no interval)" if math.isnan(half) else f"± {half:{form}}"


def _rate(answer: Plan) -> float:
    return sum(part.traffic[0].rate_rps for part in answer.parts)


def _profile(part: Part, outside: float) -> str:
    accuracy = load_profile(part.found.deployment.profile).accuracy
    return (
        f"profile: MAPE {accuracy['mape']:.1%}, p95 {accuracy['p95']:.1%} on held-out steps; {outside:.1%} of the steps lie"
        " outside what was measured"
    )


def _money(answer: Plan) -> Iterator[str]:
    requests = [part.traffic[0].requests for part in answer.parts]
    length_s = max(1e-9, max(float(r.arrival_s[-1]) for r in requests) - min(float(r.arrival_s[0]) for r in requests))
    tokens = sum(int(r.prompt_tokens.sum() + r.output_tokens.sum()) for r in requests) / length_s * 3600 / 1e6
    outputs = sum(int(r.output_tokens.sum()) for r in requests) / length_s * 3600 / 1e6
    tenants = sum(len(part.traffic[0].catalogue) for part in answer.parts)
    name = "USD" if answer.priced else "GPU hours"
    yield (
        f"cost      {answer.cost / tokens:.4g} {name} per million tokens ({answer.cost / outputs:.4g} per million output"
        f" tokens), {answer.cost / max(1, tenants):.4g} {name} per hour and adapter ({tenants})"
    )
    if not answer.priced:
        yield "          no price given: --gpu-hour-usd or cost.gpu_hour_usd"


def _binds(answer: Plan) -> str:
    order = sorted(answer.binds.items(), key=lambda item: -item[1])
    meaning = {
        "KV": "KV blocks x2", "compute": "steps x0.8", "loads": "free host-to-slot loads",
        "host cache": "free disk loads", "slots": "a slot for every adapter",
    }  # fmt: skip
    name, gain = order[0]
    first = name if gain > 0 else "nothing that was relieved"
    said = ", ".join(f"{meaning[key]} {gain:+.2%}" for key, gain in order)
    return f"{first} (10 % above the sustainable rate, requests within bounds with {said})"


def _said(kept: bool | None) -> str:
    return "nothing left" if kept is None else "kept" if kept else "broken"


def _runners(answer: Plan) -> Iterator[str]:
    names = list(answer.trials[0].values)
    yield f"{'runners-up (the plan with one thing changed)':63}" + "".join(f"{n + ' ms':>14}" for n in names)
    for r in answer.runners[:MOST_RUNNERS]:
        values = "".join(f"{1e3 * r.trial.values[n]:14.1f}" for n in names)
        yield f"  {r.change:34}{r.cost:8.2f} {unit(answer):6}{'kept' if r.trial.kept else 'broken':>12}{values}"
