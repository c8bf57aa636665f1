"""The steps that a measurement consists of: none of a captured size's base products is left to its neighbours."""

from __future__ import annotations

import numpy as np

from backend.base import NO_SLOT
from backend.compositions import Room, prefill_grid, random_steps
from backend.live import GRAPH_SIZES
from backend.measure import RANKS, measuring_limits

ROOM = Room(
    measuring_limits("cuda"), 1 << 16, {rank: tuple(range(16 * i, 16 * i + 16)) for i, rank in enumerate(RANKS)}
)


def test_steps_with_prompts_cover_every_captured_size_whose_base_products_jump() -> None:
    base_only = {sum(b.query_lens) for b in prefill_grid(ROOM, quick=False) if set(b.slots) == {NO_SLOT}}
    assert {size for size in GRAPH_SIZES if size >= 128} <= base_only


def test_steps_fit_the_engine_and_own_their_blocks() -> None:
    steps = [*prefill_grid(ROOM, quick=False), *random_steps(ROOM, 50, np.random.default_rng(1))]
    assert len(steps) > 500
    for step in steps:
        assert len(step.query_lens) <= ROOM.limits.max_num_seqs
        assert sum(step.query_lens) <= ROOM.limits.max_num_batched_tokens
        held = [block for table in step.block_tables for block in table]
        assert len(held) == len(set(held)) <= ROOM.num_gpu_blocks
        for query, context, table in zip(step.query_lens, step.context_lens, step.block_tables, strict=True):
            assert query + context <= len(table) * ROOM.limits.block_size
