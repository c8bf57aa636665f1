"""The parts of a decode step, each measured alone on a device, beside whole steps and a loop over adapters.

Attention, shrink and expand are the kernels of a whole step and nothing else; parts that overlap in a step add up to more
than the step. The loop is what SGMV replaces: one pair of torch matrix products for each adapter, module and layer.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from tqdm import tqdm

from backend.base import NO_SLOT, EngineLimits, StepBatch
from backend.compositions import Room, compose
from backend.errors import BackendError
from backend.geometry import floor_bytes
from backend.live import LiveBackend
from backend.measure import describe_device, device_bytes
from backend.memory import memory_plan
from backend.sgmv.reference import expand_reference, shrink_reference

if TYPE_CHECKING:
    from backend.geometry import ModelGeometry

BLOCK = 16
REPEATS = 20
COLD_BYTES = 160e6
"""A timed loop goes through at least so many bytes of adapters, or all layers: a GPU's cache must not hold them."""

COPY_BYTES = {"cuda": 1 << 31, "cpu": 1 << 28}


@dataclass(frozen=True, slots=True)
class Setting:
    """A decode of `batch` requests with `context` keys each, spread evenly over `adapters` of `rank` (0: base only)."""

    batch: int
    rank: int
    adapters: int
    context: int


def measure_points(
    geometry: ModelGeometry,
    device: str,
    batches: Sequence[int],
    ranks: Sequence[int],
    adapters: Sequence[int],
    *,
    context: int,
    max_lora_rank: int | None = None,
    repeats: int | None = None,
) -> pd.DataFrame:
    """One row per batch, rank and number of adapters up to the batch, and base-only rows (`rank` 0) for every batch.

    Milliseconds, medians of `repeats` (default `REPEATS`): `step_ms` (with `p10_ms`, `p90_ms`), its `device_ms` and `host_ms`,
    `padded_step_ms` (every adapter at `max_lora_rank`), `attention_ms`, `shrink_ms`, `expand_ms`, `loop_ms` (of the
    whole model); `floor_bytes`. Base-only rows exist also for the batches that full copies would have. `copy_gb_per_s`:
    bytes read plus written a second by copies on this device. Raises `BackendError` if the device cannot hold it.
    """
    repeats = repeats or REPEATS
    counts = {b: sorted({n for n in adapters if 0 < n <= b}) for b in batches}
    sizes = sorted({size for b in batches for n in (1, *counts[b]) for size in (b // n, -(-b // n))})
    most = max((n for chosen in counts.values() for n in chosen), default=1)
    rank = max(*ranks, max_lora_rank or 0)
    bench = _Bench(geometry, device, EngineLimits(most, rank, max(batches), 2 * max(batches), context + 64, BLOCK, 0.9))
    rows = []
    try:
        for size in sizes:
            setting = Setting(size, 0, 0, context)
            rows.append({**bench.step(setting, repeats), "attention_ms": bench.attention_ms(setting, repeats)})
        settings = [Setting(b, r, n, context) for b in batches for r in ranks for n in counts[b]]
        bar = tqdm(settings, desc="parts", unit="setting", disable=not sys.stderr.isatty())
        rows += [_row(bench, setting, max_lora_rank, repeats) for setting in bar]
    finally:
        bench.backend.close()
    table = pd.DataFrame(rows)
    if "padded_step_ms" not in table:
        table["padded_step_ms"] = None
    table["floor_bytes"] = [
        floor_bytes(geometry, *row) for row in table[["batch", "adapters", "rank", "context"]].to_numpy().tolist()
    ]
    facts: dict[str, Any] = {**describe_device(device), "geometry": geometry.name, "max_lora_rank": max_lora_rank}
    return table.assign(copy_gb_per_s=_copy_gb_per_s(device), **facts)


def _row(bench: _Bench, setting: Setting, max_lora_rank: int | None, repeats: int) -> dict[str, Any]:
    row = bench.step(setting, repeats)
    if max_lora_rank is not None:
        padded = Setting(setting.batch, max_lora_rank, setting.adapters, setting.context)
        row["padded_step_ms"] = bench.step(padded, repeats)["step_ms"]
    bench.fill(setting.rank)
    row["attention_ms"] = bench.attention_ms(setting, repeats)
    return row | bench.lora_ms(setting, repeats)


class _Bench:
    """An engine whose slots hold random adapters, all of the rank that is being measured."""

    def __init__(self, geometry: ModelGeometry, device: str, limits: EngineLimits) -> None:
        plan = memory_plan(geometry, limits, device_bytes(device))
        needed = limits.max_num_seqs * -(-limits.max_model_len // BLOCK)
        if plan.num_gpu_blocks < needed:
            raise BackendError(
                f"{limits.max_loras} adapters of rank {limits.max_lora_rank} leave {plan.num_gpu_blocks} KV blocks,"
                f" {limits.max_num_seqs} requests need {needed}; ask for fewer requests, adapters, keys, or lower ranks"
            )
        self.limits, self.device = limits, device
        self.backend = LiveBackend(geometry, limits, needed, device=device)
        self.decoder = self.backend.decoder
        for slot in self.decoder.bank.weights:
            slot.normal_(0, 0.02)

    def fill(self, rank: int) -> None:
        """Have every slot hold an adapter of `rank`: its bytes are random at any rank."""
        self.decoder.bank.ranks.fill_(rank)

    def batches(self, setting: Setting, count: int) -> Iterator[StepBatch]:
        """Consecutive decode steps."""
        slots = [i % setting.adapters if setting.adapters else NO_SLOT for i in range(setting.batch)]
        room = Room(self.limits, self.backend.num_gpu_blocks, {})
        for i in range(count):
            batch = compose([1] * setting.batch, [setting.context + i % 32] * setting.batch, slots, room)
            assert batch is not None
            yield batch

    def step(self, setting: Setting, repeats: int) -> dict[str, Any]:
        """Whole steps: the first two are not counted."""
        self.fill(setting.rank)
        timings = [self.backend.execute(batch) for batch in self.batches(setting, repeats + 2)][2:]
        elapsed = np.array([t.elapsed_s for t in timings]) * 1e3
        device = float(np.median([t.device_s for t in timings])) * 1e3
        low, middle, high = np.quantile(elapsed, (0.1, 0.5, 0.9)).tolist()
        return {
            "batch": setting.batch, "rank": setting.rank, "adapters": setting.adapters, "context": setting.context,
            "step_ms": middle, "p10_ms": low, "p90_ms": high, "device_ms": device, "host_ms": max(0.0, middle - device),
        }  # fmt: skip

    def attention_ms(self, setting: Setting, repeats: int) -> float:
        """Rotary embedding, KV writes and attention of all layers."""
        backend, decoder = self.backend, self.decoder
        (batch,) = self.batches(setting, 1)
        inputs = backend._pack(backend.layout(batch))
        backend._upload(inputs)
        qkv = decoder.qkv[: setting.batch].normal_()

        def run() -> None:
            for layer in range(len(decoder.layers)):
                decoder._attend(layer, qkv, inputs, backend._tables)

        return timed_ms(run, self.device, repeats)

    def lora_ms(self, setting: Setting, repeats: int) -> dict[str, float]:
        """Shrink (with the sorting of rows), expand and loop of all layers."""
        decoder, bank = self.decoder, self.decoder.bank
        # Rows of an adapter lie together: the loop's best case, and the same to the kernels.
        slots = np.sort(np.arange(setting.batch) % setting.adapters)
        row_slots = torch.tensor(slots, dtype=torch.int32, device=decoder.device)
        first = bank.layout.layers[0]
        x = {name: self._rows(setting.batch, linear.in_features) for name, linear in first.items()}
        out = {name: self._rows(setting.batch, sum(linear.out_features)) for name, linear in first.items()}
        calls = [(name, linear) for layer in bank.layout.layers for name, linear in layer.items()]
        shrink, expand = _kernels(decoder.segments.engine)
        segments = decoder.segments.of(row_slots, bank)
        segments.partials.normal_()
        vectors = [shrink(x[name], bank, linear, segments) for name, linear in calls]

        def shrink_all() -> None:
            fresh = decoder.segments.of(row_slots, bank)
            for name, linear in calls:
                shrink(x[name], bank, linear, fresh)

        def expand_all() -> None:
            for (name, linear), held in zip(calls, vectors, strict=True):
                expand(out[name], bank, linear, segments, held)

        return {
            "shrink_ms": timed_ms(shrink_all, self.device, repeats),
            "expand_ms": timed_ms(expand_all, self.device, repeats),
            "loop_ms": self._loop_ms(setting, slots, x, out, repeats),
        }

    def _loop_ms(
        self,
        setting: Setting,
        slots: npt.NDArray[np.int64],
        x: Mapping[str, torch.Tensor],
        out: Mapping[str, torch.Tensor],
        repeats: int,
    ) -> float:
        """Two matrix products per adapter, module and layer, timed over enough layers and scaled to all."""
        bank, layers = self.decoder.bank, self.decoder.bank.layout.layers
        nbytes = setting.adapters * setting.rank * bank.layout.unit / len(layers) * bank.weights.element_size()
        some = layers[: max(2, math.ceil(COLD_BYTES / nbytes))]
        pairs = []
        for slot in range(setting.adapters):
            rows = slice(int(np.searchsorted(slots, slot)), int(np.searchsorted(slots, slot, "right")))
            for name, linear in ((n, f) for layer in some for n, f in layer.items()):
                ends = np.cumsum(linear.out_features).tolist()
                for i, (end, width) in enumerate(zip(ends, linear.out_features, strict=True)):
                    a, b = bank.a(slot, linear, i), bank.b(slot, linear, i)
                    pairs.append((x[name][rows], a.T, b, out[name][rows, end - width : end]))

        def run() -> None:
            for rows_x, a, b, rows_out in pairs:
                rows_out.addmm_(rows_x @ a, b)

        return timed_ms(run, self.device, repeats) * len(layers) / len(some)

    def _rows(self, rows: int, width: int) -> torch.Tensor:
        return torch.randn((rows, width), dtype=self.decoder.dtype, device=self.decoder.device)


def _kernels(engine: str) -> tuple[Callable[..., Any], Callable[..., None]]:
    """Shrink and expand of an engine apart: what shrink returns is expand's last argument."""
    if engine == "torch":
        return (
            lambda x, bank, linear, segments: shrink_reference(x, bank, linear, segments.row_slots),
            lambda out, bank, linear, _, vectors: expand_reference(out, bank, linear, vectors),
        )
    module = import_module(f"backend.sgmv.{engine}_kernels")
    return module.shrink, lambda out, bank, linear, segments, _: module.expand(out, bank, linear, segments)


@torch.inference_mode()
def timed_ms(run: Callable[[], None], device: str, repeats: int) -> float:
    """Median milliseconds of `run`; on CUDA as a captured graph, so that no launch waits for the host."""
    run()
    if device != "cuda":
        taken = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            taken.append((time.perf_counter() - started) * 1e3)
        return float(np.median(taken))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    events = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        events.append(begin.elapsed_time(end))
    return float(np.median(events[1:]))


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


def _copy_gb_per_s(device: str) -> float:
    """Bytes read plus written a second by copies on the device."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timed_ms(lambda: _copy(source, target), device, 5) / 1e6
