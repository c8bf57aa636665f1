"""The sentence a planner wants from a sweep: which value is best, and what missing it by a factor of two costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

THROUGHPUT, TTFT, TPOT = "censored_output_throughput", "censored_p99_ttft_ms", "censored_p99_tpot_ms"
SLO_COLUMNS = {"p99_ttft_ms": TTFT, "p99_tpot_ms": TPOT}
"""What each key of `[slo]` is held against: all requests count, also those unfinished at the end."""


def swept_key(keys: Sequence[str], results: pd.DataFrame) -> str | None:
    """The setting to choose: `engine.max_loras` if it is swept, else the first with numbers; None if there is none."""
    numeric = [key for key in keys if pd.api.types.is_numeric_dtype(results[key]) and len(results[key].unique()) > 1]
    return "engine.max_loras" if "engine.max_loras" in numeric else next(iter(numeric), None)


def verdicts(results: pd.DataFrame, keys: Sequence[str], slo: Mapping[str, float]) -> list[str]:
    """One sentence for each combination of the other settings; means over seeds. Empty if nothing numeric is swept."""
    key = swept_key(keys, results)
    if key is None:
        return []
    others = [other for other in keys if other != key]
    served = results[results["status"] == "ok"]
    if not others:
        return [_verdict(served, key, slo)]
    sentences = []
    for values, group in served.groupby(others, sort=False):
        where = ", ".join(f"{other} = {value}" for other, value in zip(others, values, strict=True))
        sentences.append(f"{where}: {_verdict(group, key, slo)}")
    return sentences


def _verdict(served: pd.DataFrame, key: str, slo: Mapping[str, float]) -> str:
    means = served.groupby(key)[[THROUGHPUT, TTFT, TPOT]].mean().sort_index()
    meets = pd.Series(data=True, index=means.index)
    for name, limit in slo.items():
        meets &= means[SLO_COLUMNS[name]] <= limit
    promise = " and ".join(f"{name} <= {limit:g}" for name, limit in slo.items())
    if slo and not meets.any():
        best = float(means[TTFT].idxmin())  # type: ignore[arg-type]
        return f"no {key} keeps {promise}; the lowest P99 TTFT has {_facts(key, best, means)}"
    kept = means[meets]
    # Where throughput is as good as equal, waiting decides: real servers lose minutes of TTFT within 2 % of throughput.
    near = kept[kept[THROUGHPUT] >= 0.98 * kept[THROUGHPUT].max()]
    best = float(near[TTFT].idxmin())
    within = f" under {promise}" if slo else ""
    return f"best{within}: {_facts(key, best, means)}.{_missed(key, best, means)}"


def _facts(key: str, value: float, means: pd.DataFrame) -> str:
    row = means.loc[value]
    return f"{key} = {value:g} with {row[THROUGHPUT]:.0f} output tok/s, P99 TTFT {row[TTFT]:.0f} ms, P99 TPOT {row[TPOT]:.1f} ms"


def _missed(key: str, best: float, means: pd.DataFrame) -> str:
    """What half and twice the best value give, or the values of the grid that are next beyond; and what nobody tried."""
    text = ""
    for word, beyond, candidates in (
        ("half", means.index[means.index < best], means.index[means.index <= best / 2][::-1]),
        ("twice", means.index[means.index > best][::-1], means.index[means.index >= best * 2]),
    ):
        if len(candidates):
            text += f" About {word} of it: {_facts(key, candidates[0], means)}."
        elif len(beyond):
            text += (
                f" {word.capitalize()} of it was not served; the furthest that way: {_facts(key, beyond[0], means)}."
            )
        else:
            text += f" {word.capitalize()} of it was not tried."
    return text
