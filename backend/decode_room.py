"""Pure decodes laid out straight into the memory they go up from: nearly all steps are, and what the host does counts in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from backend.base import NO_SLOT, StepBatch
from backend.step_inputs import IntArray, StepInputs


def pure_decodes(batch: StepBatch) -> bool:
    """Whether every request computes its newest token, and the next of each is sampled."""
    ongoing = all(batch.decodes) if batch.decodes else 0 not in batch.context_lens
    return ongoing and batch.query_lens.count(1) == len(batch.query_lens) and all(batch.samples)


@dataclass(slots=True)
class DecodeRoom:
    """Where pure decodes of one `Padding` lie.

    `into`: the arrays, padded; `count`: requests of the step that lies there (0: something else does); `slots`: theirs. A step of
    as many requests over the same slots only moves on: what does not depend on contexts is left as it is.
    """

    into: StepInputs
    count: int = field(default=0, init=False)
    slots: tuple[int, ...] = field(default=(), init=False)

    def forget(self) -> None:
        """Something else was laid out in this memory."""
        self.count = 0

    def fill(self, batch: StepBatch, tables: IntArray, block_size: int, nowhere: int) -> None:
        """Lay out `batch` (`pure_decodes`), whose block tables are the rows of `tables` int32[., blocks].

        Sampled tokens of padding go to `nowhere`. As `step_inputs.lay_out` and `StepInputs.padded` would.
        """
        into, count = self.into, len(batch.query_lens)
        if count != self.count:
            self._begin(count, nowhere)
        if batch.slots != self.slots:
            into.row_slots[:count] = batch.slots
            self.slots = batch.slots
        context = np.array(batch.context_lens, dtype=np.int32)
        column = context // block_size
        first = np.arange(0, count * tables.shape[1], tables.shape[1])
        cells = tables.reshape(-1)
        block = cells.take(first + column)
        into.token_from[:count] = cells.take(first + (context - 1) // block_size)
        into.positions[:count] = into.decode_tiles[:count, 2] = context
        into.kv_slots[:count] = context + (block - column) * block_size
        into.sample_to[:count] = block

    def _begin(self, count: int, nowhere: int) -> None:
        """What depends on the number of requests alone, and all padding."""
        into, self.count, self.slots = self.into, count, ()
        requests = np.arange(count, dtype=np.int32)
        into.decode_tiles[:count, 0] = into.decode_tiles[:count, 1] = into.sample_rows[:count] = requests
        into.decode_tiles[:count, 3] = 1
        padding: Sequence[tuple[IntArray, int]] = (
            (into.token_from, -1), (into.positions, 0), (into.kv_slots, -1), (into.row_slots, NO_SLOT),
            (into.decode_tiles, -1), (into.sample_rows, 0), (into.sample_to, nowhere),
        )  # fmt: skip
        for array, value in padding:
            array[count:] = value
