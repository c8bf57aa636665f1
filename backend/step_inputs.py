"""What a live step needs beside weights: a `StepBatch` turned into flat int32 arrays, padded and packed to go up together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backend.base import NO_SLOT, StepBatch

IntArray = npt.NDArray[np.int32]

DECODE_TILE = 4
"""Queries of an attention tile of decodes and short chunks."""


def prefill_tile(heads_per_kv_head: int) -> int:
    """Queries of an attention tile of long chunks: 256 rows of queries times heads (a power of two) fill a processor."""
    return min(64, 256 >> (heads_per_kv_head - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Padding:
    """Lengths that a captured graph was made for; a step is padded up to them."""

    rows: int
    adapted: bool
    decode_tiles: int
    prefill_tiles: int
    samples: int

    @classmethod
    def of(cls, batch: StepBatch, rows: int, long_tile: int, short_tile: int = DECODE_TILE) -> Padding:
        """What `batch` is padded to at `rows` rows: pure decodes to as many requests, others to powers of two."""
        adapted = any(slot != NO_SLOT for slot in batch.slots)
        if max(batch.query_lens) == 1 and short_tile:
            return cls(rows, adapted, rows, 0, rows)
        decodes = sum(query <= short_tile for query in batch.query_lens)
        prefills = sum(-(-query // long_tile) for query in batch.query_lens if query > short_tile)
        return cls(rows, adapted, power_of_two(decodes), power_of_two(prefills), power_of_two(sum(batch.samples)))


def power_of_two(count: int) -> int:
    """The least power of two that is at least `count`; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step as int32 arrays over its T rows (token positions to compute) and n requests.

    `token_from[T]`: where the row's token lies among the last sampled ones, -1 = prompt: a request's newest token lies
    under the KV block of the row that yielded it, which the request shares with nobody while it computes there;
    `positions[T]`; `kv_slots[T]`: cell to write (-1 = padding); `row_slots[T]`: adapter slot (-1 = base);
    `decode_tiles[., 4]`, `prefill_tiles[., 4]`: attention
    tiles (request, first row, its position, queries); `sample_rows[S]`, `sample_to[S]`: rows that yield a token, and where it goes.
    """

    token_from: IntArray
    positions: IntArray
    kv_slots: IntArray
    row_slots: IntArray
    decode_tiles: IntArray
    prefill_tiles: IntArray
    sample_rows: IntArray
    sample_to: IntArray

    @property
    def rows(self) -> int:
        return len(self.positions)

    @property
    def adapted(self) -> bool:
        """Whether any row has an adapter."""
        return bool((self.row_slots > NO_SLOT).any())

    def padded(self, padding: Padding, nowhere: int) -> StepInputs:
        """The same step with rows that compute nothing appended; sampled tokens of padding go to `nowhere`."""
        rows = padding.rows - self.rows
        return StepInputs(
            _pad(self.token_from, rows, -1),
            _pad(self.positions, rows, 0),
            _pad(self.kv_slots, rows, -1),
            _pad(self.row_slots, rows, -1),
            _pad(self.decode_tiles, padding.decode_tiles - len(self.decode_tiles), -1),
            _pad(self.prefill_tiles, padding.prefill_tiles - len(self.prefill_tiles), -1),
            _pad(self.sample_rows, padding.samples - len(self.sample_rows), 0),
            _pad(self.sample_to, padding.samples - len(self.sample_to), nowhere),
        )

    def arrays(self) -> tuple[IntArray, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)


def _pad(array: IntArray, count: int, value: int) -> IntArray:
    if count == 0:
        return array
    return np.concatenate([array, np.full((count, *array.shape[1:]), value, dtype=np.int32)])


def _attention_tiles(requests: IntArray, starts: IntArray, context: IntArray, query: IntArray, size: int) -> IntArray:
    """Cut each request's queries into tiles of `size`."""
    per_request = -(-query // size)
    which = np.repeat(np.arange(len(query)), per_request)
    offset = (np.arange(len(which)) - np.repeat(np.cumsum(per_request) - per_request, per_request)) * size
    count = np.minimum(size, query[which] - offset)
    return np.stack([requests[which], starts[which] + offset, context[which] + offset, count], 1).astype(np.int32)


def lay_out(
    batch: StepBatch, tables: IntArray, block_size: int, long_tile: int, short_tile: int = DECODE_TILE
) -> StepInputs:
    """Lay out `batch`, whose block tables are the rows of `tables` int32[n, blocks]; `long_tile`: see `prefill_tile`.

    Up to `short_tile` queries of a request go into a tile of decodes; with 0 all go into long ones.
    """
    query = np.array(batch.query_lens, dtype=np.int32)
    context = np.array(batch.context_lens, dtype=np.int32)
    starts = (np.cumsum(query) - query).astype(np.int32)
    request = np.repeat(np.arange(len(query)), query)
    position = (context[request] + np.arange(len(request)) - starts[request]).astype(np.int32)
    kv_slots = tables[request, position // block_size] * block_size + position % block_size
    row_slots = np.array(batch.slots, dtype=np.int32)[request]
    decode = query <= short_tile
    requests = np.arange(len(query), dtype=np.int32)
    samples = np.array(batch.samples, dtype=bool)
    decodes = np.array(batch.decodes, dtype=bool) if batch.decodes else (query == 1) & (context > 0)
    token_from = np.where(decodes, tables[requests, np.maximum(context - 1, 0) // block_size], -1)[request]
    tiles = [
        _attention_tiles(requests[mask], starts[mask], context[mask], query[mask], size)
        for mask, size in ((decode, max(short_tile, 1)), (~decode, long_tile))
    ]
    return StepInputs(
        token_from.astype(np.int32),
        position,
        kv_slots.astype(np.int32),
        row_slots,
        tiles[0],
        tiles[1],
        (starts + query - 1)[samples].astype(np.int32),
        tables[requests, (context + query - 1) // block_size][samples].astype(np.int32),
    )
