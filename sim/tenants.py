"""Per tenant: what each adapter's users lived through, what they cost, and who starved."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from sim.cost_shares import cost_shares
from sim.metrics import PERCENTILES
from sim.tables import RunTables

STARVES_FACTOR, STARVES_S = 10.0, 1.0
"""An adapter starves if its longest wait is that many times the median adapter's, and at least so many seconds."""


def tenant_table(tables: RunTables) -> pd.DataFrame:
    """One row per adapter with requests (0 = base), worst P99 TTFT first.

    Latencies in ms over all its requests, the unfinished counted at the horizon; `longest_wait_s` from arrival to first
    scheduled; `token_share`: its part of all tokens computed, prompts found in the cache left out; `cost_share`: its part
    of the busy seconds (`sim.cost_shares`); `stages` and `activations` as its loads; `starves`: see `STARVES_FACTOR`.
    """
    r = tables.requests
    first, finish = r["first_token_s"].fillna(tables.horizon_s), r["finish_s"].fillna(tables.horizon_s)
    several = r["tokens_emitted"] > 1
    columns = pd.DataFrame(
        {
            "adapter": r["adapter"],
            "ttft": (first - r["arrival_s"]) * 1e3,
            "tpot": ((finish - first) / (r["tokens_emitted"] - 1).clip(lower=1) * 1e3).where(several),
            "e2el": (finish - r["arrival_s"]) * 1e3,
            "wait_s": r["first_scheduled_s"].fillna(tables.horizon_s) - r["arrival_s"],
            "tokens": r["prompt_tokens"].where(r["first_token_s"].notna(), 0)
            - r["cached_tokens"]
            + r["tokens_emitted"],
            "finished": r["finish_s"].notna(),
        }
    )
    groups = columns.groupby("adapter")
    out = groups.agg(
        requests=("ttft", "size"),
        finished=("finished", "sum"),
        longest_wait_s=("wait_s", "max"),
        tokens=("tokens", "sum"),
    )
    for name in ("ttft", "tpot", "e2el"):
        out[f"mean_{name}_ms"] = groups[name].mean()
        for p in PERCENTILES:
            out[f"p{p}_{name}_ms"] = groups[name].quantile(p / 100)
    out["token_share"] = out.pop("tokens") / max(1, int(columns["tokens"].sum()))
    named = tables.adapters.set_index("adapter")[["name", "rank", "stages", "activations"]]
    out["cost_share"] = cost_shares(tables).reindex(out.index)
    out = out.join(named).fillna({"name": "base", "rank": 0, "stages": 0, "activations": 0})
    out = out.astype({"rank": "int64", "stages": "int64", "activations": "int64"})
    waits = out["longest_wait_s"].to_numpy()
    limit = max(STARVES_S, STARVES_FACTOR * float(np.median(waits))) if len(waits) else STARVES_S
    out["starves"] = out["longest_wait_s"] >= limit
    return out.reset_index().sort_values(["p99_ttft_ms", "adapter"], ascending=[False, True], ignore_index=True)


def tenant_lines(tenants: pd.DataFrame, most: int = 3) -> Iterator[str]:
    """In words: who starves, and the adapters whose requests waited longest. `tenants` as `tenant_table` makes it."""
    starving = int(tenants["starves"].sum())
    yield (
        f"{starving} of {len(tenants)} adapters starve (longest wait at least {STARVES_S:g} s and {STARVES_FACTOR:g} times the"
        f" median adapter's, {tenants['longest_wait_s'].median():.3f} s)"
    )
    for row in tenants.sort_values("longest_wait_s", ascending=False, kind="stable").head(most).to_dict("records"):
        yield (
            f"  {row['name']} (rank {row['rank']}): {row['requests']} requests, longest wait {row['longest_wait_s']:.3f} s, P99"
            f" TTFT {row['p99_ttft_ms']:.1f} ms, {row['activations']} loads, {row['token_share']:.1%} of the tokens"
        )
