"""What a run amounts to. Every key is defined in docs/metrics.md."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sim.tables import RunTables

FloatArray = npt.NDArray[np.float64]
PERCENTILES = (50, 90, 99)


def latencies(tables: RunTables, *, censored: bool) -> dict[str, FloatArray]:
    """TTFT, TPOT and E2E in ms: of finished requests, or of all with the unfinished counted at the horizon."""
    r = tables.requests
    chosen = r if censored else r[r["status"] == "finished"]
    first = chosen["first_token_s"].fillna(tables.horizon_s)
    finish = chosen["finish_s"].fillna(tables.horizon_s)
    arrival = chosen["arrival_s"]
    several = (chosen["tokens_emitted"] > 1).to_numpy()
    tpot = ((finish - first) / (chosen["tokens_emitted"] - 1).clip(lower=1)).to_numpy()[several]
    return {"ttft": (first - arrival).to_numpy() * 1e3, "tpot": tpot * 1e3, "e2el": (finish - arrival).to_numpy() * 1e3}


def _statistics(values: dict[str, FloatArray], prefix: str) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for name, column in values.items():
        empty = len(column) == 0
        out[f"{prefix}mean_{name}_ms"] = None if empty else float(column.mean())
        for p in PERCENTILES:
            out[f"{prefix}p{p}_{name}_ms"] = None if empty else float(np.percentile(column, p))
    return out


def jain(values: FloatArray) -> float | None:
    """Jain's fairness index: 1 if all are equal, 1/n if one has everything."""
    total = float((values**2).sum())
    return float(values.sum()) ** 2 / (len(values) * total) if total > 0 else None


def summarise(tables: RunTables) -> dict[str, float | int | None]:
    """The run in one flat dictionary; `vllm bench serve`'s keys where it has one."""
    r, a = tables.requests, tables.adapters
    totals = [engine for engine in tables.totals if engine.steps]
    steps = sum(engine.steps for engine in totals)
    busy_s = sum(engine.busy_s for engine in totals)
    finished = r[r["status"] == "finished"]
    duration = max(tables.horizon_s, 1e-9)
    output = int(finished["tokens_emitted"].sum())
    inputs = int(finished["prompt_tokens"].sum())
    uses = int(a["step_uses"].sum())
    scheduled = r[r["first_scheduled_s"].notna()]
    prompts = int(scheduled["prompt_tokens"].sum())
    waits = r["first_scheduled_s"].fillna(tables.horizon_s) - r["arrival_s"]
    mean_wait = waits.groupby(r["adapter"]).mean().to_numpy()
    return {
        "duration_s": tables.horizon_s,
        "requests": len(r),
        "completed": len(finished),
        "running": int((r["status"] == "running").sum()),
        "waiting": int((r["status"] == "waiting").sum()),
        "total_input_tokens": inputs,
        "total_output_tokens": output,
        "request_throughput": len(finished) / duration,
        "output_throughput": output / duration,
        "total_token_throughput": (inputs + output) / duration,
        "censored_output_throughput": int(r["tokens_emitted"].sum()) / duration,
        **_statistics(latencies(tables, censored=False), ""),
        **_statistics(latencies(tables, censored=True), "censored_"),
        "adapter_hit_rate": float(a["hits"].sum()) / uses if uses else None,
        "adapter_stages": int(a["stages"].sum()),
        "adapter_activations": int(a["activations"].sum()),
        "adapter_evictions": int(a["evictions"].sum()),
        "preemptions": int(r["preemptions"].sum()),
        "prefix_cache_hit_rate": float(scheduled["cached_tokens"].sum() / prompts) if prompts else None,
        "mean_kv_usage": sum(engine.usage_s for engine in totals) / busy_s if busy_s > 0 else None,
        "max_kv_usage": max((engine.max_usage for engine in totals), default=None),
        "longest_wait_s": float(waits.max()) if len(r) else None,
        "jain_wait": jain(1.0 / (1e-3 + mean_wait)) if len(r) else None,
        "steps": steps,
        "load_share": sum(engine.load_s for engine in totals) / duration / max(1, len(totals)),
        "extrapolated_share": sum(engine.extrapolated for engine in totals) / steps if steps else None,
    }
