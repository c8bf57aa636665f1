"""A Parquet file of rows that come bit by bit, and a look at it from afar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

GROUP = 1 << 17
"""Rows of a group, but for the last: the file does not tell in which pieces its rows came."""

LOOKED_AT = 20_000
"""Rows that a figure shows at most."""


class RowFile:
    """`path` is there from the first rows on, and whole after `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[pa.Table] = []
        self._count = 0
        self._writer: pq.ParquetWriter | None = None

    def write(self, rows: pd.DataFrame) -> None:
        """Take `rows`; whole groups go to the file."""
        table = pa.Table.from_pandas(rows, preserve_index=False)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, table.schema)
        self._waiting.append(table)
        self._count += len(table)
        if self._count >= GROUP:
            self._write(self._count // GROUP * GROUP)

    def _write(self, count: int) -> None:
        assert self._writer is not None
        whole = pa.concat_tables(self._waiting)
        self._writer.write_table(whole.slice(0, count), row_group_size=GROUP)
        self._waiting, self._count = [whole.slice(count)], self._count - count

    def close(self) -> None:
        """Write what is left."""
        if self._writer is None:
            return
        if self._count:
            self._write(self._count)
        self._writer.close()
        self._writer = None


def thinned(steps: Path) -> pd.DataFrame:
    """The steps of a file, or one of every so many: the peaks of what it shows, all loads, from the first start to the last end."""
    file = pq.ParquetFile(steps)
    stride = -(-max(1, file.metadata.num_rows) // LOOKED_AT)
    columns = [name for name in ("replica", "start_s", *_PEAKS, *_COUNTED) if name in file.schema_arrow.names]
    parts: list[pd.DataFrame] = []
    for batch in file.iter_batches(batch_size=GROUP // stride * stride, columns=columns):
        frame = batch.to_pandas()
        first = frame.iloc[::stride].reset_index(drop=True)
        starts = np.arange(0, len(frame), stride)
        for name in _COUNTED:
            first[name] = np.add.reduceat(frame[name].to_numpy(), starts)
        for name in _PEAKS if "replica" not in first else ():  # a fleet's steps lie side by side
            first[name] = np.maximum.reduceat(frame[name].to_numpy(), starts)
        parts.append(first)
    return pd.concat(parts, ignore_index=True) if parts else file.schema_arrow.empty_table().to_pandas()


_PEAKS = ("end_s", "running", "waiting", "used_blocks", "free_blocks")
_COUNTED = ("activations", "stages")
