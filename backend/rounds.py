"""Measuring steps in rounds: every composition once, in an order of its own, round after round.

A step that is repeated on the spot meets a cooler GPU than it does in a loaded engine: measured in one mixed order, one
after the other without a pause, an H100's steps of many requests took 4 % longer. Rounds that were finished are kept in a
folder, so that a measurement that was killed goes on with the round it was in.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from tqdm import tqdm

from backend.base import StepBatch, StepTiming
from backend.compositions import again
from backend.errors import BackendError


class Executes(Protocol):
    """The part of a live backend that rounds need."""

    def hold_tables(self, batch: StepBatch) -> None:
        """Write the batch's block tables, as the step before would have."""
        ...

    def execute(self, batch: StepBatch) -> StepTiming:
        """Run one step."""
        ...


class Rounds:
    """Finished rounds in `folder`; `facts` say what is measured, and must be the same for a measurement to go on.

    Raises `BackendError` if the folder holds rounds of another measurement.
    """

    def __init__(self, folder: Path, facts: Mapping[str, object]) -> None:
        self.folder = folder
        text = json.dumps(dict(facts), indent=1, sort_keys=True, default=str) + "\n"
        file = folder / "facts.json"
        if not folder.exists():
            folder.mkdir(parents=True)
            file.write_text(text)
        elif not file.is_file() or file.read_text() != text:
            raise BackendError(f"{folder}: holds rounds of another measurement; remove it, or name another --out")

    def _file(self, number: int) -> Path:
        return self.folder / f"round-{number}.parquet"

    def done(self, number: int) -> pd.DataFrame | None:
        """A finished round: `device_s`, `host_s` of each composition; None if it was not finished."""
        return pd.read_parquet(self._file(number)) if self._file(number).is_file() else None

    def keep(self, number: int, timings: pd.DataFrame) -> None:
        """Write a finished round; it appears whole."""
        part = self._file(number).with_suffix(".part")
        timings.to_parquet(part, index=False)
        part.rename(self._file(number))

    def remove(self) -> None:
        """The measurement is complete: forget its rounds."""
        shutil.rmtree(self.folder)


def measure_rounds(
    backend: Executes, batches: Sequence[StepBatch], count: int, *, rounds: Rounds, seed: int = 0
) -> pd.DataFrame:
    """Median seconds of each batch over `count` rounds: `device_s, host_s, elapsed_s`, and `p10_s, p90_s` of elapsed.

    What is not yet in `rounds` is executed, after a first pass over all batches that is not timed (graphs are captured,
    kernels compiled).
    """
    missing = [number for number in range(count) if rounds.done(number) is None]
    if missing:
        for batch in tqdm(batches, desc="first use", disable=not sys.stderr.isatty(), unit="step"):
            backend.execute(batch)
    for number in missing:
        rng = np.random.default_rng((seed, number))
        rounds.keep(number, _one_round(backend, batches, rng, f"round {number + 1} of {count}"))
    tables = [table for number in range(count) if (table := rounds.done(number)) is not None]
    device = np.stack([table["device_s"].to_numpy() for table in tables])
    elapsed = device + np.stack([table["host_s"].to_numpy() for table in tables])
    device_s, elapsed_s = np.median(device, 0), np.median(elapsed, 0)
    p10_s, p90_s = np.quantile(elapsed, (0.1, 0.9), axis=0)
    columns = {"device_s": device_s, "host_s": np.maximum(0.0, elapsed_s - device_s), "elapsed_s": elapsed_s}
    return pd.DataFrame({**columns, "p10_s": p10_s, "p90_s": p90_s})


def _one_round(backend: Executes, batches: Sequence[StepBatch], rng: np.random.Generator, name: str) -> pd.DataFrame:
    timings: list[StepTiming | None] = [None] * len(batches)
    for i in tqdm(rng.permutation(len(batches)).tolist(), desc=name, disable=not sys.stderr.isatty(), unit="step"):
        backend.hold_tables(batches[i])
        timings[i] = backend.execute(again(batches[i]))
    rows = [(timing.device_s, timing.host_s) for timing in timings if timing is not None]
    return pd.DataFrame(rows, columns=["device_s", "host_s"])
