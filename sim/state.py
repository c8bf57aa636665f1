"""A request as the engine sees it while it lives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from workloads.requests import Request


@dataclass(slots=True, eq=False)
class RequestState:
    """Progress of one request.

    `limit`: output tokens after which it ends (`output_tokens`, or what `max_model_len` leaves).
    `computed`: tokens whose keys are in the KV cache, or scheduled to be (vLLM's `num_computed_tokens`).
    `placeholders`: output tokens that are being sampled and not known yet (asynchronous scheduling).
    `blocks`: its KV blocks in order, of which the first `registered` are in the prefix cache.
    `cached_tokens`: tokens found in the prefix cache when it was first admitted.
    """

    request: Request
    limit: int
    computed: int = 0
    emitted: int = 0
    placeholders: int = 0
    blocks: list[int] = field(default_factory=list)
    registered: int = 0
    preempted: bool = False
    done: bool = False
    preemptions: int = 0
    skips: int = 0
    cached_tokens: int = 0
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finish_s: float | None = None

    def again(self) -> RequestState:
        """A new attempt from the beginning, after a failure; its preemptions and skips count on."""
        return RequestState(self.request, self.limit, preemptions=self.preemptions, skips=self.skips)

    def progress(self) -> tuple[float, float, int]:
        """First token and finish (nan: not yet), and tokens so far."""
        first_s, finish_s = self.first_token_s, self.finish_s
        return math.nan if first_s is None else first_s, math.nan if finish_s is None else finish_s, self.emitted

    @property
    def tokens(self) -> int:
        """Prompt and known outputs so far (vLLM's `Request.num_tokens`)."""
        return self.request.prompt_tokens + self.emitted

    @property
    def row(self) -> int:
        """Its row in the table of requests."""
        return self.request.request_id

    @property
    def arrival_s(self) -> float:
        return self.request.arrival_s

    @property
    def adapter(self) -> int:
        return self.request.adapter
