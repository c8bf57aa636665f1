"""Synthetic traffic: `workload.kind = "synthetic"` (one stream over the catalogue) and `"clients"` (a stream each)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from workloads import arrivals, dynamics, locality, popularity, sessions
from workloads.errors import WorkloadError
from workloads.reader import Reader, draw_lengths
from workloads.requests import RequestTable
from workloads.workload import Workload

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

STREAM = ("rate_rps", "rate", "arrival", "cv")
IDENTITY = ("popularity", "locality", "drift", "churn", "base_share")
SYNTHETIC = ("duration_s", "prompt", "output", "sessions", *STREAM, *IDENTITY)
CLIENTS = ("duration_s", "clients")
CLIENT = ("name", "prompt", "output", *STREAM)

RATES: Mapping[str, tuple[str, ...]] = {
    "piecewise": ("start_s", "rps"),
    "diurnal": ("rps", "amplitude", "period_s", "phase_s"),
    "flash_crowd": ("rps", "factor", "start_s", "length_s"),
    "mmpp": ("rps", "mean_s"),
}
POPULARITY: Mapping[str, tuple[str, ...]] = {
    "uniform": (),
    "zipf": ("s",),
    "zipf_mandelbrot": ("s", "q"),
    "slora_power": ("alpha",),
    "punica": ("shape",),
    "empirical": ("weights", "path"),
}
LOCALITY: Mapping[str, tuple[str, ...]] = {"lru_stack": ("distances",), "repeat": ("share", "mean_gap")}


def draw_arrivals(table: Reader, duration_s: float, rng: np.random.Generator) -> FloatArray:
    """Arrivals of one stream."""
    process = table.text("arrival", "poisson")
    if process not in arrivals.PROCESSES or (process == "poisson") != ("cv" not in table.data):
        raise WorkloadError(
            f"{table.where}.arrival is {process}, must be poisson (without cv), gamma or weibull (with cv)"
        )
    cv = table.number("cv") if process != "poisson" else 1.0
    return arrivals.draw(_rate(table, duration_s, rng), process, cv, rng)


def _rate(table: Reader, duration_s: float, rng: np.random.Generator) -> arrivals.Rate:
    if ("rate" in table.data) == ("rate_rps" in table.data):
        raise WorkloadError(f"{table.where}.rate_rps (a number) or {table.where}.rate (a table): give one of them")
    if "rate_rps" in table.data:
        return arrivals.constant(table.number("rate_rps"), duration_s)
    kind, sub = table.choice("rate", RATES)
    if kind == "piecewise":
        start, rps = sub.numbers("start_s"), sub.numbers("rps")
        if len(start) != len(rps) or start[0] != 0 or (np.diff(start) <= 0).any():
            raise WorkloadError(f"{sub.where}.start_s must rise from 0, with one rps each")
        return arrivals.piecewise(start, rps, duration_s)
    if kind == "mmpp":
        return arrivals.mmpp(sub.numbers("rps"), sub.numbers("mean_s"), duration_s, rng)
    rps = sub.number("rps")  # type: ignore[assignment]
    if kind == "diurnal":
        phase, period = sub.number("phase_s", 0.0, zero=True), sub.number("period_s", 86400.0)
        return arrivals.diurnal(float(rps), sub.number("amplitude", zero=True), period, phase, duration_s)
    crowd = sub.number("factor"), sub.number("start_s", zero=True), sub.number("length_s")
    return arrivals.flash_crowd(float(rps), *crowd, duration_s)


def shares(table: Reader, n: int) -> FloatArray:
    """Shares of ranks by the table's `popularity`."""
    kind, sub = table.choice("popularity", POPULARITY)
    if kind == "slora_power":
        return popularity.slora_power(n, sub.number("alpha"))
    if kind == "punica":
        return popularity.punica(n, sub.text("shape"))
    if kind == "empirical":
        if ("weights" in sub.data) == ("path" in sub.data):
            raise WorkloadError(f"{sub.where}.weights (a list) or {sub.where}.path (a CSV): give one of them")
        p = (
            popularity.shares(sub.numbers("weights"))
            if "weights" in sub.data
            else popularity.read_weights(sub.path("path"))
        )
        if len(p) != n:
            raise WorkloadError(f"{sub.where} has {len(p)} weights, there are {n} adapters")
        return p
    s = 0.0 if kind == "uniform" else sub.number("s")
    return popularity.zipf_mandelbrot(n, s, sub.number("q", zero=True) if kind == "zipf_mandelbrot" else 0.0)


def draw_adapters(table: Reader, count: int | None, arrival_s: FloatArray, rng: np.random.Generator) -> IntArray:
    """The adapter of each arrival, int64[n], 0 = base: popularity, then locality, then drift or churn, then base."""
    if not count:
        raise WorkloadError("adapters.count is missing, must be >= 1 where the workload draws adapters")
    size = len(arrival_s)
    periods, epoch, n = 1, np.zeros(size, dtype=np.int64), count
    changing = table.table("churn", ("period_s", "share", "alive")) or table.table("drift", ("period_s", "top", "keep"))
    if "churn" in table.data and "drift" in table.data:
        raise WorkloadError(f"{table.where}.drift and {table.where}.churn: give one of them")
    if changing is not None:
        epoch = dynamics.epochs(arrival_s, changing.number("period_s"))
        periods = int(epoch.max(initial=0)) + 1
    if changing is not None and "churn" in table.data:
        n = changing.whole("alive")
        ids = dynamics.churn(count, periods, n, changing.number("share", zero=True), rng)
    elif changing is not None:
        ids = dynamics.drift(count, periods, changing.whole("top", 10), changing.number("keep", zero=True), rng)
    else:
        ids = np.arange(1, n + 1)[None]
    return popularity.with_base(
        ids[epoch, _ranks(table, n, size, rng)], table.number("base_share", 0.0, zero=True), rng
    )


def _ranks(table: Reader, n: int, size: int, rng: np.random.Generator) -> IntArray:
    kind, sub = table.choice("locality", LOCALITY) if "locality" in table.data else ("none", table)
    if kind == "lru_stack":
        if "popularity" in table.data:
            raise WorkloadError(f"{table.where}.popularity has no say under lru_stack locality; leave one of them out")
        return locality.lru_stack(n, size, sub.numbers("distances"), rng)
    p = shares(table, n)
    chosen = table.data["popularity"]
    distinct = isinstance(chosen, Mapping) and chosen.get("shape") == "distinct"
    ranks = popularity.in_turn(n, size) if distinct else popularity.draw(p, size, rng)
    return (
        locality.repeat(ranks, sub.number("share", zero=True), sub.number("mean_gap"), rng)
        if kind == "repeat"
        else ranks
    )


def names(count: int) -> tuple[str, ...]:
    """`adapter-1` … `adapter-count`."""
    return tuple(f"adapter-{i}" for i in range(1, count + 1))


def synthetic(table: Reader, count: int | None, rng: np.random.Generator) -> Workload:
    """One stream of requests, or of sessions."""
    duration_s = table.number("duration_s")
    times = draw_arrivals(table, duration_s, rng)
    adapter = draw_adapters(table, count, times, rng)
    if "sessions" in table.data:
        requests = _sessions(table, times, adapter, rng)
        inside = int(np.searchsorted(requests.arrival_s, duration_s))
        notes = ("a session's turns follow one another by think_s from arrival to arrival",)
        return Workload(requests.take(slice(inside)), names(count or 0), notes)
    prompt, output = (draw_lengths(table, key, len(times), rng) for key in ("prompt", "output"))
    return Workload(RequestTable(times, prompt, output, adapter), names(count or 0))


def _sessions(table: Reader, times: FloatArray, adapter: IntArray, rng: np.random.Generator) -> RequestTable:
    sub = table.table("sessions", ("turns", "think_s", "system_tokens", "max_tokens"))
    if sub is None:
        raise WorkloadError(f"{table.where}.sessions is missing")
    turns = sessions.turn_counts(len(times), sub.number("turns"), rng)
    said, output = (draw_lengths(table, key, int(turns.sum()), rng) for key in ("prompt", "output"))
    return sessions.unfold(
        times, adapter, turns, said, output,
        think_s=sub.number("think_s", zero=True), system_tokens=sub.whole("system_tokens", 0, least=0),
        max_tokens=sub.whole("max_tokens"), rng=rng,
    )  # fmt: skip


def clients(table: Reader, count: int | None, rng: np.random.Generator) -> Workload:
    """A stream for each client, which is an adapter: its own rate, burstiness and lengths. The name "" is the base model."""
    streams = table.tables("clients", CLIENT)
    labels = [stream.text("name") for stream in streams]
    adapters = [label for label in labels if label]
    if len(set(labels)) < len(labels):
        raise WorkloadError(f"{table.where}.clients: each name may come once")
    if count is not None and count != len(adapters):
        raise WorkloadError(f"adapters.count is {count}, but there are {len(adapters)} clients; leave the key out")
    duration_s = table.number("duration_s")
    parts = []
    for stream, label in zip(streams, labels, strict=True):
        times = draw_arrivals(stream, duration_s, rng)
        prompt, output = (draw_lengths(stream, key, len(times), rng) for key in ("prompt", "output"))
        adapter = adapters.index(label) + 1 if label else 0
        parts.append((times, prompt, output, np.full(len(times), adapter, dtype=np.int64)))
    arrival_s, prompt, output, adapter_ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(arrival_s, kind="stable")
    return Workload(RequestTable(arrival_s[order], prompt[order], output[order], adapter_ids[order]), tuple(adapters))
