"""The VTC artifact's results (Sheng et al., OSDI 2024, Ying1123/VTC-artifact): Chatbot Arena requests, one adapter a model.

One JSON line `{"config": …, "result": {"responses": [{"adapter_dir", "prompt_len", "output_len", "req_time", …}]}}`.
Its latencies are those of the artifact's own server: they are not read.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from workloads.errors import WorkloadError
from workloads.requests import RequestTable
from workloads.traces.rows import json_objects, whole
from workloads.workload import Workload

KEYS = ("adapter_dir", "prompt_len", "output_len", "req_time")


def load(path: Path) -> Workload:
    """The requests, `arrival_s` = `req_time`; adapters 1 … n by `adapter_dir`, numbered as they arrive first."""
    lines = list(json_objects(path, "a VTC results file"))
    if len(lines) > 1:
        raise WorkloadError(f"{path}:{lines[1][0]}: a second JSON line, a VTC results file must have one")
    result = lines[0][1].get("result")
    responses = result.get("responses") if isinstance(result, dict) else None
    if not isinstance(responses, list) or not responses:
        raise WorkloadError(f"{path}: result.responses is missing or empty, must be a list of requests")
    rows: list[tuple[float, int, int, str]] = []
    for i, response in enumerate(responses):
        where = f"{path}: result.responses[{i}]"
        if not isinstance(response, dict) or any(key not in response for key in KEYS):
            raise WorkloadError(f"{where}: must be an object with {', '.join(KEYS)}; got {str(response)[:80]}")
        name, time = response["adapter_dir"], response["req_time"]
        if not isinstance(name, str) or not name:
            raise WorkloadError(f"{where}: adapter_dir is {str(name)[:80]!r}, must be a name")
        # A bound that any trace keeps also refuses NaN, infinity and integers beyond a float.
        if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < 1e12:
            raise WorkloadError(f"{where}: req_time is {str(time)[:80]}, must be a number of seconds >= 0")
        prompt = whole(response["prompt_len"], f"{where}: prompt_len", least=1)
        rows.append((float(time), prompt, whole(response["output_len"], f"{where}: output_len", least=1), name))
    late = sum(row[0] < above[0] for above, row in pairwise(rows))
    rows.sort(key=lambda row: row[0])
    number = {name: i for i, name in enumerate(dict.fromkeys(row[3] for row in rows), start=1)}
    requests = RequestTable(
        np.array([row[0] for row in rows]),
        np.array([row[1] for row in rows], dtype=np.int64),
        np.array([row[2] for row in rows], dtype=np.int64),
        np.array([number[row[3]] for row in rows], dtype=np.int64),
    )
    notes = (f"{late} of {len(rows)} requests came before the one above them: sorted by req_time",) if late else ()
    return Workload(requests, tuple(number), notes)
