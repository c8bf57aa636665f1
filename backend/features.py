"""What a step's cost depends on: the numbers a predictor sees of a `StepBatch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest

from backend.base import NO_SLOT, TILE_ROWS, StepBatch

PREFILL_TILE = 64
"""Queries of a prompt that attention takes together, as our kernels do (`step_inputs.prefill_tile`)."""

DECODES_AT_ONCE = 33
"""Decodes whose attention an H100 is taken to work on at a time: two programs on each of 132 processors, a program a KV head of 8."""

FEW_DECODES, FILLING_DECODES = 32, 22
"""Up to so many decodes that are not split, and as many as they are padded to at most, have programs that take more keys at a time
(`attention_triton.plan`); and the decodes whose attention then takes the memory's whole bandwidth: the number that fits best to the steps that
profiles are fitted to."""

SPLIT_DECODES = 16
"""Up to so many decodes, the keys of each are split over several programs."""

TILES_AT_ONCE = 16
"""Prompt tiles it works on at a time: one program a processor and KV head."""


@dataclass(frozen=True, slots=True)
class StepFeatures:
    """A step in numbers.

    `rows`: tokens computed; `requests`; `decodes`: requests that compute one token; `kv_tokens`: keys they read; `max_kv`:
    the longest of them; `kv_tail`: keys that the processors beside the longest could read until it ends (contexts that grow
    together leave it as it is); `prefill_keys`, `prefill_tail`: the same of the tiles of all other requests' queries;
    `lora_rows`, `lora_tiles`, `active_adapters`; `rank_sum`, `max_rank`: of the ranks of the active adapters;
    `row_rank`: rows times their adapter's rank, added up; `decode_only`: every request computes one token; `after_prompts`: the
    step before had others, so that an engine sets its batch up anew; `idle_slots`: of an engine whose LoRA kernels run over all
    `max_loras` slots, those that no adapter of the step is in (0: not known); `skipped`: waiting requests that the scheduler walked over.
    """

    rows: int
    requests: int
    decodes: int
    kv_tokens: int
    max_kv: int
    kv_tail: int
    prefill_keys: int
    prefill_tail: int
    lora_rows: int
    lora_tiles: int
    active_adapters: int
    rank_sum: int
    max_rank: int
    row_rank: int
    decode_only: bool
    after_prompts: bool = False
    idle_slots: int = 0
    skipped: int = 0

    @classmethod
    def of(
        cls, batch: StepBatch, slot_ranks: Mapping[int, int], *, after_prompts: bool = False, max_loras: int = 0
    ) -> StepFeatures:
        """Summarise `batch`; `slot_ranks` maps each used slot to the rank of its adapter, `max_loras` are the engine's (0: not known)."""
        rows = prefill_keys = 0
        keys: list[int] = []
        tiles: list[int] = []
        per_slot: dict[int, int] = {}
        for query, context, slot in zip(batch.query_lens, batch.context_lens, batch.slots, strict=True):
            rows += query
            if query == 1:
                keys.append(context + 1)
            else:
                prefill_keys += _tile_keys(query, context)
                tiles += _last_tiles(query, context)
            if slot != NO_SLOT:
                per_slot[slot] = per_slot.get(slot, 0) + query
        ranks = [slot_ranks[slot] for slot in per_slot]
        return cls(
            rows,
            len(batch.query_lens),
            len(keys),
            sum(keys),
            max(keys, default=0),
            _tail(keys, at_once(len(keys))),
            prefill_keys,
            _tail(tiles, TILES_AT_ONCE, idle=True),
            sum(per_slot.values()),
            sum(-(-count // TILE_ROWS) for count in per_slot.values()),
            len(per_slot),
            sum(ranks),
            max(ranks, default=0),
            sum(count * slot_ranks[slot] for slot, count in per_slot.items()),
            len(keys) == len(batch.query_lens),
            after_prompts,
            max(0, max_loras - len(per_slot)) if per_slot else 0,
            batch.skipped,
        )


def at_once(decodes: int) -> int:
    """Decodes that are worked on at a time; split ones fill the processors with half as many as they are padded to."""
    if decodes > SPLIT_DECODES:
        return FILLING_DECODES if decodes <= FEW_DECODES else DECODES_AT_ONCE
    return max(1, (1 << (decodes - 1).bit_length()) // 2) if decodes else 0


def _tile_keys(query: int, context: int) -> int:
    """Keys that all tiles of a chunk read, each up to its last query."""
    tiles = -(-query // PREFILL_TILE)
    return tiles * context + PREFILL_TILE * tiles * (tiles - 1) // 2 + query


def _last_tiles(query: int, context: int) -> list[int]:
    """Keys of a chunk's longest tiles, as many as are worked on at a time."""
    whole = (query - 1) // PREFILL_TILE
    earlier = range(whole, max(0, whole - TILES_AT_ONCE + 1), -1)
    return [context + query, *(context + PREFILL_TILE * tile for tile in earlier)]


def _tail(lengths: Sequence[int], width: int, *, idle: bool = False) -> int:
    """Keys that `width` places could read more, were all as long as the longest; `idle`: empty places count too."""
    if not lengths:
        return 0
    longest = nlargest(width, lengths)
    return (width if idle else len(longest)) * longest[0] - sum(longest)
