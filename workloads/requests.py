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


Prefix = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One request: `prompt_tokens` in, exactly `output_tokens` out, for one adapter (0 = base).

    `priority`: smaller first. `prefix`: (end_tokens, id) pairs with rising ends. Requests that have the same id begin
    with the same tokens, up to the smaller of their `end_tokens` for it; past the last end, tokens are a request's own.
    The beginning may go on through the output, as in a session whose next turn repeats all that was said.
    """

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    adapter: int = BASE
    priority: int = 0
    prefix: Prefix = ()

    def __post_init__(self) -> None:
        if not (self.arrival_s >= 0 and self.prompt_tokens >= 1 and self.output_tokens >= 1 and self.adapter >= BASE):
            msg = f"request {self.request_id}: need arrival_s >= 0, prompt_tokens >= 1, output_tokens >= 1, adapter >= 0; got {self}"
            raise WorkloadError(msg)
        if self.prefix and not 0 < self.prefix[0][0] <= self.prefix[-1][0] <= self.prompt_tokens + self.output_tokens:
            msg = f"request {self.request_id}: need 0 < prefix ends <= prompt_tokens + output_tokens; got {self}"
            raise WorkloadError(msg)


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Common beginnings that grow out of one another: node i continues `parent[i]` (-1: none) up to `end_tokens[i]`.

    Both int64[m]; a parent comes before its children and ends before them.
    """

    parent: IntArray
    end_tokens: IntArray

    def __post_init__(self) -> None:
        child = np.nonzero(self.parent >= 0)[0]
        rises = self.end_tokens[child] > self.end_tokens[self.parent[child]]
        if len(self.parent) != len(self.end_tokens) or not (rises & (self.parent[child] < child)).all():
            raise WorkloadError("a prefix tree needs parents before their children, and ends that rise")

    def path(self, node: int, tokens: int) -> Prefix:
        """The (end_tokens, id) pairs from the root to `node`, cut at `tokens`."""
        pairs = []
        while node >= 0:
            pairs.append((int(self.end_tokens[node]), node))
            node = int(self.parent[node])
        whole = [pair for pair in reversed(pairs) if pair[0] < tokens]
        return (*whole, (tokens, pairs[-1 - len(whole)][1])) if len(whole) < len(pairs) else tuple(whole)


@dataclass(frozen=True, slots=True)
class RequestTable:
    """Requests as columns, in arrival order; `request_id` is the row number.

    `arrival_s` float64[n] (non-decreasing), `prompt_tokens`, `output_tokens`, `adapter`, `priority`, `prefix_id`,
    `prefix_tokens` int64[n]; the last three may be left out (0, none, 0). The first `prefix_tokens` tokens of a request
    are those of `prefix_id`, which is a node of `tree`, or where there is none a beginning by itself.
    """

    arrival_s: npt.NDArray[np.float64]
    prompt_tokens: IntArray
    output_tokens: IntArray
    adapter: IntArray
    priority: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    prefix_id: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    prefix_tokens: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    tree: PrefixTree | None = None

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
        longer = self.prefix_tokens > self.prompt_tokens + self.output_tokens
        if longer.any():
            row = int(np.argmax(longer))
            raise WorkloadError(
                f"request {row}: prefix_tokens is {self.prefix_tokens[row]}, must be <= prompt_tokens + output_tokens"
                f" ({self.prompt_tokens[row] + self.output_tokens[row]})"
            )

    def columns(self) -> tuple[npt.NDArray[np.float64] | IntArray, ...]:
        """All columns, in the order of the fields."""
        return tuple(getattr(self, name) for name in self.__slots__ if name != "tree")

    def take(self, rows: npt.NDArray[np.bool_] | IntArray | slice) -> RequestTable:
        """The chosen requests, which must still be in arrival order."""
        return RequestTable(*(column[rows] for column in self.columns()), tree=self.tree)  # type: ignore[arg-type, misc]

    def prefix(self, prefix_id: int, tokens: int) -> Prefix:
        """What `Request.prefix` is for one row's `prefix_id` and `prefix_tokens`."""
        if prefix_id == NO_PREFIX or tokens == 0:
            return ()
        return ((tokens, prefix_id),) if self.tree is None else self.tree.path(prefix_id, tokens)

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __iter__(self) -> Iterator[Request]:
        rows = zip(*(c.tolist() for c in self.columns()), strict=True)
        for i, (arrival_s, prompt, output, adapter, priority, prefix_id, tokens) in enumerate(rows):
            yield Request(i, arrival_s, prompt, output, adapter, priority, self.prefix(prefix_id, tokens))
