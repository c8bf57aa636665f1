"""Model geometries: shipped ones are the real models' shapes; config.json files are read or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backend.errors import BackendError
from backend.geometry import SHIPPED, ModelGeometry, load_geometry

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def write(folder: Path, config: object, name: str = "config.json") -> str:
    path = folder / name
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [
        ("llama-3.1-8b", 8_030_261_248, 131072),
        ("llama-3.2-1b", 1_235_814_400, 32768),
        ("qwen2.5-7b", 7_615_616_512, 57344),
    ],
)
def test_shipped_geometries_are_the_published_models(name: str, parameters: int, kv_bytes: int) -> None:
    geometry = load_geometry(name)
    assert geometry.name == name
    assert geometry.parameters == parameters
    assert geometry.weights_bytes == 2 * parameters
    assert geometry.kv_bytes_per_token == kv_bytes


def test_tiny() -> None:
    tiny = load_geometry("tiny")
    assert (tiny.hidden_size, tiny.num_layers, tiny.num_heads, tiny.num_kv_heads) == (256, 2, 4, 2)
    assert (tiny.head_dim, tiny.intermediate_size, tiny.vocab_size) == (64, 512, 1024)


def test_linears_are_the_seven_of_a_layer() -> None:
    assert load_geometry("llama-3.1-8b").linears() == {
        "q_proj": (4096, 4096),
        "k_proj": (4096, 1024),
        "v_proj": (4096, 1024),
        "o_proj": (4096, 4096),
        "gate_proj": (4096, 14336),
        "up_proj": (4096, 14336),
        "down_proj": (14336, 4096),
    }


def test_lora_bytes() -> None:
    llama = load_geometry("llama-3.1-8b")
    assert llama.lora_bytes(16) == 83_886_080  # the measured adapters' files: 83.9 MB
    assert llama.lora_bytes(32) == 2 * llama.lora_bytes(16)
    assert llama.lora_bytes(8, ["q_proj"]) == 8 * 32 * 2 * (4096 + 4096)
    assert llama.lora_bytes(8, list(llama.linears())) == llama.lora_bytes(8)
    with pytest.raises(BackendError, match=r"names lm_head; known: q_proj"):
        llama.lora_bytes(8, ["q_proj", "lm_head"])


def test_only_llama_style_models_take_lora_on_embeddings() -> None:
    assert {name: g.lora_embeddings for name, g in SHIPPED.items()} == {
        "llama-3.1-8b": True,
        "llama-3.2-1b": True,
        "qwen2.5-7b": False,
        "tiny": True,
    }


def test_a_config_file_gives_the_shipped_shapes(tmp_path: Path) -> None:
    geometry = load_geometry(write(tmp_path, LLAMA, "llama-3.1-8b.json"))
    assert geometry == load_geometry("llama-3.1-8b")


def test_a_qwen_config(tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    assert load_geometry(write(tmp_path, config, "qwen2.5-7b.json")) == load_geometry("qwen2.5-7b")


def test_a_config_is_named_after_its_folder_and_null_head_dim_is_derived(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["MistralForCausalLM"], "head_dim": None}
    geometry = load_geometry(write(tmp_path, config))
    assert geometry.name == tmp_path.name
    assert geometry.head_dim == 128


def test_rope_theta_of_transformers_5(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 123456.0}
    assert load_geometry(write(tmp_path, config)).rope_theta == 123456.0


@pytest.mark.parametrize(
    "key", [key for key in LLAMA if key.startswith(("hidden", "num_h", "num_a", "inter", "vocab"))]
)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    config = {k: v for k, v in LLAMA.items() if k != key}
    with pytest.raises(BackendError, match=rf"config\.json: {key} is missing"):
        load_geometry(write(tmp_path, config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures is GPT2LMHeadModel; known: LlamaForCausalLM"),
        ({"architectures": [{}]}, "architectures is"),
        ({"architectures": None}, "architectures is None"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, must be a whole number >= 1"),
        ({"num_key_value_heads": 5}, "must be a multiple of num_kv_heads"),
        ({"rope_theta": "big"}, "rope_theta is 'big', must be a number"),
        ({"quantization_config": {"bits": 4}}, "only 16-bit weights"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        load_geometry(write(tmp_path, {**LLAMA, **changes}))


@pytest.mark.parametrize(("text", "message"), [("{\n 1", ":2: not JSON"), ("[]", "holds a list")])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        load_geometry(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BackendError, match="not readable as UTF-8"):
        load_geometry(str(path))


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(BackendError, match=r"gpt-5: neither a shipped geometry \(llama-3.1-8b, .*tiny\) nor"):
        load_geometry("gpt-5")


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(BackendError, match="num_layers is 0"):
        ModelGeometry("x", 256, 0, 4, 2, 64, 512, 1024)
