"""A run directory: it appears whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

from sim.errors import ScenarioError
from sim.plots import run_figure

if TYPE_CHECKING:
    from sim.scenario import Scenario
    from sim.tables import RunTables


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


def write(out: Path, scenario: Scenario, tables: RunTables, summary: Mapping[str, object], caption: str) -> None:
    """Write a run's files."""

    def fill(folder: Path) -> None:
        (folder / "scenario.toml").write_text(tomli_w.dumps(scenario.resolved()))
        (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
        tables.requests.to_parquet(folder / "requests.parquet", index=False)
        tables.steps.to_parquet(folder / "steps.parquet", index=False)
        tables.adapters.to_parquet(folder / "adapters.parquet", index=False)
        tables.moves.to_parquet(folder / "moves.parquet", index=False)
        if tables.replicas is not None:
            tables.replicas.to_parquet(folder / "replicas.parquet", index=False)
        run_figure(tables, caption, folder / "figure.png")

    publish(out, fill)


def read_tables(folder: Path, horizon_s: float) -> RunTables:
    """The tables of a run directory. Raises OSError or ValueError if it has none."""
    import pandas as pd

    from sim.tables import RunTables

    requests, steps, adapters, moves = (
        pd.read_parquet(folder / f"{name}.parquet") for name in ("requests", "steps", "adapters", "moves")
    )
    file = folder / "replicas.parquet"
    replicas = pd.read_parquet(file) if file.is_file() else None
    return RunTables(requests, steps, adapters, horizon_s, moves, replicas)


def publish(out: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` write files beside `out`, and move them there in one step. Raises `ScenarioError` if that fails."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ScenarioError(f"--out {out}: cannot be written ({error})") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
