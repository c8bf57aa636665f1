"""The process in front of vLLM's engine, as clients meet it: one event loop that takes requests, writes tokens and metrics.

Whatever keeps it busy keeps requests and tokens waiting. Two things keep it busy for long: the first request of an adapter, whose
tokenizer is loaded; and each time somebody reads its metrics, for vLLM before late 2025 keeps a line for every set of running and
waiting adapters that it ever had (`vllm:lora_requests_info`), and writes them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

FloatArray = npt.NDArray[np.float64]

READ_EVERY_S = 2.0
"""The published clients read the metrics so long after they got the last ones."""

MERGED_OUTPUTS = 128
"""Outputs of a step that are handed out at once."""

_LONG_S = 0.005
"""Work that blocks tokens noticeably."""


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """Seconds of the event loop: a request, an adapter's first request, a token of a step, reading metrics at all, and for each set of adapters and each name in it."""

    request_s: float
    first_use_s: float
    token_s: float
    read_s: float
    read_set_s: float
    read_name_s: float


@dataclass(frozen=True, slots=True)
class SetsSeen:
    """After steps that ended at `at_s`: sets of adapters seen so far, and names in them; float64[steps] each."""

    at_s: FloatArray
    sets: FloatArray
    names: FloatArray

    @classmethod
    def none(cls) -> SetsSeen:
        """Of a server that has not done anything."""
        return cls(np.zeros(1), np.zeros(1), np.zeros(1))

    def at(self, now_s: float) -> tuple[float, float]:
        """Sets and names by `now_s`."""
        last = int(np.searchsorted(self.at_s, now_s, side="right")) - 1
        return (float(self.sets[last]), float(self.names[last])) if last >= 0 else (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Passage:
    """What passing the event loop costs: when each request reaches the engine, and when the loop was busy for long."""

    engine_s: FloatArray
    busy_from_s: FloatArray
    busy_to_s: FloatArray

    def out(self, at_s: FloatArray) -> FloatArray:
        """When what the engine hands over at `at_s` gets out: at once, or when long work ends."""
        if not len(self.busy_from_s):
            return at_s
        last = np.maximum(np.searchsorted(self.busy_from_s, at_s, side="right") - 1, 0)
        inside = (self.busy_from_s[last] <= at_s) & (at_s < self.busy_to_s[last])
        return np.where(inside, self.busy_to_s[last], at_s)


def merged_tokens(way: Passage, steps: pd.DataFrame) -> float:
    """Tokens that reach their client in a chunk with an earlier one: those of steps that ended in one stretch of long work.

    A request's tokens are merged while nobody takes them (vLLM's `RequestOutputCollector`). Of larger steps they are not: their
    outputs are handed out in portions, between which the event loop lets others run (`VLLM_V1_OUTPUT_PROC_CHUNK_SIZE`).
    """
    ends, decoded = steps["end_s"].to_numpy(), steps["decode_requests"].to_numpy(float)
    decoded = np.where(decoded + steps["prefill_requests"].to_numpy() <= MERGED_OUTPUTS, decoded, 0.0)
    first, last = (np.searchsorted(ends, times) for times in (way.busy_from_s, way.busy_to_s))
    several = [decoded[i:j] for i, j in zip(first, last, strict=True) if j - i > 1]
    return float(sum(part.sum() - part.max() for part in several))


def passage(
    arrival_s: FloatArray, adapter: npt.NDArray[np.int64], front: FrontEnd, seen: SetsSeen, window_s: float
) -> Passage:
    """One after the other: requests as they come, and the metrics `READ_EVERY_S` after they were read."""
    reached = np.empty(len(arrival_s))
    busy: list[tuple[float, float]] = []
    known: set[int] = set()
    free_s, read_s = 0.0, READ_EVERY_S
    pending = 0
    while pending < len(arrival_s) or read_s < window_s:
        if pending < len(arrival_s) and arrival_s[pending] <= read_s:
            work_s = front.request_s
            if int(adapter[pending]) not in known:
                known.add(int(adapter[pending]))
                work_s += front.first_use_s
            begin_s = max(float(arrival_s[pending]), free_s)
            free_s = reached[pending] = begin_s + work_s
            pending += 1
        else:
            begin_s = max(read_s, free_s)
            sets, names = seen.at(begin_s)
            work_s = front.read_s + front.read_set_s * sets + front.read_name_s * names
            free_s = begin_s + work_s
            read_s = free_s + READ_EVERY_S
        if work_s > _LONG_S:
            busy.append((begin_s, free_s))
    spans = np.array(busy).reshape(-1, 2)
    return Passage(reached, spans[:, 0], spans[:, 1])


def sets_seen(requests: pd.DataFrame, steps: pd.DataFrame) -> SetsSeen:
    """Distinct pairs of sets (running adapters, waiting adapters) after each step of a run."""
    ends = steps["end_s"].to_numpy()
    adapters = requests["adapter"].to_numpy()
    codes = np.random.default_rng(0).integers(1, 1 << 62, (2, int(adapters.max(initial=0)) + 1)).tolist()
    # A request that is scheduled at the end of a step belongs to the next one.
    moments = (("arrival_s", "left"), ("first_scheduled_s", "right"), ("finish_s", "left"))
    events = []
    for kind, (column, side) in enumerate(moments):
        times = requests[column].to_numpy()
        there = np.flatnonzero(~np.isnan(times))
        step = np.searchsorted(ends, times[there], side=side)  # type: ignore[call-overload]
        events.append(np.stack([step, np.full(len(there), kind), adapters[there]], axis=1))
    table = np.concatenate(events)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return _counted(table[table[:, 0] < len(ends)].tolist(), codes, ends)


def _counted(events: list[list[int]], codes: list[list[int]], ends: FloatArray) -> SetsSeen:
    """Walks over events (step, kind, adapter), kinds in the order of a request's life."""
    counts: list[dict[int, int]] = [{}, {}]  # waiting, running
    code = names = 0
    known: set[int] = set()
    sets_at, names_at = np.zeros(len(ends)), np.zeros(len(ends))
    total = 0

    def change(group: int, adapter: int, by: int) -> None:
        nonlocal code, names
        before = counts[group].get(adapter, 0)
        counts[group][adapter] = before + by
        if (before > 0) != (before + by > 0):
            code ^= codes[group][adapter]
            names += by

    place = 0
    for step in range(len(ends)):
        while place < len(events) and events[place][0] == step:
            _, kind, adapter = events[place]
            if kind:
                change(kind - 1, adapter, -1)
            if kind < len(counts):
                change(kind, adapter, 1)
            place += 1
        if code not in known:
            known.add(code)
            total += names
        sets_at[step], names_at[step] = len(known), total
    return SetsSeen(ends, sets_at, names_at)
