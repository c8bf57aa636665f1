"""A request as the engine sees it while it lives."""

from __future__ import annotations

from dataclasses import dataclass, field

from workloads.requests import Request


@dataclass(slots=True)
class RequestState:
    """Progress of one request. `computed`: tokens whose keys are in the KV cache, or scheduled to be.

    `limit`: output tokens after which it ends (`output_tokens`, or what `max_model_len` leaves).
    """

    request: Request
    limit: int
    computed: int = 0
    emitted: int = 0
    blocks: list[int] = field(default_factory=list)
    preempted: bool = False
    preemptions: int = 0
    skips: int = 0
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finish_s: float | None = None

    @property
    def tokens(self) -> int:
        """Prompt and outputs so far (vLLM's `Request.num_tokens`)."""
        return self.request.prompt_tokens + self.emitted

    @property
    def adapter(self) -> int:
        return self.request.adapter
