"""ServeGen client decompositions (Alibaba): per client, rates and gap laws by 600 s window and length histograms.

Requests are drawn from them; a client is an adapter. Y. Xiang et al., arXiv:2505.09999.
"""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from workloads import lengths
from workloads.arrivals import MOST_REQUESTS
from workloads.errors import WorkloadError

FloatArray = npt.NDArray[np.float64]
Histogram = dict[int, float]

WINDOW_S = 600.0


@dataclass(frozen=True, slots=True)
class Window:
    """One window of one client: `rate` requests/s from `start_s`, gaps by `pattern` (Gamma or Weibull, shape)."""

    start_s: float
    rate: float
    pattern: str
    shape: float


@dataclass(frozen=True, slots=True)
class Client:
    """One client: its windows, and its length histograms by start (empty where the slice has none)."""

    client: int
    windows: tuple[Window, ...]
    lengths: tuple[tuple[float, Histogram, Histogram], ...]

    def histograms(self, start_s: float) -> tuple[Histogram, Histogram] | None:
        """The prompt and output histograms in force at `start_s` (each holds until the next), else the first there are."""
        begun = [entry for entry in self.lengths if entry[0] <= start_s]
        entry = max(begun, key=lambda e: e[0]) if begun else min(self.lengths, key=lambda e: e[0], default=None)
        return entry[1:] if entry else None


def _windows(path: Path) -> tuple[Window, ...]:
    windows = []
    for line, text in enumerate(path.read_text().splitlines(), start=1):
        parts = text.split(",")
        try:
            start, rate, _, pattern, shape, _ = parts
            window = Window(float(start), float(rate), pattern, float(shape or 0))
        except ValueError as error:
            raise WorkloadError(f"{path}:{line}: {error}; want timestamp,rate,cv,pattern,arg1,arg2") from error
        if not all(map(math.isfinite, (window.start_s, window.rate, window.shape))):
            raise WorkloadError(f"{path}:{line}: timestamp, rate and arg1 must be finite; got {text}")
        if window.rate < 0 or (window.rate > 0 and (pattern not in ("Gamma", "Weibull", "") or window.shape < 0)):
            raise WorkloadError(f"{path}:{line}: rate must be >= 0 and pattern Gamma, Weibull or empty; got {text}")
        windows.append(window)
    return tuple(windows)


def _histogram(text: str) -> Histogram:
    """A histogram out of a string holding a Python dict {tokens: probability}."""
    table = ast.literal_eval(text)
    if not isinstance(table, dict):
        raise TypeError(f"{text[:40]} is no dict")
    for tokens, share in table.items():
        if not (isinstance(tokens, int) and tokens >= 0 and isinstance(share, int | float) and 0 <= share < math.inf):
            raise ValueError(f"{tokens!r}: {share!r} is no token count with its probability")
    return table


def _histograms(path: Path) -> tuple[tuple[float, Histogram, Histogram], ...]:
    try:
        entries = []
        for start, tables in json.loads(path.read_text()).items():
            prompt, output = (_histogram(tables[key]) for key in ("input_tokens", "output_tokens"))
            if prompt and output:
                entries.append((float(start), prompt, output))
        return tuple(entries)
    except (ValueError, KeyError, SyntaxError, AttributeError, TypeError) as error:
        raise WorkloadError(
            f"{path}: not a ServeGen dataset ({error}); want input_tokens and output_tokens by start"
        ) from error


def load(folder: Path) -> tuple[Client, ...]:
    """Every client of `folder` (`chunk-N-trace.csv`, `chunk-N-dataset.json`), by number."""
    found = {int(m[1]): f for f in folder.glob("chunk-*-trace.csv") if (m := re.match(r"chunk-(\d+)-trace", f.name))}
    if not found:
        raise WorkloadError(f"{folder}: no chunk-N-trace.csv in it; workload.path must name a ServeGen folder")
    clients = []
    for number, file in sorted(found.items()):
        dataset = folder / f"chunk-{number}-dataset.json"
        clients.append(Client(number, _windows(file), _histograms(dataset) if dataset.is_file() else ()))
    return tuple(clients)


def _arrivals(window: Window, count: int, rng: np.random.Generator) -> FloatArray:
    """`count` arrivals in a window: gaps of the fitted shape, rescaled to fill it."""
    if window.pattern == "Gamma" and window.shape > 0:
        gaps = rng.gamma(window.shape, 1.0, count + 1)
    elif window.pattern == "Weibull" and window.shape > 0:
        gaps = rng.weibull(window.shape, count + 1)
    else:
        gaps = rng.exponential(1.0, count + 1)
    times: FloatArray = np.cumsum(gaps)
    filled: FloatArray = window.start_s + times[:-1] / times[-1] * WINDOW_S
    return filled


def draw(
    clients: tuple[Client, ...], start_s: float, duration_s: float, rate_scale: float, rng: np.random.Generator
) -> tuple[FloatArray, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], tuple[str, ...]]:
    """Draw requests of [start_s, start_s + duration_s): (arrival_s from start, prompt, output, client index + 1, notes).

    `rate_scale` multiplies every client's rate. Clients without histograms use the pooled ones; notes say which.
    """
    pooled_prompt: Histogram = {}
    pooled_output: Histogram = {}
    for client in clients:
        for _, prompt, output in client.lengths[:1]:
            weight = sum(w.rate for w in client.windows)
            for pool, table in ((pooled_prompt, prompt), (pooled_output, output)):
                for tokens, share in table.items():
                    pool[tokens] = pool.get(tokens, 0.0) + weight * share
    asked = rate_scale * WINDOW_S * sum(window.rate for client in clients for window in client.windows)
    if asked > MOST_REQUESTS:
        raise WorkloadError(
            f"workload.rate_scale is {rate_scale:g}: {asked:.3g} requests, must be at most {MOST_REQUESTS}"
        )
    parts: list[tuple[FloatArray, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    fallen: set[int] = set()
    for index, client in enumerate(clients, start=1):
        for window in client.windows:
            if window.start_s + WINDOW_S <= start_s or window.start_s >= start_s + duration_s or window.rate == 0:
                continue
            expected = window.rate * WINDOW_S * rate_scale
            count = int(expected) + int(rng.random() < expected % 1)
            times = _arrivals(window, count, rng) - start_s
            times = times[(times >= 0) & (times < duration_s)]
            tables = client.histograms(window.start_s)
            if tables is None:
                if not pooled_prompt:
                    raise WorkloadError(f"workload: no ServeGen client has lengths, so client {client.client} has none")
                fallen.add(client.client)
                tables = (pooled_prompt, pooled_output)
            prompt_tokens, output_tokens = (lengths.empirical(t, len(times), rng) for t in tables)
            parts.append((times, prompt_tokens, output_tokens, np.full(len(times), index, dtype=np.int64)))
    if not parts:
        raise WorkloadError(f"workload: no ServeGen client sends anything in {start_s} … {start_s + duration_s} s")
    arrival, prompt_all, output_all, adapter = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(arrival, kind="stable")
    notes = tuple(f"client {c} has no length histogram here: pooled lengths of the others used" for c in sorted(fallen))
    return arrival[order], prompt_all[order], output_all[order], adapter[order], notes
