"""Model geometry: the shapes a step's cost and a GPU's memory follow from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.errors import BackendError

_ARCHITECTURES = {
    "LlamaForCausalLM": (False, True),
    "MistralForCausalLM": (False, True),
    "Qwen2ForCausalLM": (True, False),
}
"""Supported architectures: (q/k/v carry a bias, vLLM allocates LoRA for the embeddings)."""


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """Shapes of a decoder-only model with grouped-query attention and a SwiGLU FFN; 16-bit weights and KV.

    `lora_embeddings`: vLLM's model class lists its embeddings as LoRA modules and allocates slots for them.
    """

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    lora_embeddings: bool = True
    dtype_bytes: int = 2

    def __post_init__(self) -> None:
        sizes = (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
        )
        for key in sizes:
            if getattr(self, key) < 1:
                raise BackendError(f"geometry {self.name}: {key} is {getattr(self, key)}, must be >= 1")
        if self.num_heads % self.num_kv_heads:
            raise BackendError(f"geometry {self.name}: num_heads {self.num_heads} must be a multiple of num_kv_heads")

    def linears(self) -> dict[str, tuple[int, int]]:
        """The seven linears of a layer, PEFT name -> (in, out)."""
        h, q, kv, f = (
            self.hidden_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
            self.intermediate_size,
        )
        return {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, f),
            "up_proj": (h, f),
            "down_proj": (f, h),
        }

    @property
    def parameters(self) -> int:
        """All weights of the base model."""
        linears = self.linears()
        layer = sum(i * o for i, o in linears.values()) + 2 * self.hidden_size
        if self.qkv_bias:
            layer += sum(linears[m][1] for m in ("q_proj", "k_proj", "v_proj"))
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return layer * self.num_layers + embeddings + self.hidden_size

    @property
    def weights_bytes(self) -> int:
        return self.parameters * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes

    def lora_bytes(self, rank: int, target_modules: Sequence[str] | None = None) -> int:
        """Bytes of one adapter of `rank` on `target_modules` (all seven where None)."""
        linears = self.linears()
        chosen = linears if target_modules is None else target_modules
        unknown = [m for m in chosen if m not in linears]
        if unknown:
            raise BackendError(f"target_modules names {unknown[0]}; known: {', '.join(linears)}")
        return rank * self.num_layers * self.dtype_bytes * sum(sum(linears[m]) for m in chosen)


def floor_bytes(geometry: ModelGeometry, batch: int, adapters: int, rank: int, context: int) -> int:
    """Bytes that a decode step must read at least once: weights, the batch's keys and values, each adapter.

    Of an embedding table of its own a step reads one row a request, so the table is left out.
    """
    table = 0 if geometry.tie_word_embeddings else geometry.vocab_size * geometry.hidden_size * geometry.dtype_bytes
    kv = batch * (context + 1) * geometry.kv_bytes_per_token
    return geometry.weights_bytes - table + kv + adapters * geometry.lora_bytes(rank)


SHIPPED: Mapping[str, ModelGeometry] = {
    g.name: g
    for g in (
        ModelGeometry("llama-3.1-8b", 4096, 32, 32, 8, 128, 14336, 128256),
        ModelGeometry("llama-3.2-1b", 2048, 16, 32, 8, 64, 8192, 128256, tie_word_embeddings=True),
        ModelGeometry(
            "qwen2.5-7b",
            3584,
            28,
            28,
            4,
            128,
            18944,
            152064,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            qkv_bias=True,
            lora_embeddings=False,
        ),  # fmt: skip
        ModelGeometry("tiny", 256, 2, 4, 2, 64, 512, 1024),
    )
}


def load_geometry(name_or_path: str) -> ModelGeometry:
    """A shipped geometry by name, or any Llama, Mistral or Qwen2 shaped Hugging Face `config.json`."""
    if name_or_path in SHIPPED:
        return SHIPPED[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        known = ", ".join(SHIPPED)
        raise BackendError(
            f"model.geometry {name_or_path}: neither a shipped geometry ({known}) nor a config.json file"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BackendError(
            f"{path}: not readable as UTF-8 text ({error}); a Hugging Face config.json is wanted"
        ) from error
    except json.JSONDecodeError as error:
        raise BackendError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); a Hugging Face config.json is wanted"
        ) from error
    if not isinstance(config, dict):
        raise BackendError(f"{path}: holds a {type(config).__name__}; a Hugging Face config.json is a JSON object")
    return from_config(config, path)


def from_config(config: Mapping[str, object], path: Path) -> ModelGeometry:
    """Geometry of a Hugging Face config; `path` names it in errors and gives the model its name."""
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise BackendError(f"{path}: architectures is {architecture}; known: {', '.join(_ARCHITECTURES)}")
    if config.get("quantization_config"):
        raise BackendError(f"{path}: quantization_config is set; only 16-bit weights are modelled")
    bias, lora_embeddings = _ARCHITECTURES[architecture]

    def whole(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value  # Mistral writes `"head_dim": null`
        if value is None:
            raise BackendError(f"{path}: {key} is missing, must be a whole number >= 1")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BackendError(f"{path}: {key} is {value!r}, must be a whole number >= 1")
        return value

    def real(source: Mapping[str, object], key: str, default: float) -> float:
        value = source.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise BackendError(f"{path}: {key} is {value!r}, must be a number")
        return float(value)

    rope = config.get("rope_parameters")  # transformers 5 moved rope_theta in there
    heads = whole("num_attention_heads")
    hidden = whole("hidden_size")
    return ModelGeometry(
        path.parent.name if path.name == "config.json" else path.stem,
        hidden,
        whole("num_hidden_layers"),
        heads,
        whole("num_key_value_heads", heads),
        whole("head_dim", hidden // heads),
        whole("intermediate_size"),
        whole("vocab_size"),
        tie_word_embeddings=config.get("tie_word_embeddings", False) is True,
        rope_theta=real(rope if isinstance(rope, dict) and "rope_theta" in rope else config, "rope_theta", 10000.0),
        rms_norm_eps=real(config, "rms_norm_eps", 1e-6),
        qkv_bias=bias,
        lora_embeddings=lora_embeddings,
    )
