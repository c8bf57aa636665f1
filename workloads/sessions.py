"""Multi-turn sessions: each turn's prompt repeats all that was said before."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workloads.arrivals import MOST_REQUESTS
from workloads.errors import WorkloadError
from workloads.requests import BASE, PrefixTree, RequestTable

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def turn_counts(sessions: int, mean_turns: float, rng: np.random.Generator) -> IntArray:
    """Turns of each session, int64[sessions] >= 1, geometric with mean `mean_turns`."""
    if not mean_turns >= 1:
        raise WorkloadError(f"sessions.turns is {mean_turns}, must be >= 1 on average")
    if sessions * mean_turns > MOST_REQUESTS:
        asked = f"{sessions} sessions of {mean_turns:g} turns"
        raise WorkloadError(f"sessions.turns: {asked} are more than {MOST_REQUESTS} requests, must be at most so many")
    return rng.geometric(1 / mean_turns, sessions)


def unfold(
    start_s: FloatArray,
    adapter: IntArray,
    turns: IntArray,
    said: IntArray,
    output: IntArray,
    *,
    think_s: float,
    system_tokens: int,
    max_tokens: int,
    rng: np.random.Generator,
) -> RequestTable:
    """Requests of sessions that start at `start_s[m]` with `adapter[m]` and have `turns[m]` turns.

    `said`, `output` int64[sum(turns)]: new prompt tokens and output tokens of each turn, session after session. A turn's
    prompt is `system_tokens` (common to the adapter's sessions), everything said and answered before, and what is new.
    Turns follow one another after exponential gaps of mean `think_s`, from arrival to arrival: the open loop does not
    know when an answer was out. A session ends before the turn whose prompt and output would exceed `max_tokens`.
    """
    session = np.repeat(np.arange(len(turns)), turns)
    first = np.cumsum(turns) - turns
    total = system_tokens + _running((said + output).astype(float), first, session).astype(np.int64)
    gaps = rng.exponential(think_s, len(session)) if think_s > 0 else np.zeros(len(session))
    gaps[first] = 0.0
    arrival = start_s[session] + _running(gaps, first, session)
    prompt = total - output
    kept = np.nonzero(total <= max_tokens)[0]
    kept = kept[np.argsort(arrival[kept], kind="stable")]
    # Node a - 1: adapter a's system prompt (base: node 0 of its own); then one node a session, which grows out of it.
    roots = int(adapter.max(initial=BASE)) + 1 if system_tokens else 0
    last = np.maximum.reduceat(total, first) if len(total) else total
    parent = np.concatenate([np.full(roots, -1), adapter if roots else np.full(len(turns), -1)])
    ends = np.concatenate([np.full(roots, system_tokens), last])
    return RequestTable(
        arrival[kept],
        prompt[kept],
        output[kept],
        adapter[session[kept]],
        prefix_id=roots + session[kept],
        prefix_tokens=total[kept],
        tree=PrefixTree(parent.astype(np.int64), ends.astype(np.int64)),
    )


def _running(values: FloatArray, first: IntArray, session: IntArray) -> FloatArray:
    """Sums within each session up to and with each turn."""
    sums = np.cumsum(values)
    within: FloatArray = sums - (sums[first] - values[first])[session]
    return within
