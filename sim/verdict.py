"""The sentence a planner wants from a sweep: which value is best, and what missing it by a factor of two costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

THROUGHPUT, TTFT, TPOT = "censored_output_throughput", "censored_p99_ttft_ms", "censored_p99_tpot_ms"
SLO_COLUMNS = {"p99_ttft_ms": TTFT, "p99_tpot_ms": TPOT}
"""What each key of `[slo]` is held against: all requests count, also those unfinished at the end."""


def swept_key(keys: Sequence[str], results: pd.DataFrame) -> str | None:
    """The setting to choose: `engine.max_loras` if it is swept, else the first with numbers; None if there is none."""
    numeric = [key for key in keys if pd.api.types.is_numeric_dtype(results[key]) and len(results[key].unique()) > 1]
    return "engine.max_loras" if "engine.max_loras" in numeric else next(iter(numeric), None)


def verdicts(results: pd.DataFrame, keys: Sequence[str], slo: Mapping[str, float]) -> list[str]:
    """One sentence for each combination of the other settings that vary; means over seeds. Empty if nothing numeric is swept."""
    key = swept_key(keys, results)
    if key is None:
        return []
    others = [other for other in keys if other != key and len(results[other].unique()) > 1]
    if not others:
        return [_verdict(results, key, slo)]
    sentences = []
    for values, group in results.groupby(others, sort=False):
        where = ", ".join(f"{other} = {value}" for other, value in zip(others, values, strict=True))
        sentences.append(f"{where}: {_verdict(group, key, slo)}")
    return sentences


def _verdict(results: pd.DataFrame, key: str, slo: Mapping[str, float]) -> str:
    ok = results["status"] == "ok"
    # A value that one seed was refused at is no value to choose.
    refused = sorted(results.loc[~ok, key].unique())
    served = results[ok & ~results[key].isin(refused)]
    if served.empty:
        return f"no {key} can be served: {results.loc[~ok, 'error'].iloc[0]}"
    runs = served.assign(**{name: served[name].astype(float) for name in (THROUGHPUT, TTFT, TPOT)}).groupby(key)
    means = runs[[THROUGHPUT, TTFT, TPOT]].mean().sort_index()
    kept = _keeping(means, slo)
    promise = " and ".join(f"{name} <= {limit:g}" for name, limit in slo.items())
    if kept.empty:
        best = float(means[TTFT].idxmin())  # type: ignore[arg-type]
        return f"no {key} keeps {promise}; the lowest P99 TTFT has {key} = {best:g} with {_facts(_row(means, best))}"
    # Where throughput is as good as equal, waiting decides: real servers lose minutes of TTFT within 2 % of throughput.
    near = kept[kept[THROUGHPUT] >= 0.98 * kept[THROUGHPUT].max()]
    best = float(near[TTFT].idxmin())
    spread = _spread(runs.get_group(best)[TTFT])
    said = f"best{f' under {promise}' if slo else ''}: {key} = {best:g} with {_facts(_row(means, best), spread)}."
    return said + "".join(_missed(word, best, means, refused, slo) for word in ("half", "twice"))


def _keeping(means: pd.DataFrame, slo: Mapping[str, float]) -> pd.DataFrame:
    """The values that keep every promise; one without a second token anywhere keeps any about TPOT."""
    kept = means
    for name, limit in slo.items():
        kept = kept[~(kept[SLO_COLUMNS[name]] > limit)]
    return kept


def _spread(values: pd.Series[float]) -> str:
    """The range over seeds, in brackets."""
    return f" ({values.min():.0f} to {values.max():.0f} over {len(values)} seeds)" if len(values) > 1 else ""


def _facts(row: pd.Series[float], spread: str = "") -> str:
    tpot = "" if math.isnan(row[TPOT]) else f", P99 TPOT {row[TPOT]:.1f} ms"
    rate = f"{row[THROUGHPUT]:.0f}" if row[THROUGHPUT] >= 100 else f"{row[THROUGHPUT]:.3g}"
    return f"{rate} output tok/s, P99 TTFT {row[TTFT]:.0f} ms{spread}{tpot}"


def _missed(word: str, best: float, means: pd.DataFrame, refused: Sequence[float], slo: Mapping[str, float]) -> str:
    """What `word` ("half", "twice") of the best value costs: of the value tried that comes nearest, and which that is."""
    below = word == "half"
    target = best / 2 if below else best * 2
    tried = _nearest([v for v in means.index if (v < best if below else v > best)], target)
    failed = _nearest([v for v in refused if (v < best if below else v > best)], target)
    text = f" {word.capitalize()} of it"
    if failed is not None and (tried is None or _distance(failed, target) < _distance(tried, target)):
        text += f" cannot be served ({failed:g} is refused)"
        if tried is None:
            return text + "."
        text += f"; the nearest that can, {tried:g},"
    elif tried is None:
        return text + " was not tried."
    else:
        text += f" ({tried:g})" if tried == target else f" (nearest tried: {tried:g})"
    return f"{text} {_cost(_row(means, tried), _row(means, best), slo)}."


def _cost(row: pd.Series[float], best: pd.Series[float], slo: Mapping[str, float]) -> str:
    """How much worse (or better) `row` is than `best`, in words."""
    changes = []
    share = row[THROUGHPUT] / best[THROUGHPUT] - 1 if best[THROUGHPUT] else 0.0
    if abs(share) >= 0.001:
        changes.append(f"{abs(share):.1%} {'less' if share < 0 else 'more'} throughput")
    for label, column in (("TTFT", TTFT), ("TPOT", TPOT)):
        factor = row[column] / best[column] if best[column] > 0 else 1.0
        if abs(factor - 1) >= 0.01:
            changes.append(f"{factor:.3g} times the P99 {label} ({row[column]:.{0 if label == 'TTFT' else 1}f} ms)")
    broken = [f"{name} <= {limit:g}" for name, limit in slo.items() if row[SLO_COLUMNS[name]] > limit]
    text = f"gives {', '.join(changes)}" if changes else "changes nothing"
    return text + (f" and breaks {' and '.join(broken)}" if broken else "")


def _row(means: pd.DataFrame, value: float) -> pd.Series[float]:
    return means.loc[[value]].iloc[0]


def _nearest(values: Iterable[float], target: float) -> float | None:
    return min(values, key=lambda value: _distance(value, target), default=None)


def _distance(value: float, target: float) -> float:
    """As a factor where both are positive: 16 is as far from 32 as 64 is."""
    return abs(math.log(value / target)) if value > 0 and target > 0 else abs(value - target)
