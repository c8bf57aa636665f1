"""PEFT adapter folders: what is read, what is refused, and that the numbers are those that PEFT would compute."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from backend.base import AdapterShape, EngineLimits, StepBatch
from backend.errors import BackendError
from backend.geometry import load_geometry
from backend.live import LiveBackend
from backend.peft import CONFIG, WEIGHTS, PeftAdapter, adapter_folders, read_adapter
from backend.sgmv.slots import FUSED
from sim.cli import main
from sim.run import run_scenario

TINY = load_geometry("tiny")
SEVEN = list(TINY.linears())


def path_of(layer: int, module: str) -> str:
    parent = "self_attn" if module in SEVEN[:4] else "mlp"
    return f"model.layers.{layer}.{parent}.{module}"


def tensors(modules: list[str], ranks: dict[str, int], layers: tuple[int, ...] = (0, 1)) -> dict[str, torch.Tensor]:
    """A and B as PEFT names and shapes them; a linear's rank by its module."""
    torch.manual_seed(3)
    made = {}
    for layer in layers:
        for module in modules:
            inside, outside = TINY.linears()[module]
            prefix = f"base_model.model.{path_of(layer, module)}"
            made[f"{prefix}.lora_A.weight"] = torch.randn(ranks[module], inside) * 0.05
            made[f"{prefix}.lora_B.weight"] = torch.randn(outside, ranks[module]) * 0.05
    return made


def save(folder: Path, config: dict[str, object] | None = None, weights: dict[str, torch.Tensor] | None = None) -> Path:
    """An adapter of rank 8 on q_proj and v_proj, unless said otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = tensors(["q_proj", "v_proj"], dict.fromkeys(SEVEN, 8)) if weights is None else weights
    whole = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(whole | (config or {})))
    save_file(weights, folder / WEIGHTS)
    return folder


def shape_of(adapter: PeftAdapter) -> AdapterShape:
    return AdapterShape(1, adapter.rank, adapter.target_modules, str(adapter.folder), adapter.scaling)


def logits(backend: LiveBackend, slot: int) -> torch.Tensor:
    backend.execute(StepBatch((12,), (0,), (slot,), (True,), ((0,),)))
    return backend.decoder.logits[0].clone()


def backend() -> LiveBackend:
    return LiveBackend(TINY, EngineLimits(2, 32, 8, 64, 512, 16, 0.9), 64, device="cpu")


def merged(scalings: dict[tuple[int, str], float], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the base model with `scaling * B A` added to its weights."""
    base = backend()
    for (layer, module), scaling in scalings.items():
        prefix = f"base_model.model.{path_of(layer, module)}"
        fused, modules = next(item for item in FUSED.items() if module in item[1])
        start = sum(TINY.linears()[m][1] for m in modules[: modules.index(module)])
        delta = scaling * weights[f"{prefix}.lora_B.weight"].float() @ weights[f"{prefix}.lora_A.weight"].float()
        base.decoder.layers[layer][fused][start : start + len(delta)] += delta
    return logits(base, -1)


@settings(max_examples=15, deadline=None)
@given(
    modules=st.lists(st.sampled_from(SEVEN), min_size=1, max_size=7, unique=True),
    rank=st.sampled_from([1, 8, 12, 32]),
    other=st.sampled_from([4, 16]),
    rslora=st.booleans(),
    layers=st.sampled_from([(0, 1), (1,)]),
)
def test_the_numbers_are_those_of_the_merged_weights(
    tmp_path_factory: pytest.TempPathFactory,
    modules: list[str],
    rank: int,
    other: int,
    rslora: bool,
    layers: tuple[int, ...],
) -> None:
    """Any subset of modules and layers, a rank and an alpha of its own for the first module, with and without rslora."""
    first = modules[0]
    ranks = dict.fromkeys(SEVEN, rank) | {first: other}
    alphas = dict.fromkeys(SEVEN, 16.0) | {first: 24.0}
    config = {"r": rank, "lora_alpha": 16, "rank_pattern": {first: other}, "alpha_pattern": {f".*{first}": 24}}
    weights = tensors(modules, ranks, layers)
    folder = save(
        tmp_path_factory.mktemp("a") / "x", config | {"use_rslora": rslora, "target_modules": modules}, weights
    )
    adapter = read_adapter(folder, TINY)
    assert adapter.rank % 8 == 0
    assert 0 <= adapter.rank - max(ranks[m] for m in modules) < 8
    assert set(adapter.target_modules) == set(modules)
    live = backend()
    dirty = AdapterShape(2, adapter.rank, tuple(SEVEN))
    live.stage(dirty)  # the memory it leaves behind must not show
    live.drop(2)
    live.stage(shape_of(adapter))
    live.load(shape_of(adapter), 1)
    scalings = {(n, m): alphas[m] / (math.sqrt(ranks[m]) if rslora else ranks[m]) for n in layers for m in modules}
    torch.testing.assert_close(logits(live, 1), merged(scalings, weights), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(live, 1), logits(live, -1), rtol=1e-3, atol=1e-3)


def test_half_precision_files_are_read(tmp_path: Path) -> None:
    weights = {k: v.to(torch.bfloat16) for k, v in tensors(["o_proj"], {"o_proj": 8}).items()}
    adapter = read_adapter(save(tmp_path / "x", {"target_modules": ["o_proj"]}, weights), TINY)
    live = backend()
    live.stage(shape_of(adapter))
    live.load(shape_of(adapter), 0)
    expected = merged({(n, "o_proj"): 2.0 for n in (0, 1)}, weights)
    torch.testing.assert_close(logits(live, 0), expected, rtol=1e-3, atol=1e-3)


def test_a_pattern_belongs_to_the_end_of_a_path(tmp_path: Path) -> None:
    """As in PEFT: `layers.1.self_attn.q_proj` means that linear alone."""
    weights = tensors(["q_proj"], {"q_proj": 8}, (0,)) | tensors(["q_proj"], {"q_proj": 16}, (1,))
    config = {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 16, "proj": 99}}
    adapter = read_adapter(save(tmp_path / "x", config, weights), TINY)
    assert [(part.layer, part.rank, part.factor) for part in adapter.parts] == [(0, 8, 1.0), (1, 16, 0.5)]
    assert (adapter.rank, adapter.scaling) == (16, 2.0)


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = A0.replace("lora_A", "lora_B")
DEFAULT = tensors(["q_proj", "v_proj"], dict.fromkeys(SEVEN, 8))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, f"{CONFIG}: peft_type is 'IA3', must be \"LORA\""),
        ({"r": 0}, f"{CONFIG}: r is 0, must be a whole number > 0"),
        ({"r": "8"}, f"{CONFIG}: r is '8', must be a whole number > 0"),
        ({"lora_alpha": None}, f"{CONFIG}: lora_alpha is None, must be a number > 0"),
        ({"use_dora": True}, f"{CONFIG}: use_dora is True, must be off"),
        ({"modules_to_save": ["lm_head"]}, f"{CONFIG}: modules_to_save is ['lm_head'], must be off"),
        ({"bias": "all"}, f"{CONFIG}: bias is 'all', must be \"none\""),
        ({"use_rslora": 1}, f"{CONFIG}: use_rslora is 1, must be true or false"),
        ({"rank_pattern": [8]}, f"{CONFIG}: rank_pattern is [8], must be an object"),
        ({"rank_pattern": {"q_proj": -1}}, f"{CONFIG}: rank_pattern.q_proj is -1, must be a whole number > 0"),
        ({"alpha_pattern": {"q_proj": True}}, f"{CONFIG}: alpha_pattern.q_proj is True, must be a number > 0"),
        ({"rank_pattern": {"(": 8}}, f"{CONFIG}: rank_pattern.( is no regular expression"),
        (
            {"target_modules": ["q_proj", "o_proj"]},
            f"{CONFIG}: target_modules names 'o_proj', of which {WEIGHTS} has no",
        ),
        ({"r": 16}, f"{WEIGHTS}: {A0} has shape [8, 256], must be [16, 256]: rank 16 by {CONFIG}"),
        ({"rank_pattern": {"q_proj": 4}}, f"{A0} has shape [8, 256], must be [4, 256]"),
    ],
)
def test_a_config_that_cannot_be_served(tmp_path: Path, config: dict[str, object], says: str) -> None:
    with pytest.raises(BackendError, match=re.escape(says)):
        read_adapter(save(tmp_path / "x", config), TINY)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({B0: None}, f"{WEIGHTS}: q_proj of layer 0 has only {A0}, must have A and B"),
        ({A0: torch.zeros(8, 128)}, f"{A0} has shape [8, 128], must be [8, 256]"),
        ({B0: torch.zeros(8, 256)}, f"{B0} has shape [8, 256], must be [256, 8]"),
        ({B0: torch.zeros(256, 8, dtype=torch.int8)}, f"{B0} has dtype I8, must be one of F32, F16, BF16"),
        ({A0.replace("layers.0", "layers.2"): torch.zeros(8, 256)}, "is of layer 2, tiny has layers 0 to 1"),
        ({A0.replace("q_proj", "qkv_proj"): torch.zeros(8, 256)}, "is no lora_A or lora_B of a layer's q_proj, "),
        ({"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 256)}, "lm_head.lora_A.weight is no lora_A or"),
        ({A0.removeprefix("base_model.model."): torch.zeros(8, 256)}, "comes twice"),
        (dict.fromkeys(DEFAULT), f"{WEIGHTS}: holds no tensors"),
    ],
)
def test_weights_that_cannot_be_served(tmp_path: Path, changes: dict[str, torch.Tensor | None], says: str) -> None:
    weights = {name: t for name, t in (DEFAULT | changes).items() if t is not None}
    with pytest.raises(BackendError, match=re.escape(says)):
        read_adapter(save(tmp_path / "x", {}, weights), TINY)


def test_files_that_are_missing_or_no_such_thing(tmp_path: Path) -> None:
    folder = save(tmp_path / "x")
    (folder / WEIGHTS).write_bytes(b"\0" * 20)
    with pytest.raises(BackendError, match=f"{WEIGHTS}: not a safetensors file"):
        read_adapter(folder, TINY)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(BackendError, match=r"adapter_model.bin is there: save it again with safe_serialization=True"):
        read_adapter(folder, TINY)
    (folder / CONFIG).write_text("{\n oops")
    with pytest.raises(BackendError, match=rf"{CONFIG}:2: not JSON"):
        read_adapter(folder, TINY)
    with pytest.raises(BackendError, match=r"nowhere: must be a folder whose subfolders hold adapters"):
        adapter_folders(tmp_path / "nowhere")


SCENARIO = """
[model]
geometry = "tiny"
[engine]
max_loras = 2
max_cpu_loras = 3
max_num_seqs = 8
max_num_batched_tokens = 64
max_model_len = 512
max_lora_rank = 16
[adapters]
folder = "mine"
{more}
[workload]
{workload}
[backend]
kind = "cpu"
"""
DRAWN = """kind = "synthetic"
rate_rps = 20
duration_s = 1
prompt = { kind = "fixed", tokens = 20 }
output = { kind = "fixed", tokens = 4 }
popularity = { kind = "uniform" }"""


def world(tmp_path: Path, workload: str = DRAWN, more: str = "") -> str:
    save(tmp_path / "mine" / "cats")
    wide = tensors(SEVEN, dict.fromkeys(SEVEN, 12))
    save(tmp_path / "mine" / "dogs", {"r": 12, "lora_alpha": 12, "target_modules": SEVEN}, wide)
    (tmp_path / "mine" / "notes").mkdir(exist_ok=True)
    (tmp_path / "s.toml").write_text(SCENARIO.format(workload=workload, more=more))
    return str(tmp_path / "s.toml")


def test_a_folder_of_adapters_is_the_catalogue(tmp_path: Path) -> None:
    scenario = world(tmp_path)
    result = run_scenario(scenario, out=tmp_path / "run")
    adapters = result.tables.adapters
    assert adapters["name"].tolist() == ["cats", "dogs"]
    assert adapters["rank"].tolist() == [8, 16]
    assert adapters["nbytes"].tolist() == [TINY.lora_bytes(8, ["q_proj", "v_proj"]), TINY.lora_bytes(16)]
    assert (adapters["stages"] >= 1).all()
    again = run_scenario(str(tmp_path / "run" / "scenario.toml"), out=tmp_path / "again")
    assert again.tables.adapters["name"].tolist() == ["cats", "dogs"]


def test_a_trace_names_adapters_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = pd.DataFrame({"arrival_s": [0.0, 0.1], "prompt_tokens": [5, 5], "output_tokens": [2, 2]})
    scenario = world(tmp_path, 'kind = "table"\npath = "t.csv"', 'pinned = ["dogs"]')
    trace.assign(adapter=["dogs", "dogs"]).to_csv(tmp_path / "t.csv", index=False)
    result = run_scenario(scenario, out=tmp_path / "run")
    assert result.tables.adapters["name"].tolist() == ["dogs"]
    trace.assign(adapter=["dogs", "birds"]).to_csv(tmp_path / "t.csv", index=False)
    assert main(["run", scenario, "--out", str(tmp_path / "no")]) == 2
    said = capsys.readouterr().err
    assert "mine: no adapter 'birds', which the workload names; it has cats, dogs, …" in said
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("more", ["count = 2", "rank = 8", "ranks = [8]", 'target_modules = ["q_proj"]'])
def test_a_folder_says_it_all(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str) -> None:
    assert main(["run", world(tmp_path, more=more), "--out", str(tmp_path / "no")]) == 2
    key = more.partition(" ")[0]
    assert f"adapters.{key} and adapters.folder: give one of them" in capsys.readouterr().err


def test_ranks_are_judged_by_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = Path(world(tmp_path))
    scenario.write_text(scenario.read_text().replace("max_lora_rank = 16", "max_lora_rank = 8"))
    assert main(["run", str(scenario), "--out", str(tmp_path / "no")]) == 2
    assert "adapter dogs has rank 16, more than engine.max_lora_rank (8)" in capsys.readouterr().err


def test_reading_shapes_does_not_import_torch(tmp_path: Path) -> None:
    """What a replay does of it."""
    folder = save(tmp_path / "x")
    code = (
        "import sys; from pathlib import Path; from backend.peft import read_adapter;"
        "from backend.geometry import load_geometry; import sim.catalogue;"
        f"print(read_adapter(Path({str(folder)!r}), load_geometry('tiny')).rank); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("8", 0), done.stderr


def test_random_adapters_are_peft_folders_too(tmp_path: Path) -> None:
    from backend.host_store import write_random

    write_random(tmp_path / "x", TINY, 24, torch.float32, torch.Generator().manual_seed(0))
    adapter = read_adapter(tmp_path / "x", TINY)
    assert (adapter.rank, adapter.scaling, len(adapter.parts)) == (24, 1.0, 14)
    assert all((t != 0).any() for t in load_file(tmp_path / "x" / WEIGHTS).values())
