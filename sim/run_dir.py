"""A run directory: it appears whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pandas as pd
import tomli_w

from sim.errors import ScenarioError
from sim.plots import run_figure
from sim.row_file import RowFile, thinned
from sim.tables import RunTables

if TYPE_CHECKING:
    from sim.scenario import Scenario


def choose(name: str, out: Path | None) -> Path:
    """The directory that results called `name` will have: `out`, which must be new, or a fresh one under `runs/`.

    Nothing is made yet, but a place that cannot be written to is told before the work and not after it.
    """
    if out is None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
        out = Path("runs") / f"{name}-{stamp}"
    if out.exists():
        raise ScenarioError(f"--out {out}: exists already; name a new directory")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ScenarioError(f"--out {out}: {above} is no directory that can be written to")
    return out


class RunFiles:
    """A run's directory in the making: rows come as the run goes on, so that memory does not grow with its steps.

    Leave it without `finish`, and nothing is left. Raises `ScenarioError` where it cannot be written to.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._partial = partial_of(out)
        self._steps = RowFile(self._partial / "steps.parquet")
        self._moves = RowFile(self._partial / "moves.parquet")

    def __enter__(self) -> Self:
        shutil.rmtree(self._partial, ignore_errors=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._steps.close()
        self._moves.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def rows(self, steps: pd.DataFrame, moves: pd.DataFrame) -> None:
        """Step rows and moves, as they come."""
        with _told(self.out):
            self._partial.mkdir(parents=True, exist_ok=True)  # not before there is something to keep
            self._steps.write(steps)
            self._moves.write(moves)

    def finish(self, scenario: Scenario, tables: RunTables, summary: Mapping[str, object], caption: str) -> None:
        """Write all the rest, and have the directory appear."""
        folder = self._partial
        with _told(self.out):
            self._steps.close()
            self._moves.close()
            (folder / "scenario.toml").write_text(tomli_w.dumps(scenario.resolved()))
            (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
            tables.requests.to_parquet(folder / "requests.parquet", index=False)
            tables.adapters.to_parquet(folder / "adapters.parquet", index=False)
            if tables.replicas is not None:
                tables.replicas.to_parquet(folder / "replicas.parquet", index=False)
            run_figure(replace(tables, steps=thinned(self._steps.path)), caption, folder / "figure.png")
            folder.rename(self.out)


def read_tables(folder: Path) -> RunTables:
    """The tables of a run directory. Raises OSError, KeyError or ValueError if it has none."""
    requests, steps, adapters, moves = (
        pd.read_parquet(folder / f"{name}.parquet") for name in ("requests", "steps", "adapters", "moves")
    )
    file = folder / "replicas.parquet"
    replicas = pd.read_parquet(file) if file.is_file() else None
    horizon_s = float(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["duration_s"])
    return RunTables(requests, steps, adapters, horizon_s, moves, replicas)


def partial_of(out: Path) -> Path:
    """Where a directory is made before it appears."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """An `OSError` inside is a `ScenarioError` that names the directory."""
    try:
        yield
    except OSError as error:
        raise ScenarioError(f"--out {out}: cannot be written ({error})") from error


def publish(out: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` write files beside `out`, and move them there in one step. Raises `ScenarioError` if that fails."""
    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _told(out):
            partial.mkdir(parents=True)
            fill(partial)
            partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
