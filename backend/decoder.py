"""A decoder step with LoRA on all seven linears: Llama and Qwen2 shaped, random weights, real paged KV cache.

The cost of a step does not depend on the weights' values; they are random and never zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from backend.linears import base_product, gated_with_lora, invariant_product, linear_with_lora
from backend.sgmv import Segments, SlotBank, SlotLayout, sgmv
from backend.step_inputs import DECODE_TILE, StepInputs, power_of_two, prefill_tile

if TYPE_CHECKING:
    from backend.base import EngineLimits
    from backend.geometry import ModelGeometry


@dataclass(frozen=True, slots=True)
class DeviceInputs:
    """The arrays of `StepInputs` as int32 tensors on the device; `adapted`: some row has an adapter."""

    token_from: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    row_slots: torch.Tensor
    decode_tiles: torch.Tensor
    prefill_tiles: torch.Tensor
    sample_rows: torch.Tensor
    sample_to: torch.Tensor
    adapted: bool
    cells: int

    @classmethod
    def views(cls, inputs: StepInputs, packed: torch.Tensor) -> DeviceInputs:
        """Views of `packed` where `StepInputs.arrays()` lie one after the other."""
        named: dict[str, Any] = {}
        start = 0
        for name, array in zip(StepInputs.__slots__, inputs.arrays(), strict=True):
            named[name] = packed[start : start + array.size].view(array.shape)
            start += array.size
        return cls(**named, adapted=inputs.adapted, cells=start)


class Decoder:
    """Weights, KV cache, adapter slots and work buffers of one replica on one device.

    `deterministic`: a row's result does not depend on which rows it is computed with (`linears.invariant_product`).
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        limits: EngineLimits,
        num_blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        deterministic: bool = False,
    ) -> None:
        self.geometry = geometry
        self.deterministic = deterministic
        self.long_tile = prefill_tile(geometry.num_heads // geometry.num_kv_heads)
        self.device = device
        self.on_cuda = device.type == "cuda"
        self.generator = torch.Generator(device).manual_seed(seed)
        self.ops: ModuleType = import_module("backend.ops_triton" if self.on_cuda else "backend.ops_torch")
        self.dtype = dtype
        self._make_weights()
        self._make_buffers(limits)
        self.bank = SlotBank(
            SlotLayout.of(geometry.linears(), geometry.num_layers),
            limits.max_loras,
            limits.max_lora_rank,
            dtype=dtype,
            device=device,
        )
        self.segments = Segments.allocate(limits.max_num_batched_tokens, self.bank)
        shape = (num_blocks, geometry.num_kv_heads, limits.block_size, geometry.head_dim)
        self.k_cache = [self._cache(shape) for _ in range(geometry.num_layers)]
        self.v_cache = [self._cache(shape) for _ in range(geometry.num_layers)]
        self.last_token = torch.zeros(num_blocks + 1, dtype=torch.int64, device=device)

    def _random(self, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        return tensor.normal_(0, scale, generator=self.generator)

    def _cache(self, shape: tuple[int, ...]) -> torch.Tensor:
        """KV memory: random on a GPU, where arithmetic on zeros is faster; on the CPU pages come when they are used."""
        return self._random(shape) if self.on_cuda else torch.zeros(shape, dtype=self.dtype)

    def _make_weights(self) -> None:
        g = self.geometry
        linears = g.linears()
        qkv = sum(linears[m][1] for m in ("q_proj", "k_proj", "v_proj"))
        shapes = {
            "qkv": (qkv, g.hidden_size),
            "o": (g.hidden_size, g.num_heads * g.head_dim),
            "gate_up": (2 * g.intermediate_size, g.hidden_size),
            "down": (g.hidden_size, g.intermediate_size),
        }
        self.layers = [
            {name: self._random(shape, shape[1] ** -0.5) for name, shape in shapes.items()} for _ in range(g.num_layers)
        ]
        self.norms = [self._random((g.hidden_size,)) for _ in range(2 * g.num_layers + 1)]
        self.qkv_bias = [self._random((qkv,), 0.1) for _ in range(g.num_layers)] if g.qkv_bias else []
        self.embedding = self._random((g.vocab_size, g.hidden_size))
        self.lm_head = (
            self.embedding
            if g.tie_word_embeddings
            else self._random((g.vocab_size, g.hidden_size), g.hidden_size**-0.5)
        )

    def _make_buffers(self, limits: EngineLimits) -> None:
        g, rows = self.geometry, limits.max_num_batched_tokens

        def rows_of(width: int) -> torch.Tensor:
            return torch.zeros((rows, width), dtype=self.dtype, device=self.device)

        self.residual, self.normed, self.attended = (
            rows_of(g.hidden_size),
            rows_of(g.hidden_size),
            rows_of(g.hidden_size),
        )
        self.qkv = rows_of((g.num_heads + 2 * g.num_kv_heads) * g.head_dim)
        self.heads_out = rows_of(g.num_heads * g.head_dim)
        self.gate_up, self.activated = rows_of(2 * g.intermediate_size), rows_of(g.intermediate_size)
        # A step may be padded beyond `max_num_seqs` samples, to at most the next power of two.
        self.logits = torch.zeros(
            (power_of_two(limits.max_num_seqs), g.vocab_size), dtype=self.dtype, device=self.device
        )
        inverse = g.rope_theta ** -(torch.arange(0, g.head_dim, 2, dtype=torch.float64) / g.head_dim)
        angles = torch.outer(torch.arange(limits.max_model_len, dtype=torch.float64), inverse)
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], -1).float().to(self.device)
        self.prompt = torch.randint(g.vocab_size, (limits.max_model_len,), generator=self.generator, device=self.device)

    def _linear(
        self,
        layer: int,
        name: str,
        x: torch.Tensor,
        out: torch.Tensor,
        segments: Segments | None,
        *,
        shrunk: bool = False,
    ) -> torch.Tensor:
        """Base product plus the LoRA product of every adapted row; `shrunk`: see `linear_with_lora`."""
        out = out[: len(x)]
        bias = self.qkv_bias[layer] if name == "qkv" and self.qkv_bias else None
        weight, linear = self.layers[layer][name], self.bank.layout.layers[layer][name]
        if self.deterministic:
            invariant_product(x, weight, out, bias, kernels=self.kernels)
            if segments is not None:
                sgmv(x, out, self.bank, linear, segments)
        else:
            linear_with_lora(x, weight, out, bias, self.bank, linear, segments, kernels=self.kernels, shrunk=shrunk)
        return out

    @property
    def kernels(self) -> bool:
        """Whether the CUDA kernels run here."""
        return self.segments.engine == "cuda"

    def _feed_forward(self, layer: int, x: torch.Tensor, segments: Segments | None) -> torch.Tensor:
        gate_up, activated, shrunk = self.gate_up[: len(x)], self.activated[: len(x)], False
        layers, weight = self.bank.layout.layers[layer], self.layers[layer]["gate_up"]
        if self.deterministic:
            self.ops.silu_mul(self._linear(layer, "gate_up", x, self.gate_up, segments), activated)
        else:
            shrunk = gated_with_lora(
                x, weight, gate_up, activated, self.bank, layers["gate_up"], segments, self.ops, kernels=self.kernels,
                after=layers["down"],
            )  # fmt: skip
        return self._linear(layer, "down", activated, self.attended, segments, shrunk=shrunk)

    def _attend(self, layer: int, qkv: torch.Tensor, inputs: DeviceInputs, tables: torch.Tensor) -> torch.Tensor:
        k, v, heads = self.k_cache[layer], self.v_cache[layer], self.geometry.num_heads
        out = self.heads_out[: len(qkv)]
        if not len(inputs.prefill_tiles):  # no request has two tiles then, so none needs keys that another tile writes
            self.ops.attention(qkv, k, v, out, inputs.decode_tiles, tables, heads, DECODE_TILE, self.cos_sin)
            return out
        self.ops.rope_and_cache(qkv, self.cos_sin, inputs.positions, inputs.kv_slots, k, v, heads)
        self.ops.attention(qkv, k, v, out, inputs.decode_tiles, tables, heads, DECODE_TILE)
        self.ops.attention(qkv, k, v, out, inputs.prefill_tiles, tables, heads, self.long_tile)
        return out

    @torch.inference_mode()
    def forward(self, inputs: DeviceInputs, tables: torch.Tensor) -> None:
        """Compute one step: writes the KV cells of its rows and the sampled tokens into `last_token`.

        `tables` int32[requests, blocks]. Greedy sampling; nothing is read back to the host.
        """
        rows = len(inputs.positions)
        segments = self.segments.of(inputs.row_slots, self.bank) if inputs.adapted else None
        eps, norm = self.geometry.rms_norm_eps, self.ops.add_rms_norm
        residual, normed = self.residual[:rows], self.normed[:rows]
        tokens = torch.where(
            inputs.token_from >= 0,
            self.last_token[inputs.token_from.clamp(min=0)],
            self.prompt[inputs.positions],
        )
        torch.index_select(self.embedding, 0, tokens, out=residual)
        x = None
        for layer in range(self.geometry.num_layers):
            norm(x, residual, self.norms[2 * layer], normed, eps)
            qkv = self._linear(layer, "qkv", normed, self.qkv, segments)
            x = self._linear(layer, "o", self._attend(layer, qkv, inputs, tables), self.attended, segments)
            norm(x, residual, self.norms[2 * layer + 1], normed, eps)
            x = self._feed_forward(layer, normed, segments)
        norm(x, residual, self.norms[-1], normed, eps)
        samples = len(inputs.sample_rows)
        if samples:
            logits = self.logits[:samples]
            product = invariant_product if self.deterministic else base_product
            product(normed[inputs.sample_rows], self.lm_head, logits, None, kernels=self.kernels)
            self.last_token[inputs.sample_to] = logits.argmax(-1)
