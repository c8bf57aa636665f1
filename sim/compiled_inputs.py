"""What the compiled replay (`sim/native`) must know of a simulation, in its own form, and which simulations it knows."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import numpy as np

from backend.base import TILE_ROWS, AdapterShape, Backend
from backend.features import DECODES_AT_ONCE, FEW_DECODES, FILLING_DECODES, PREFILL_TILE, SPLIT_DECODES, TILES_AT_ONCE
from backend.predictor import BANDS, BOUNDED, GRID_ROWS, LONG_ROWS, WIDE_ROWS, Predictor
from sim.config import EngineConfig
from workloads.adapters import Catalogue
from workloads.requests import RequestTable

try:
    from sim import _native as _native  # type: ignore[attr-defined]  # noqa: PLC0414
except ImportError:  # built without a C++ compiler: everything works, step by step
    _native = None


def supports(config: EngineConfig, backend: Backend) -> bool:
    """Whether the compiled loop knows the engine's policies and the backend's costs; else an engine goes step by step."""
    return (
        _native is not None
        and getattr(backend, "step_costs", None) is not None
        and config.scheduling_policy in ("fcfs", "priority")
        and config.lora_eviction_policy == "lru"
        and config.lora_loading == "blocking"
    )


class Shared:
    """What the engines of one simulation have in common, in the compiled loop's own form; none plays beyond `stop_s`."""

    def __init__(self, requests: RequestTable, catalogue: Catalogue, config: EngineConfig, backend: Backend) -> None:
        tree = requests.tree
        self.requests = _native.Requests(
            requests.arrival_s, requests.prompt_tokens,
            np.minimum(requests.output_tokens, config.max_model_len - requests.prompt_tokens), requests.adapter,
            requests.priority, requests.prefix_id, requests.prefix_tokens, [] if tree is None else tree.parent,
            [] if tree is None else tree.end_tokens, tree is not None,
        )  # fmt: skip
        self.adapters = _adapters(catalogue, backend)
        self.costs = _costs(*backend.step_costs)  # type: ignore[attr-defined]
        self.config = _config(config, backend)
        self.stop_s = float("inf")


def _config(config: EngineConfig, backend: Backend) -> Any:
    out = _native.Config()
    for name in (
        "max_loras", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "long_prefill_token_threshold", "watermark",
        "enable_chunked_prefill", "enable_prefix_caching", "async_scheduling", "scheduler_reserve_full_isl",
    ):  # fmt: skip
        setattr(out, name, getattr(config, name))
    capacity = backend.capacity()
    out.block_size, out.num_gpu_blocks = capacity.block_size, capacity.num_gpu_blocks
    out.max_cpu_loras = config.host_loras
    out.priority = config.scheduling_policy == "priority"
    out.set_order = config.lora_order == "set"
    return out


def _adapters(catalogue: Catalogue, backend: Backend) -> Any:
    shapes = [AdapterShape(a.adapter_id, a.rank, a.target_modules, a.folder, a.scaling) for a in catalogue]
    return _native.Adapters(
        [0, *(a.rank for a in catalogue)],
        [0, *(crc32(str(a.adapter_id).encode()) for a in catalogue)],
        [0.0, *(backend.stage(shape).elapsed_s for shape in shapes)],
        [0.0, *(backend.load(shape, 0).elapsed_s for shape in shapes)],
    )


def _costs(predictor: Predictor, factor: float) -> Any:
    sizes = (
        TILE_ROWS,
        PREFILL_TILE,
        DECODES_AT_ONCE,
        FEW_DECODES,
        FILLING_DECODES,
        SPLIT_DECODES,
        TILES_AT_ONCE,
        GRID_ROWS,
        WIDE_ROWS,
        LONG_ROWS,
    )
    out = _native.StepCosts(predictor.graph_sizes, sizes, BANDS, factor, predictor.heat.tau_s, predictor.heat.spare)
    for name, r in predictor.regimes.items():
        low = [r.low.get(key, -np.inf) for key in BOUNDED]
        high = [r.high.get(key, np.inf) for key in BOUNDED]
        out.regime(name, r.knots, r.lora_knots, r.device, r.host, r.launch, low, high, r.lora_rows, r.heat, r.bands)
    return out
