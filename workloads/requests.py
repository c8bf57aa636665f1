"""Requests: who asks for what, and when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workloads.errors import WorkloadError

BASE = 0
"""Adapter id of a request to the base model (vLLM's `lora_int_id` 0)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: `prompt_tokens` in, exactly `output_tokens` out, for one adapter (0 = base)."""

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    adapter: int = BASE
    priority: int = 0

    def __post_init__(self) -> None:
        if not (self.arrival_s >= 0 and self.prompt_tokens >= 1 and self.output_tokens >= 1 and self.adapter >= BASE):
            msg = f"request {self.request_id}: need arrival_s >= 0, prompt_tokens >= 1, output_tokens >= 1, adapter >= 0; got {self}"
            raise WorkloadError(msg)


@dataclass(frozen=True, slots=True)
class RequestTable:
    """Requests as columns, in arrival order; `request_id` is the row number.

    `arrival_s` float64[n] (non-decreasing), `prompt_tokens`, `output_tokens`, `adapter`, `priority` int64[n].
    """

    arrival_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    adapter: npt.NDArray[np.int64]
    priority: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        n = len(self.arrival_s)
        if any(len(c) != n for c in (self.prompt_tokens, self.output_tokens, self.adapter, self.priority)):
            raise WorkloadError("the columns of a request table must have one length")
        if n == 0:
            return
        if not np.all(np.isfinite(self.arrival_s)) or self.arrival_s[0] < 0 or np.any(np.diff(self.arrival_s) < 0):
            raise WorkloadError("arrival_s must be finite, >= 0 and in order")
        for name, column, least in (
            ("prompt_tokens", self.prompt_tokens, 1),
            ("output_tokens", self.output_tokens, 1),
            ("adapter", self.adapter, BASE),
        ):
            if column.min() < least:
                row = int(np.argmax(column < least))
                raise WorkloadError(f"request {row}: {name} is {column[row]}, must be >= {least}")

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __iter__(self) -> Iterator[Request]:
        columns = (self.arrival_s, self.prompt_tokens, self.output_tokens, self.adapter, self.priority)
        for i, row in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            yield Request(i, *row)
