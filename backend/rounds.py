"""Measuring steps in rounds: every composition, in an order of its own, round after round.

How long a step takes depends on what ran before it (`backend.heat`). So they are mixed in one order without a pause, as an
engine's are, and in another one each round, which tells what the steps before did; and decodes come `DECODE_TURNS` times in
each round, one after the other: each once, the GPU would be at prompts most of the time, and every step of another CUDA graph
than the one before, which an engine's decodes seldom are. The host takes longer for such a step, so that the first of them is
left out of its mean. Adapters are read and copied among them (`backend.load_turns`).
Rounds that were finished are kept in a folder, so that a measurement that was killed goes on with the round it was in.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from tqdm import tqdm

from backend.base import StepBatch, StepTiming
from backend.compositions import again
from backend.errors import BackendError
from backend.load_turns import LoadTurns, Move

DECODE_TURNS = 4
"""How often a round executes each composition that has no prompt, on end."""


COLUMNS = ["composition", "start_s", "device_s", "host_s", "on_end"]
"""Of a finished round, a row a step in their order: the composition's number, when it began on the host's clock, seconds, and whether the
step before had the same composition.
"""


class Executes(Protocol):
    """The part of a live backend that rounds need."""

    def hold_tables(self, batch: StepBatch) -> None:
        """Write the batch's block tables, as the step before would have."""
        ...

    def is_new(self, batch: StepBatch) -> bool:
        """Whether the step's first use takes longer than later ones."""
        ...

    def prepare(self, batch: StepBatch) -> object:
        """Do what belongs to that first use."""
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
        text = json.dumps({**facts, "columns": COLUMNS}, indent=1, sort_keys=True, default=str) + "\n"
        file = folder / "facts.json"
        if not folder.exists():
            folder.mkdir(parents=True)
            file.write_text(text)
        elif not file.is_file() or file.read_text() != text:
            raise BackendError(f"{folder}: holds rounds of another measurement; remove it, or name another --out")

    def _file(self, number: int) -> Path:
        return self.folder / f"round-{number}.parquet"

    def done(self, number: int) -> pd.DataFrame | None:
        """A finished round, with `COLUMNS`; None if it was not finished."""
        return pd.read_parquet(self._file(number)) if self._file(number).is_file() else None

    def loads(self, number: int) -> pd.DataFrame:
        """What `LoadTurns` moved in a finished round: columns `kind, rank, nbytes, elapsed_s`."""
        return pd.read_parquet(self.folder / f"loads-{number}.parquet")

    def keep(self, number: int, timings: pd.DataFrame, moves: list[Move]) -> None:
        """Write a finished round; it appears whole."""
        pd.DataFrame(moves, columns=Move._fields).to_parquet(self.folder / f"loads-{number}.parquet", index=False)
        part = self._file(number).with_suffix(".part")
        timings.to_parquet(part, index=False)
        part.rename(self._file(number))

    def remove(self) -> None:
        """The measurement is complete: forget its rounds."""
        shutil.rmtree(self.folder)


def measure_rounds(
    backend: Executes,
    batches: Sequence[StepBatch],
    count: int,
    *,
    rounds: Rounds,
    between: Callable[[], None] = lambda: None,
    loads: LoadTurns | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The steps of `count` rounds in their order: `COLUMNS` and `round`.

    What is not yet in `rounds` is executed, with `between` before every step and `loads` at even distances, after a first
    pass over all batches that are new, which is not timed (graphs are captured, kernels compiled).
    """
    missing = [number for number in range(count) if rounds.done(number) is None]
    if missing:
        for batch in tqdm(batches, desc="first use", disable=not sys.stderr.isatty(), unit="step"):
            if backend.is_new(batch):
                backend.prepare(batch)
    for number in missing:
        rng = np.random.default_rng((seed, number))
        asides = loads.of_round(number) if loads else []
        rounds.keep(number, *_one_round(backend, batches, between, asides, rng, f"round {number + 1} of {count}"))
    done = {number: table for number in range(count) if (table := rounds.done(number)) is not None}
    return pd.concat([table.assign(round=number) for number, table in done.items()], ignore_index=True)


def seconds_of(steps: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each composition: the median `device_s`, the mean `host_s`, their sum `elapsed_s`, and `p10_s, p90_s` of the whole
    step. The host's times have a tail, and a run is as long as all of them together; of steps that came several times on end
    the first is not in the mean.
    """
    steps = steps.assign(elapsed_s=steps["device_s"] + steps["host_s"])
    of = steps.groupby("composition")
    host = steps[steps["on_end"]].groupby("composition")["host_s"].mean().combine_first(of["host_s"].mean())
    seconds = pd.DataFrame({"device_s": of["device_s"].median(), "host_s": host})
    seconds["elapsed_s"] = seconds["device_s"] + seconds["host_s"]
    for share in (10, 90):
        seconds[f"p{share}_s"] = of["elapsed_s"].quantile(share / 100)
    return seconds.reset_index(drop=True)


def _order(batches: Sequence[StepBatch], rng: np.random.Generator) -> list[int]:
    """The compositions of a round."""
    return [
        i
        for i in rng.permutation(len(batches)).tolist()
        for _ in range(DECODE_TURNS if max(batches[i].query_lens) == 1 else 1)
    ]


def _one_round(
    backend: Executes,
    batches: Sequence[StepBatch],
    between: Callable[[], None],
    asides: Sequence[Callable[[], list[Move]]],
    rng: np.random.Generator,
    name: str,
) -> tuple[pd.DataFrame, list[Move]]:
    rows: list[tuple[int, float, float, float, bool]] = []
    moves: list[Move] = []
    order, due = _order(batches, rng), defaultdict(list)
    for k, aside in enumerate(asides):
        due[k * len(order) // len(asides)].append(aside)
    for at, i in enumerate(tqdm(order, desc=name, disable=not sys.stderr.isatty(), unit="step")):
        for aside in due.get(at, ()):
            moves += aside()
        backend.hold_tables(batches[i])
        between()
        step, start_s = again(batches[i]), time.perf_counter()
        timing = backend.execute(step)
        rows.append((i, start_s, timing.device_s, timing.host_s, bool(rows) and rows[-1][0] == i))
    return pd.DataFrame(rows, columns=COLUMNS), moves
