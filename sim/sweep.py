"""Sweeps: one scenario over a grid of settings and seeds, on all cores or a Ray cluster, resumable at any moment.

Each run's row is written the moment it is there, under a name that its settings decide. A sweep that was killed starts
again with the same command: rows that are there are kept, the others are run.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import sys
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import pandas as pd
import tomli_w
from tqdm import tqdm

from backend.errors import BackendError
from backend.profile import profile_folder
from sim.errors import ScenarioError
from sim.run import execute
from sim.scenario import Scenario, find, from_tables, read_tables
from workloads.errors import WorkloadError

Tables = dict[str, object]
Setting = tuple[str, object]

EXECUTORS = ("local", "ray")


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep: its settings by TOML path, in order, and its seed."""

    settings: tuple[Setting, ...]
    seed: int

    @property
    def name(self) -> str:
        """What its row is called: decided by the settings and the seed alone."""
        text = json.dumps([self.settings, self.seed])
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def parse_sets(texts: Iterable[str]) -> dict[str, list[object]]:
    """`KEY=V1,V2,…` texts as values by key. A value is TOML; what is no TOML is a text."""
    sets: dict[str, list[object]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not (equals and key and "." in key and values):
            raise ScenarioError(f"--set {text}: must be TABLE.KEY=VALUE,VALUE,… such as engine.max_loras=1,2,4")
        if key in sets:
            raise ScenarioError(f"--set {key}: given twice; put all its values into one")
        if key == "run.seed":
            raise ScenarioError("--set run.seed: seeds are counted by --seeds, from the scenario's own on")
        sets[key] = _values(values)
        if len({json.dumps(value) for value in sets[key]}) < len(sets[key]):
            raise ScenarioError(f"--set {text}: a value comes twice")
    return sets


def _values(text: str) -> list[object]:
    """`1,[8, 16],"a, b"` as the items of a TOML array; where that is no TOML, text between commas."""
    try:
        return list(tomllib.loads(f"values = [{text}]")["values"])
    except tomllib.TOMLDecodeError:
        return [_value(value.strip()) for value in text.split(",")]


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def grid(sets: Mapping[str, Sequence[object]], seeds: Sequence[int]) -> list[Point]:
    """Every combination of settings with every seed; the last key and the seed change fastest."""
    settings = itertools.product(*([(key, value) for value in values] for key, values in sets.items()))
    return [Point(chosen, seed) for chosen in settings for seed in seeds]


def with_settings(tables: Tables, point: Point) -> Tables:
    """`tables` with the point's settings, each at its dotted path; tables on the way are made."""
    changed = copy.deepcopy(tables)
    for key, value in (*point.settings, ("run.seed", point.seed)):
        *way, last = key.split(".")
        table = changed
        for part in way:
            table = table.setdefault(part, {})  # type: ignore[assignment]
            if not isinstance(table, dict):
                raise ScenarioError(f"--set {key}: {part} is {table!r}, no table")
        table[last] = value
    return changed


def run_point(tables: Tables, name: str, base_dir: Path, point: Point) -> Tables:
    """The row of one run: settings, seed, `status` (ok, or refused with `error`: it cannot be served), and the summary."""
    row: Tables = {key: _cell(value) for key, value in point.settings} | {"seed": point.seed}
    try:
        scenario = from_tables(with_settings(tables, point), name, base_dir)
        _, summary, _ = execute(replace(scenario, step_rows=False))
    except (ScenarioError, WorkloadError, BackendError) as error:
        return row | {"status": "refused", "error": str(error)}
    kept = {key: value for key, value in summary.items() if key not in ("scenario", "seed", *row)}
    return row | {"status": "ok", "error": None} | kept


def _cell(value: object) -> object:
    """A setting as a column holds it: arrays and tables as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


class Store:
    """The rows of a sweep on disk: `sweep.toml` says of what, `rows/` has one JSON file a run."""

    def __init__(self, folder: Path, what: Tables) -> None:
        """Make or take up `folder`. Raises `ScenarioError` if it holds something else."""
        self.rows = folder / "rows"
        text = tomli_w.dumps(what)
        spec = folder / "sweep.toml"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A sweep that was killed while it began has left nothing, or the beginnings of `sweep.toml`.
            new = {file.name for file in folder.iterdir()} <= {spec.with_suffix(".partial").name}
            if new:
                _replace(spec, text)
            elif not (spec.is_file() and spec.read_text(encoding="utf-8") == text):
                raise ScenarioError(f"--out {folder}: exists already and is not this sweep; name a new directory")
            self.rows.mkdir(exist_ok=True)
        except OSError as error:
            raise ScenarioError(f"--out {folder}: cannot be written ({error})") from error

    def put(self, point: Point, row: Tables) -> None:
        """Keep a row: it is there whole, or not at all."""
        _replace(self.rows / f"{point.name}.json", json.dumps(row, allow_nan=False))

    def get(self, point: Point) -> Tables | None:
        """The row of `point`, if there is one."""
        file = self.rows / f"{point.name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _replace(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _runs(
    points: list[Point], tables: Tables, scenario: Scenario, jobs: int, executor: str
) -> Iterator[tuple[Point, Tables]]:
    """Rows as they come. A live GPU sweep asks for one GPU a run."""
    live = scenario.backend == "cuda"
    options: dict[str, object] = {}
    if executor == "ray":
        jobs, options = _ray_options(jobs, live)
    elif live:
        jobs = 1
    task = joblib.delayed(_named)
    runs = [task(tables, scenario.name, scenario.base_dir, point) for point in points]
    with joblib.parallel_config(n_jobs=jobs, **options):
        if executor == "local":
            yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(runs)
            return
        # Ray's backend hands results back by the list only: a few lists, so that a kill costs little.
        size = 2 * joblib.effective_n_jobs()
        for first in range(0, len(runs), size):
            yield from joblib.Parallel(batch_size=1)(runs[first : first + size])


def _ray_options(jobs: int, live: bool) -> tuple[int, dict[str, object]]:
    """Processes on the Ray cluster and how to get them. Each asks for a GPU if `live`: more than there are would wait."""
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise ScenarioError("--executor ray: Ray is not installed; pip install 'multilora-sim[ray]'") from error
    register_ray()  # type: ignore[no-untyped-call]
    if not ray.is_initialized():
        # The cluster that RAY_ADDRESS names or this machine belongs to, else one of this machine alone.
        ray.init(log_to_driver=False)
    if not live:
        return jobs, {"backend": "ray"}
    gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    if not gpus:
        raise ScenarioError("--executor ray: this Ray cluster has no GPU, and live runs take one each")
    return gpus if jobs < 0 else min(jobs, gpus), {"backend": "ray", "ray_remote_args": {"num_gpus": 1}}


def _named(tables: Tables, name: str, base_dir: Path, point: Point) -> tuple[Point, Tables]:
    return point, run_point(tables, name, base_dir, point)


def _read(base: Scenario, sets: Mapping[str, Sequence[object]]) -> dict[str, str]:
    """SHA-256 of what the runs read beside the scenario: rows of an older profile or trace are of another sweep."""
    profiles = [str(name) for name in (base.profile, *sets.get("backend.profile", ())) if name]
    paths = {name: profile_folder(name) for name in profiles} if base.backend == "profile" else {}
    traces = [str(path) for path in (base.workload.get("path"), *sets.get("workload.path", ())) if path]
    paths |= {path: base.base_dir / path for path in traces}
    digests = {}
    for name, path in paths.items():
        content = hashlib.sha256()
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                content.update(file.read_bytes())
        digests[name] = content.hexdigest()
    return digests


def _numbers(results: pd.DataFrame, others: Collection[str]) -> pd.DataFrame:
    """`results` with what no run has (a hit rate without adapters, say) as NaN in its columns of numbers."""
    empty = [name for name in results if name not in others and results[name].isna().all()]
    return results.astype(dict.fromkeys(empty, "float64"))


def sweep(
    scenario: str,
    sets: Mapping[str, Sequence[object]],
    *,
    out: Path,
    seeds: int = 1,
    jobs: int = -1,
    executor: str = "local",
    backend: str | None = None,
) -> pd.DataFrame:
    """Run the grid of `sets` over `scenario` (a file or a shipped name); one row a run and seed, in grid order.

    `seeds`: how many, from the scenario's own on. `jobs`: processes, -1 = one a core. The rows are kept in `out`, and
    taken up again from there; `out/results.parquet` has them all. Raises `ScenarioError` if not one run can be served.
    """
    if executor not in EXECUTORS or seeds < 1 or jobs == 0:
        raise ScenarioError(f"a sweep needs executor {' or '.join(EXECUTORS)}, seeds >= 1, jobs not 0")
    path = find(scenario)
    tables = read_tables(path)
    if backend is not None:
        tables = with_settings(tables, Point((("backend.kind", backend),), 0)) | {"run": tables.get("run", {})}
    base = from_tables(tables, path.stem, path.parent.absolute())
    if base.backend == "cuda" and executor == "local":
        # Told now: rows of a machine without a GPU would be kept as refused.
        from backend.measure import device_bytes

        device_bytes("cuda")
    points = grid(sets, [base.seed + i for i in range(seeds)])
    spec: Tables = {"name": base.name, "scenario": tables, "set": dict(sets), "seeds": seeds, "read": _read(base, sets)}
    store = Store(out, spec)
    missing = [point for point in points if store.get(point) is None]
    with tqdm(
        total=len(points), initial=len(points) - len(missing), unit="run", disable=not sys.stderr.isatty()
    ) as bar:
        for point, row in _runs(missing, tables, base, jobs, executor):
            store.put(point, row)
            bar.update()
    rows = [store.get(point) for point in points]
    results = _numbers(pd.DataFrame([row for row in rows if row is not None]), (*sets, "status", "error"))
    if (results["status"] != "ok").all():
        raise ScenarioError(f"not one of {len(results)} runs can be served; the first: {results['error'].iloc[0]}")
    partial = out / "results.partial"
    results.to_parquet(partial, index=False)
    partial.replace(out / "results.parquet")
    return results
