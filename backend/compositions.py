"""Which steps to measure: a grid over what steps cost, and random steps that are held out to check the fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from backend.base import NO_SLOT, EngineLimits, StepBatch

CAPTURED = (16, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
"""Rows of steps with prompts: where graphs are far apart, every size that is captured (`live.GRAPH_SIZES`)."""

LONGER, BEYOND = (1536, 2048, 3072, 4096), (6144, 8192)
"""The same of longer steps, and of those that are not captured."""

BETWEEN = (
    *(size for size in range(136, 256, 8) if size not in CAPTURED),
    *(size for size in range(1152, 4096, 128) if size not in LONGER),
)
"""Captured sizes of which only base products are measured: they jump between sizes (from 136 rows on they are cuBLAS's), what adapters
add does not."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a composition may use: the limits, the KV blocks there are, and the slots by rank."""

    limits: EngineLimits
    num_gpu_blocks: int
    slots_of_rank: dict[int, tuple[int, ...]]

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(s for slots in self.slots_of_rank.values() for s in slots)


@cache
def _numbers(count: int) -> tuple[int, ...]:
    """Block ids, the same objects in all steps, as a request's are in an engine: equal tables of others take longer to compare."""
    return tuple(range(count))


def compose(query: Sequence[int], context: Sequence[int], slots: Sequence[int], room: Room) -> StepBatch | None:
    """A live step with its own KV blocks for every request; None if it does not fit the room."""
    size = room.limits.block_size
    need = [-(-(q + c) // size) for q, c in zip(query, context, strict=True)]
    too_many = len(query) > room.limits.max_num_seqs or sum(query) > room.limits.max_num_batched_tokens
    if too_many or sum(need) > room.num_gpu_blocks or max(need) * size > room.limits.max_model_len:
        return None
    tables, start, numbers = [], 0, _numbers(room.num_gpu_blocks)
    for blocks in need:
        tables.append(numbers[start : start + blocks])
        start += blocks
    return StepBatch(tuple(query), tuple(context), tuple(slots), (True,) * len(query), tuple(tables))


def again(batch: StepBatch) -> StepBatch:
    """The same step with block tables of its own, as an engine hands them over every step."""
    return replace(batch, block_tables=tuple((*blocks,) for blocks in batch.block_tables))


def _spread(count: int, slots: Sequence[int]) -> list[int]:
    return [slots[i % len(slots)] for i in range(count)] if slots else [NO_SLOT] * count


def _choices(room: Room) -> Iterator[tuple[int, ...]]:
    """Sets of active slots: none, and 1, 2, 4, … of each rank."""
    yield ()
    for slots in room.slots_of_rank.values():
        count = 1
        while count <= len(slots):
            yield slots[:count]
            count *= 2
    if len(room.slots_of_rank) > 1:
        yield room.slots


def decode_grid(room: Room, quick: bool) -> Iterator[StepBatch]:
    """Pure decodes: batch sizes × context lengths × active adapters."""
    sizes = (1, 4, 16) if quick else (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
    for size in sizes:
        for active in _choices(room):
            contexts = (64, 512, 2048, 8192) if not active else (512, 1536)
            for context in contexts:
                if len(active) <= size or size == sizes[-1]:
                    batch = compose([1] * size, [context] * size, _spread(size, active), room)
                    if batch is not None:
                        yield batch
    for size in () if quick else range(8, room.limits.max_num_seqs + 1, 8):
        # Base products jump between sizes, which only steps of that size and without adapters show.
        batch = compose([1] * size, [512] * size, _spread(size, ()), room) if size not in sizes else None
        if batch is not None:
            yield batch


def prefill_grid(room: Room, quick: bool) -> Iterator[StepBatch]:
    """Prefills and chunks, alone and beside decodes."""
    tokens = (16, 64, 256) if quick else (*CAPTURED, *LONGER, *BEYOND)
    for total in tokens:
        counts = (1, 4, 16) if total <= 2048 else (4,)
        some = [slots[:n] for rank, slots in room.slots_of_rank.items() if rank in (16, 64) for n in counts]
        for active in ((), *some, room.slots):
            for parts, context, decodes in ((1, 0, 0), (4, 0, 0), (1, 2048, 0), (1, 0, 16), (1, 0, 64)):
                if decodes and total in BEYOND:  # a third of all time, for little
                    continue
                decodes_fit = min(decodes, total - 1)
                query = [(total - decodes_fit) // parts] * parts + [1] * decodes_fit
                slots = _spread(len(query), active)
                batch = compose(query, [context] * parts + [600] * decodes_fit, slots, room) if min(query) > 0 else None
                if batch is not None and not (active and context):
                    yield batch
    for total in () if quick else BETWEEN:
        for parts in (1, 4):
            batch = compose([total // parts] * parts, [0] * parts, [NO_SLOT] * parts, room)
            if batch is not None:
                yield batch


def random_steps(room: Room, count: int, rng: np.random.Generator) -> Iterator[StepBatch]:
    """Random steps as a loaded engine makes them: some decodes, in half of the cases prefills beside them."""
    made = 0
    while made < count:
        decodes = int(np.exp(rng.uniform(0, np.log(room.limits.max_num_seqs))))
        context = np.clip(rng.lognormal(np.log(600), 1.0, decodes), 1, 8000).astype(int).tolist()
        query = [1] * decodes
        if rng.random() < 0.5:
            prompts = rng.integers(1, 4)
            query += np.clip(rng.lognormal(np.log(400), 1.0, prompts), 2, 4000).astype(int).tolist()
            context += (rng.integers(0, 3, prompts) // 2 * rng.integers(0, 2000, prompts)).tolist()
        active = rng.permutation(room.slots)[: int(np.exp(rng.uniform(0, np.log(len(room.slots) + 1))))]
        slots = [int(rng.choice(active)) if rng.random() < 0.9 else NO_SLOT for _ in query]
        batch = compose(query, context, slots, room)
        if batch is not None:
            made += 1
            yield batch
