"""`python -m benchmarks.replay --requests N`: how fast a profile is replayed, and how that grows.

Prints requests a second, simulated seconds a second and the peak of memory of a ServeGen workload (real clients, each with an
adapter of its own) or a synthetic one; every run in a process of its own, on one core, with a summary of full per-request
percentiles. `--grow` measures 10^4 to 10^6 requests, 10 to 10 000 adapters, 1 to 64 replicas, batch sizes and output lengths.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from sim.scenario import load_scenario
from workloads.build import build_workload

HOURS_S = 7200.0
"""How long the shipped ServeGen sample is: longer workloads are the same hours again, each time with requests drawn anew."""


def servegen(requests: int, folder: Path) -> dict[str, object]:
    """The clients of `demo-servegen` at its rates, as a table of `requests` requests in `folder`."""
    demo = load_scenario("demo-servegen")
    parts: list[pd.DataFrame] = []
    while sum(map(len, parts)) < requests:
        workload = {**demo.workload, "duration_s": HOURS_S}
        drawn = build_workload(workload, adapter_count=None, seed=len(parts), base_dir=Path())
        r, names = drawn.requests, np.array(["", *drawn.adapter_names], dtype=object)
        parts.append(pd.DataFrame({
            "arrival_s": r.arrival_s + len(parts) * HOURS_S, "prompt_tokens": r.prompt_tokens,
            "output_tokens": r.output_tokens, "adapter": names[r.adapter],
        }))  # fmt: skip
    file = folder / f"servegen-{requests}.parquet"
    pd.concat(parts, ignore_index=True).iloc[:requests].to_parquet(file, index=False)
    tables = demo.resolved()
    return {k: tables[k] for k in ("model", "engine", "adapters", "backend")} | {
        "workload": {"kind": "table", "path": str(file)}
    }


def synthetic(requests: int, adapters: int, replicas: int, seqs: int = 128, output: int = 150) -> dict[str, object]:
    """Poisson arrivals whose rate goes with `max_num_seqs` and the inverse of the output length; a real batch, no overload."""
    rate = 20.0 * replicas * (seqs / 128) * (150 / output)
    fleet = {"replicas": replicas, "router": "least_outstanding"} if replicas > 1 else {}
    return {
        "model": {"geometry": "llama-3.1-8b"},
        "engine": {
            "max_loras": 128, "max_cpu_loras": max(128, adapters), "max_lora_rank": 16, "max_model_len": 16384,
            "max_num_seqs": seqs,
        },
        "adapters": {"count": adapters, "rank": 16},
        "workload": {
            "kind": "synthetic", "rate_rps": rate, "duration_s": requests / rate,
            "prompt": {"kind": "lognormal", "median": 200, "sigma": 0.8, "max": 4000},
            "output": {"kind": "lognormal", "median": output, "sigma": 0.5, "max": 4 * output},
            "popularity": {"kind": "zipf", "s": 1.0},
        },
        "backend": {"kind": "profile", "profile": "h100-llama-3.1-8b"},
        "fleet": fleet,
    }  # fmt: skip


def measure(tables: dict[str, object], *, step_rows: bool) -> dict[str, object]:
    """One run here and now: what it took, and what it came to."""
    from sim.run import execute
    from sim.scenario import from_tables

    scenario = from_tables({**tables, "run": {"step_rows": step_rows}}, "replay", Path())
    started = time.perf_counter()
    result, summary, _ = execute(scenario, on_rows=(lambda *_: None) if step_rows and scenario.fleet.single else None)
    seconds = time.perf_counter() - started
    return {
        "requests": len(result.requests), "steps": summary["steps"], "seconds": seconds,
        "requests_per_s": len(result.requests) / seconds, "simulated_s_per_s": result.horizon_s / seconds,
        "peak_mib": _peak_mib(), "mean_running": sum(t.running for t in result.totals) / max(1, int(str(summary["steps"]))),
        "p99_ttft_ms": summary["p99_ttft_ms"], "p99_tpot_ms": summary["p99_tpot_ms"],
    }  # fmt: skip


def _peak_mib() -> float:
    """The most memory this process had; `ru_maxrss` would begin with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def elsewhere(tables: dict[str, object], *, step_rows: bool = False) -> dict[str, object]:
    """`measure` in a process of its own, whose memory is no other's."""
    code = "import json, sys; from benchmarks.replay import measure; t, r = json.load(sys.stdin);"
    code += " print(json.dumps(measure(t, step_rows=r)))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps([tables, step_rows]), capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def start_up(folder: Path, runs: int = 5) -> float:
    """Seconds of `multilora run` on a trace of 100 requests, from a cold process to its exit: the median of `runs`."""
    rows = [f"{i * 0.1:.1f},{100 + i},{20 + i},adapter-{i % 8}" for i in range(100)]
    (folder / "trace.csv").write_text("arrival_s,prompt_tokens,output_tokens,adapter\n" + "\n".join(rows) + "\n")
    (folder / "trace.toml").write_text(
        '[model]\ngeometry = "llama-3.1-8b"\n[engine]\nmax_loras = 4\n[workload]\nkind = "table"\npath = "trace.csv"\n'
        '[backend]\nkind = "profile"\nprofile = "h100-llama-3.1-8b"\n'
    )
    times = []
    for i in range(runs):
        started = time.perf_counter()
        command = [sys.executable, "-m", "sim.cli", "run", str(folder / "trace.toml"), "--out", str(folder / str(i))]
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return sorted(times)[runs // 2]


def price(folder: Path) -> str:
    """What the compiled loop costs: seconds to compile, KiB on disk, and milliseconds to import; or why it is not compiled: that needs pybind11
    and setuptools, which pip fetches for a build and leaves nowhere.
    """
    root = Path(__file__).parents[1]
    started = time.perf_counter()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    built = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if built.returncode:
        return f"not compiled here: {(built.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    compiled_s = time.perf_counter() - started
    size = sum(file.stat().st_size for file in (folder / "sim").glob("_native*"))
    code = "import time, numpy; t = time.perf_counter(); from sim import _native; print(time.perf_counter() - t)"
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return f"compiled in {compiled_s:.0f} s, {size / 1024:.0f} KiB, imported in {1e3 * float(imported):.1f} ms"


def growth(folder: Path) -> list[dict[str, object]]:
    """Rows of all that may grow."""
    rows = []
    cases: list[tuple[str, object, dict[str, object], bool]] = []
    for n in (10**4, 10**5, 10**6):
        cases.append(("requests", n, servegen(n, folder), False))
        cases.append(("requests, with step rows", n, servegen(n, folder), True))
    cases += [("adapters", a, synthetic(50_000, a, 1), False) for a in (10, 100, 1000, 10_000)]
    cases += [("replicas", r, synthetic(100_000, 100, r), False) for r in (1, 8, 64)]
    cases += [("max_num_seqs", s, synthetic(50_000, 100, 1, seqs=s), False) for s in (32, 128, 512)]
    cases += [("median output_tokens", o, synthetic(50_000, 100, 1, output=o), False) for o in (50, 150, 450, 1350)]
    for kind, value, tables, step_rows in cases:
        rows.append({"grows": kind, "value": value, **elsewhere(tables, step_rows=step_rows)})
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, object]) -> str:
    shown = {
        k: row[k]
        for k in ("requests", "steps", "seconds", "requests_per_s", "simulated_s_per_s", "peak_mib", "mean_running")
    }
    numbers = ", ".join(
        f"{k} {float(str(v)):,.0f}" if float(str(v)) >= 10 else f"{k} {float(str(v)):.2f}" for k, v in shown.items()
    )
    return f"{row.get('grows', 'servegen')} {row.get('value', '')}: {numbers}"


def exponent(rows: list[dict[str, object]]) -> float:
    """Of seconds over requests, from the least to the most."""
    few, many = rows[0], rows[-1]
    ratio = float(str(many["requests"])) / float(str(few["requests"]))
    return math.log(float(str(many["seconds"])) / float(str(few["seconds"]))) / math.log(ratio)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000, help="about how many (default 100000)")
    parser.add_argument("--step-rows", action="store_true", help="make a row a step, too")
    parser.add_argument("--grow", action="store_true", help="everything that may grow, too (minutes)")
    parser.add_argument("--out", type=Path, help="write the rows of --grow to this CSV file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(_line(elsewhere(servegen(args.requests, folder), step_rows=args.step_rows)))
        print(f"multilora run, 100 requests, from a cold process: {start_up(folder):.2f} s")
        if args.grow:
            print(f"the compiled loop: {price(folder)}")
            rows = growth(folder)
            of = [row for row in rows if row["grows"] == "requests"]
            print(f"seconds grow as requests to the power of {exponent(of[1:]):.3f} (10^5 to 10^6)")
            machine = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "cpu": cpu()}
            if args.out:
                table = pd.DataFrame([row | machine for row in rows])
                table.to_csv(args.out, index=False, float_format="%.6g", lineterminator="\n")
    return 0


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    raise SystemExit(main())
