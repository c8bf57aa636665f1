"""The engine's limits and policies, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass

from sim.errors import ScenarioError
from sim.eviction import EVICTION
from sim.waiting import WAITING

LORA_LOADING = ("blocking", "overlapped")
"""`blocking`: a step waits for its adapters (vLLM). `overlapped`: they load beside the steps (SGLang)."""


LORA_ORDER = ("requests", "set")
"""In which order a step's adapters are brought in. `requests`: as its requests come. `set`: as a set of theirs is walked in
vLLM, in an order that is fixed for a process and has nothing to do with the requests."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One replica's configuration; defaults are vLLM's where it has one (`vllm/engine/arg_utils.py`).

    Two differ: `async_scheduling` (vLLM: true) and `max_num_seqs` (vLLM: 1024 on an H100).
    Raises `ScenarioError` naming the `engine.` key whose value cannot be.
    """

    max_loras: int = 1
    max_cpu_loras: int | None = None
    max_lora_rank: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 16384
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    async_scheduling: bool = False
    scheduler_reserve_full_isl: bool = True
    watermark: float = 0.0
    scheduling_policy: str = "fcfs"
    ageing_s: float = 10.0
    lora_eviction_policy: str = "lru"
    lora_loading: str = "blocking"
    lora_order: str = "requests"

    @property
    def host_loras(self) -> int:
        """`max_cpu_loras`, or `max_loras` where it is not set, as vLLM's `LoRAConfig` has it."""
        return self.max_loras if self.max_cpu_loras is None else self.max_cpu_loras

    def __post_init__(self) -> None:
        for key in ("max_loras", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size"):
            if getattr(self, key) < 1:
                raise ScenarioError(f"engine.{key} is {getattr(self, key)}, must be >= 1")
        if not (8 <= self.max_lora_rank <= 256 and self.max_lora_rank % 8 == 0):
            raise ScenarioError(f"engine.max_lora_rank is {self.max_lora_rank}, must be a multiple of 8 from 8 to 256")
        if self.host_loras < self.max_loras:
            raise ScenarioError(
                f"engine.max_cpu_loras is {self.max_cpu_loras}, must be >= engine.max_loras ({self.max_loras})"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ScenarioError(f"engine.gpu_memory_utilization is {self.gpu_memory_utilization}, must be in (0, 1]")
        if not 0 <= self.watermark < 1:
            raise ScenarioError(f"engine.watermark is {self.watermark}, must be in [0, 1)")
        if not self.ageing_s > 0:
            raise ScenarioError(f"engine.ageing_s is {self.ageing_s}, must be > 0 seconds")
        self._check_budget()
        for key, known in (
            ("scheduling_policy", tuple(WAITING)),
            ("lora_eviction_policy", tuple(EVICTION)),
            ("lora_loading", LORA_LOADING),
            ("lora_order", LORA_ORDER),
        ):
            if getattr(self, key) not in known:
                raise ScenarioError(f"engine.{key} is {getattr(self, key)!r}, must be one of {', '.join(known)}")

    def _check_budget(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ScenarioError(
                f"engine.max_num_batched_tokens is {self.max_num_batched_tokens}, must be >= engine.max_num_seqs"
                f" ({self.max_num_seqs})"
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ScenarioError(
                f"engine.max_num_batched_tokens is {self.max_num_batched_tokens}, must be >= engine.max_model_len"
                f" ({self.max_model_len}) without chunked prefill"
            )
        if not 0 <= self.long_prefill_token_threshold <= self.max_model_len:
            raise ScenarioError(
                f"engine.long_prefill_token_threshold is {self.long_prefill_token_threshold},"
                f" must be 0 (off) to engine.max_model_len ({self.max_model_len})"
            )
