"""What a step's cost depends on: the numbers a predictor sees of a `StepBatch`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backend.base import NO_SLOT, TILE_ROWS, StepBatch


@dataclass(frozen=True, slots=True)
class StepFeatures:
    """A step in numbers.

    `rows`: tokens computed; `requests`; `samples`: requests that yield a token; `decodes`: requests that
    compute one token; `kv_tokens`: keys they read; `max_kv`: the longest of them; `prefill_pairs`: query-key pairs of all other requests;
    `lora_rows`, `lora_tiles`, `active_adapters`; `rank_sum`: ranks of the active adapters, added up;
    `row_rank`: rows times their adapter's rank, added up; `decode_only`: every request computes one token.
    """

    rows: int
    requests: int
    samples: int
    decodes: int
    kv_tokens: int
    max_kv: int
    prefill_pairs: int
    lora_rows: int
    lora_tiles: int
    active_adapters: int
    rank_sum: int
    row_rank: int
    decode_only: bool

    @classmethod
    def of(cls, batch: StepBatch, slot_ranks: Mapping[int, int]) -> StepFeatures:
        """Summarise `batch`; `slot_ranks` maps each used slot to the rank of its adapter."""
        rows = decodes = kv_tokens = max_kv = pairs = 0
        decode_only = True
        per_slot: dict[int, int] = {}
        for query, context, slot in zip(batch.query_lens, batch.context_lens, batch.slots, strict=True):
            rows += query
            if query == 1 and context > 0:
                decodes += 1
                kv_tokens += context + 1
                max_kv = max(max_kv, context + 1)
            else:
                decode_only = False
                pairs += query * context + query * (query + 1) // 2
            if slot != NO_SLOT:
                per_slot[slot] = per_slot.get(slot, 0) + query
        return cls(
            rows,
            len(batch.query_lens),
            sum(batch.samples),
            decodes,
            kv_tokens,
            max_kv,
            pairs,
            sum(per_slot.values()),
            sum(-(-count // TILE_ROWS) for count in per_slot.values()),
            len(per_slot),
            sum(slot_ranks[slot] for slot in per_slot),
            sum(count * slot_ranks[slot] for slot, count in per_slot.items()),
            decode_only,
        )
