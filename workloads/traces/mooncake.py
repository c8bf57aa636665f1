"""Mooncake (Qin et al., FAST 2025, kvcache-ai/Mooncake): arrivals, tokens and the blocks that prompts share.

JSONL: `timestamp` (ms), `input_length`, `output_length` (tokens), `hash_ids` (one per 512-token block of the prompt).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from workloads.errors import WorkloadError
from workloads.requests import BASE, PrefixTree, RequestTable
from workloads.traces.rows import json_objects, whole
from workloads.workload import Workload

KEYS = ("timestamp", "input_length", "output_length", "hash_ids")
BLOCK_TOKENS = 512


def load(path: Path, *, spread: bool = True) -> Workload:
    """Requests for the base model, with their common beginnings; `arrival_s` from the first request.

    The trace's clock steps by seconds. `spread`: the requests of one time come evenly up to the next (those of the last
    time as if the gap before it came once more), else all at once.
    """
    stamps: list[int] = []
    prompts: list[int] = []
    outputs: list[int] = []
    leaves: list[int] = []
    parents: list[int] = []
    ends: list[int] = []
    nodes: dict[tuple[int, int], int] = {}
    for line, row in json_objects(path, "a Mooncake trace"):
        where = f"{path}:{line}"
        missing, unknown = [k for k in KEYS if k not in row], [k for k in row if k not in KEYS]
        if missing or unknown:
            raise WorkloadError(f"{where}: keys missing: {missing}, unknown: {unknown}; must be {', '.join(KEYS)}")
        stamps.append(whole(row["timestamp"], f"{where}: timestamp", limit=2**53))
        prompts.append(whole(row["input_length"], f"{where}: input_length", least=1))
        outputs.append(whole(row["output_length"], f"{where}: output_length", least=1))
        if len(stamps) > 1 and stamps[-1] < stamps[-2]:
            raise WorkloadError(f"{where}: timestamp is before the row above, rows must be in arrival order")
        ids, blocks = row["hash_ids"], -(-prompts[-1] // BLOCK_TOKENS)
        if not isinstance(ids, list) or len(ids) != blocks:
            got = f"has {len(ids)} ids" if isinstance(ids, list) else f"is {str(ids)[:80]}"
            want = f"must be a list of {blocks}, one per {BLOCK_TOKENS} tokens of input_length"
            raise WorkloadError(f"{where}: hash_ids {got}, {want}")
        leaf = -1
        for depth, value in enumerate(ids, start=1):
            key = (leaf, whole(value, f"{where}: hash_ids[{depth - 1}]", limit=2**63))
            leaf = nodes.setdefault(key, len(nodes))
            if leaf == len(parents):
                parents.append(key[0])
                ends.append(BLOCK_TOKENS * depth)
        leaves.append(leaf)
    times, counts = np.unique(np.array(stamps, dtype=np.int64), return_counts=True)
    apart = spread and len(times) > 1
    how = "those of one time spread evenly up to the next" if apart else "those of one time come together"
    note = f"{len(stamps)} requests came at {len(times)} distinct times: {how}"
    tokens = np.array(prompts, dtype=np.int64)
    requests = RequestTable(
        _arrivals(times, counts, spread=spread),
        tokens,
        np.array(outputs, dtype=np.int64),
        np.full(len(stamps), BASE, dtype=np.int64),
        prefix_id=np.array(leaves, dtype=np.int64),
        prefix_tokens=tokens,
        tree=PrefixTree(np.array(parents, dtype=np.int64), np.array(ends, dtype=np.int64)),
    )
    return Workload(requests, (), (note,))


def _arrivals(times: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], *, spread: bool) -> npt.NDArray[np.float64]:
    """Seconds from the first of `times` (ms), of which `counts[i]` requests came at `times[i]`."""
    start = np.repeat(times - times[0], counts) / 1000
    if not spread or len(times) == 1:
        return start
    gaps = np.diff(times, append=2 * times[-1] - times[-2])
    rank = np.arange(len(start)) - np.repeat(np.cumsum(counts) - counts, counts)
    return start + np.repeat(gaps / 1000 / counts, counts) * rank
