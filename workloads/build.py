"""A scenario's `[workload]` table turned into requests."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from workloads import arrivals, lengths, popularity
from workloads.errors import WorkloadError
from workloads.requests import RequestTable
from workloads.traces import azure_llm, servegen
from workloads.traces import table as trace_table
from workloads.workload import Workload

SAMPLES = {"azure_conv": "azure_conv_sample.csv", "servegen_m_large": "servegen_m_large"}
_SOURCE = ("path", "sample", "start_s", "duration_s")
_DRAWN = ("popularity", "base_share")
KEYS = {
    "synthetic": ("arrival", "rate_rps", "cv", "duration_s", "prompt", "output", *_DRAWN),
    "azure_llm": (*_SOURCE, "rate_scale", *_DRAWN),
    "servegen": (*_SOURCE, "rate_scale"),
    "table": ("path", "duration_s"),
}


class _Table:
    """A TOML table with typed reads; every error names the key."""

    def __init__(self, data: Mapping[str, object], where: str, known: tuple[str, ...]) -> None:
        self.data = data
        self.where = where
        for key in data:
            if key not in known:
                raise WorkloadError(f"{where}.{key}: unknown key; known: {', '.join(known)}")

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A finite number above zero (or zero, where that means something); infinite only as a default."""
        value = self.data.get(key, default)
        want = f"must be a number {'>=' if zero else '>'} 0"
        if value is None:
            raise WorkloadError(f"{self.where}.{key} is missing, {want}")
        sound = isinstance(value, int | float) and not isinstance(value, bool)
        number = float(value) if isinstance(value, int | float) else 0.0
        finite = number < float("inf") or key not in self.data
        if not (sound and finite and (number > 0 or (zero and number == 0))):
            raise WorkloadError(f"{self.where}.{key} is {value!r}, {want}")
        return number

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number of at least one."""
        value = self.data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise WorkloadError(
                f"{self.where}.{key} is {'missing' if value is None else repr(value)}, must be a whole number >= 1"
            )
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.data.get(key, default)
        if not isinstance(value, str):
            raise WorkloadError(f"{self.where}.{key} is {value!r}, must be a text")
        return value

    def sub(self, key: str, known: Mapping[str, tuple[str, ...]]) -> tuple[str, _Table]:
        """A nested table with a `kind`, and its kind."""
        value = self.data.get(key)
        where = f"{self.where}.{key}"
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(kind, str) or kind not in known:
            raise WorkloadError(f"{where} must be a table with kind = one of {', '.join(known)}; got {value!r}")
        return kind, _Table(value, where, ("kind", *known[kind]))


def _lengths(table: _Table, key: str, size: int, rng: np.random.Generator, base_dir: Path) -> npt.NDArray[np.int64]:
    kinds = {"fixed": ("tokens",), "lognormal": ("median", "sigma", "min", "max"), "empirical": ("path",)}
    kind, sub = table.sub(key, kinds)
    if kind == "fixed":
        return lengths.fixed(sub.whole("tokens"), size)
    if kind == "empirical":
        return lengths.empirical(lengths.read_histogram(base_dir / sub.text("path")), size, rng)
    low, high = sub.whole("min", 1), sub.whole("max", 1 << 20)
    return lengths.lognormal(sub.number("median"), sub.number("sigma", zero=True), low, high, size, rng)


def _adapters(table: _Table, count: int | None, size: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    if not count:
        raise WorkloadError("adapters.count is missing, must be >= 1 where the workload draws adapters")
    kinds = {"uniform": (), "zipf": ("s",), "zipf_mandelbrot": ("s", "q"), "slora_power": ("alpha",)}
    kind, sub = table.sub("popularity", kinds)
    if kind == "slora_power":
        drawn = popularity.slora_power(count, size, sub.number("alpha"), rng)
    else:
        s = 0.0 if kind == "uniform" else sub.number("s")
        q = sub.number("q", zero=True) if kind == "zipf_mandelbrot" else 0.0
        drawn = popularity.zipf_mandelbrot(count, size, s, q, rng)
    return popularity.with_base(drawn, table.number("base_share", 0.0, zero=True), rng)


def _source(table: _Table, base_dir: Path) -> Path:
    if "sample" in table.data:
        name = table.text("sample")
        if name not in SAMPLES or "path" in table.data:
            raise WorkloadError(
                f"{table.where}.sample is {name}, must be one of {', '.join(SAMPLES)}, and without path"
            )
        return Path(str(files("workloads") / "data" / SAMPLES[name]))
    return base_dir / table.text("path")


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"adapter-{i}" for i in range(1, count + 1))


def build_workload(data: Mapping[str, object], *, adapter_count: int | None, seed: int, base_dir: Path) -> Workload:
    """Requests of a `[workload]` table. `adapter_count`: how many adapters to draw from (None: the trace's own).

    Paths are relative to `base_dir`. Raises `WorkloadError` naming the key, or file and line.
    """
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in KEYS:
        raise WorkloadError(f"workload.kind is {kind!r}, must be one of {', '.join(KEYS)}")
    table = _Table(data, "workload", ("kind", *KEYS[kind]))
    rng = np.random.default_rng(seed)
    maker = {"synthetic": _synthetic, "azure_llm": _azure, "servegen": _servegen, "table": _table}[kind]
    workload = maker(table, adapter_count, rng, base_dir)
    if len(workload.requests) == 0:
        raise WorkloadError("workload: no request in the chosen time; lengthen duration_s or raise the rate")
    return workload


def _synthetic(table: _Table, count: int | None, rng: np.random.Generator, base_dir: Path) -> Workload:
    process = table.text("arrival", "poisson")
    if process not in ("poisson", "gamma") or (process == "poisson" and "cv" in table.data):
        raise WorkloadError(f"workload.arrival is {process}, must be poisson (without cv) or gamma (with cv)")
    cv = table.number("cv") if process == "gamma" else 1.0
    times = arrivals.gamma(table.number("rate_rps"), table.number("duration_s"), cv, rng)
    prompt, output = (_lengths(table, key, len(times), rng, base_dir) for key in ("prompt", "output"))
    adapter = _adapters(table, count, len(times), rng)
    return Workload(RequestTable(times, prompt, output, adapter), _names(count or 0))


def _azure(table: _Table, count: int | None, rng: np.random.Generator, base_dir: Path) -> Workload:
    times, prompt, output = azure_llm.load(_source(table, base_dir))
    times = (times - table.number("start_s", 0.0, zero=True)) / table.number("rate_scale", 1.0)
    keep = (times >= 0) & (times < table.number("duration_s", float("inf")))
    times, prompt, output = times[keep], prompt[keep], output[keep]
    adapter = _adapters(table, count, len(times), rng)
    notes = ("the trace names no adapters: they are drawn independently of it",)
    return Workload(RequestTable(times, prompt, output, adapter), _names(count or 0), notes)


def _servegen(table: _Table, count: int | None, rng: np.random.Generator, base_dir: Path) -> Workload:
    clients = servegen.load(_source(table, base_dir))
    if count is not None and count != len(clients):
        raise WorkloadError(f"adapters.count is {count}, but the trace has {len(clients)} clients; leave the key out")
    start, duration = table.number("start_s", 0.0, zero=True), table.number("duration_s")
    times, prompt, output, adapter, notes = servegen.draw(
        clients, start, duration, table.number("rate_scale", 1.0), rng
    )
    names = tuple(f"client-{c.client}" for c in clients)
    return Workload(RequestTable(times, prompt, output, adapter), names, notes)


def _table(table: _Table, count: int | None, _: np.random.Generator, base_dir: Path) -> Workload:
    requests, names = trace_table.load(_source(table, base_dir))
    if count is not None and count != len(names):
        raise WorkloadError(f"adapters.count is {count}, but the trace names {len(names)} adapters; leave the key out")
    within = int(np.searchsorted(requests.arrival_s, table.number("duration_s", float("inf"))))
    return Workload(requests.take(slice(within)), names)
