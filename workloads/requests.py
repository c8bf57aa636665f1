"""Requests: who asks for what, and when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from workloads.errors import WorkloadError

BASE = 0
"""Adapter id of a request to the base model (vLLM's `lora_int_id` 0)."""

NO_PREFIX = -1
"""`prefix_id` of a prompt that has nothing in common with any other."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Request:
    """One request: `prompt_tokens` in, exactly `output_tokens` out, for one adapter (0 = base).

    `priority`: smaller first. Requests of one `prefix_id` (-1: none) begin with the same tokens: two of them are equal
    up to the smaller of their `prefix_tokens`, and differ everywhere else.
    """

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    adapter: int = BASE
    priority: int = 0
    prefix_id: int = NO_PREFIX
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if not (self.arrival_s >= 0 and self.prompt_tokens >= 1 and self.output_tokens >= 1 and self.adapter >= BASE):
            msg = f"request {self.request_id}: need arrival_s >= 0, prompt_tokens >= 1, output_tokens >= 1, adapter >= 0; got {self}"
            raise WorkloadError(msg)
        if not (self.prefix_id >= NO_PREFIX and 0 <= self.prefix_tokens <= self.prompt_tokens):
            msg = f"request {self.request_id}: need prefix_id >= -1, 0 <= prefix_tokens <= prompt_tokens; got {self}"
            raise WorkloadError(msg)


@dataclass(frozen=True, slots=True)
class RequestTable:
    """Requests as columns, in arrival order; `request_id` is the row number.

    `arrival_s` float64[n] (non-decreasing), `prompt_tokens`, `output_tokens`, `adapter`, `priority`, `prefix_id`,
    `prefix_tokens` int64[n]; the last three may be left out (0, none, 0).
    """

    arrival_s: npt.NDArray[np.float64]
    prompt_tokens: IntArray
    output_tokens: IntArray
    adapter: IntArray
    priority: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    prefix_id: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    prefix_tokens: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __post_init__(self) -> None:
        n = len(self.arrival_s)
        for name, default in (("priority", 0), ("prefix_id", NO_PREFIX), ("prefix_tokens", 0)):
            if len(getattr(self, name)) == 0:
                object.__setattr__(self, name, np.full(n, default, dtype=np.int64))
        if any(len(column) != n for column in self.columns()):
            raise WorkloadError("the columns of a request table must have one length")
        if n == 0:
            return
        if not np.all(np.isfinite(self.arrival_s)) or self.arrival_s[0] < 0 or np.any(np.diff(self.arrival_s) < 0):
            raise WorkloadError("arrival_s must be finite, >= 0 and in order")
        for name, column, least in (
            ("prompt_tokens", self.prompt_tokens, 1),
            ("output_tokens", self.output_tokens, 1),
            ("adapter", self.adapter, BASE),
            ("prefix_id", self.prefix_id, NO_PREFIX),
            ("prefix_tokens", self.prefix_tokens, 0),
        ):
            if column.min() < least:
                row = int(np.argmax(column < least))
                raise WorkloadError(f"request {row}: {name} is {column[row]}, must be >= {least}")
        longer = self.prefix_tokens > self.prompt_tokens
        if longer.any():
            row = int(np.argmax(longer))
            raise WorkloadError(
                f"request {row}: prefix_tokens is {self.prefix_tokens[row]}, must be <= prompt_tokens"
                f" ({self.prompt_tokens[row]})"
            )

    def columns(self) -> tuple[npt.NDArray[np.float64] | IntArray, ...]:
        """All columns, in the order of `Request`'s fields after `request_id`."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def first(self, count: int) -> RequestTable:
        """The first `count` requests."""
        return RequestTable(*(column[:count] for column in self.columns()))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __iter__(self) -> Iterator[Request]:
        for i, row in enumerate(zip(*(c.tolist() for c in self.columns()), strict=True)):
            yield Request(i, *row)
