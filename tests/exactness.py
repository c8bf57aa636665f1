"""Requests played on a live backend one at a time, or in random batches with their prompts in random chunks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from backend.base import EngineLimits, StepBatch
from backend.live import LiveBackend
from backend.verify import VerifyingBackend

LIMITS = EngineLimits(3, 16, 8, 64, 256, 16, 0.9)
BLOCKS = 8
"""KV blocks that each request has for itself."""


@dataclass(frozen=True, slots=True)
class Story:
    """A request: prompt tokens, output tokens, slot."""

    prompt: int
    output: int
    slot: int


@dataclass(slots=True)
class _Played:
    story: Story
    blocks: tuple[int, ...]
    computed: int = 0
    tokens: list[int] = field(default_factory=list)


def _step(backend: LiveBackend | VerifyingBackend, parts: list[tuple[_Played, int]]) -> None:
    """Execute `tokens` of each request and note what is sampled."""
    live = backend.live if isinstance(backend, VerifyingBackend) else backend
    size = live.limits.block_size
    samples = tuple(p.computed + n >= p.story.prompt for p, n in parts)
    batch = StepBatch(
        tuple(n for _, n in parts),
        tuple(p.computed for p, _ in parts),
        tuple(p.story.slot for p, _ in parts),
        samples,
        tuple(p.blocks[: -(-(p.computed + n) // size)] for p, n in parts),
        tuple(n == 1 and p.computed >= p.story.prompt for p, n in parts),
    )
    backend.execute(batch)
    last = live.decoder.last_token.tolist()
    for (played, count), sampled in zip(parts, samples, strict=True):
        played.computed += count
        if sampled:
            played.tokens.append(last[played.blocks[(played.computed - 1) // size]])


def tokens_of(backend: LiveBackend | VerifyingBackend, story: Story) -> list[int]:
    """The tokens of a request that has the engine for itself."""
    played = _Played(story, tuple(range(BLOCKS)))
    _step(backend, [(played, story.prompt)])
    for _ in range(story.output - 1):
        _step(backend, [(played, 1)])
    return played.tokens


def tokens_together(
    backend: LiveBackend | VerifyingBackend, stories: list[Story], rng: np.random.Generator, most: int = 12
) -> list[list[int]]:
    """The same of each request, in steps of random subsets of all, prompts in chunks of at most `most` tokens."""
    every = [_Played(s, tuple(range(i * BLOCKS, (i + 1) * BLOCKS))) for i, s in enumerate(stories)]
    while any(len(p.tokens) < p.story.output for p in every):
        chosen = [p for p in every if len(p.tokens) < p.story.output and rng.random() < 0.7]
        parts = [(p, min(int(rng.integers(1, most)), p.story.prompt - p.computed) or 1) for p in chosen]
        parts = [(p, n if p.computed < p.story.prompt else 1) for p, n in parts]
        if parts:
            _step(backend, parts)
    return [p.tokens for p in every]
