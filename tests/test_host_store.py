"""Adapters in host memory: the bytes are those of the tensors, transposed and converted, and memory is used again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from backend import packing
from backend.base import AdapterShape
from backend.errors import BackendError
from backend.geometry import load_geometry
from backend.host_store import HostStore
from backend.packing import HostBuffer, Packer
from backend.peft import CONFIG, WEIGHTS, PeftAdapter, read_adapter
from backend.sgmv import SlotLayout
from backend.sgmv.slots import FUSED

TINY = load_geometry("tiny")
SEVEN = tuple(TINY.linears())
LAYOUT = SlotLayout.of(TINY.linears(), TINY.num_layers)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def folder_of(
    path: Path, modules: Sequence[str], ranks: dict[str, int], a: torch.dtype, b: torch.dtype, **config: object
) -> Path:
    """A PEFT folder with random weights on some linears of every layer, of one type for A and one for B."""
    path.mkdir(parents=True)
    tensors = {}
    for layer in range(TINY.num_layers):
        for module in modules:
            parent = "self_attn" if module in SEVEN[:4] else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{parent}.{module}"
            inside, outside = TINY.linears()[module]
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(ranks[module], inside).to(a)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outside, ranks[module]).to(b)
    save_file(tensors, path / WEIGHTS)
    rank = max(ranks.values())
    whole = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": ranks} | config
    (path / CONFIG).write_text(json.dumps(whole))
    return path


def plain(peft: PeftAdapter, modules: Sequence[str], dtype: torch.dtype) -> torch.Tensor:
    """What a slot holds, said in a few lines."""
    packed, tensors = torch.zeros(peft.rank * LAYOUT.unit, dtype=dtype), load_file(peft.folder / WEIGHTS)
    for part in peft.parts:
        if part.module not in modules:
            continue
        name, fused = next(item for item in FUSED.items() if part.module in item[1])
        linear, i = LAYOUT.layers[part.layer][name], fused.index(part.module)
        for start, width, weights in (
            (linear.a_units[i], linear.in_features, tensors[part.a.name]),
            (linear.b_units[i], linear.out_features[i], (tensors[part.b.name].float() * part.factor).T),
        ):
            rows = packed[peft.rank * start : peft.rank * (start + width)].view(peft.rank, width)
            rows[: part.rank] = weights
    return packed


def bits(tensor: torch.Tensor) -> list[int]:
    return packing.as_bits(tensor).tolist()  # type: ignore[no-any-return]


@settings(max_examples=30, deadline=None)
@given(
    modules=st.lists(st.sampled_from(SEVEN), min_size=1, max_size=7, unique=True),
    asked=st.sets(st.sampled_from(SEVEN), min_size=1),
    rank=st.sampled_from([1, 8, 12, 32]),
    other=st.sampled_from([4, 32]),
    a=st.sampled_from(FLOATS),
    b=st.sampled_from(FLOATS),
    host=st.sampled_from([torch.float32, torch.bfloat16]),
    sizes=st.sampled_from([(packing.CHUNK, packing.GRAIN), (4096, 999)]),
)
def test_the_bytes_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    modules: list[str],
    asked: set[str],
    rank: int,
    other: int,
    a: torch.dtype,
    b: torch.dtype,
    host: torch.dtype,
    sizes: tuple[int, int],
) -> None:
    """Any linears, ranks, types and scalings, whole tensors at a time or small pieces, in memory that another left."""
    ranks = dict.fromkeys(modules, rank) | {modules[0]: other}
    folder = folder_of(
        tmp_path_factory.mktemp("a") / "x", modules, ranks, a, b, alpha_pattern={modules[-1]: 3.0}, use_rslora=rank == 8
    )
    adapter = read_adapter(folder, TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK", sizes[0])
        patch.setattr(packing, "GRAIN", sizes[1])
        packer = Packer(LAYOUT, host)
        buffer = HostBuffer(adapter.rank, LAYOUT.unit, host, pinned=False)
        before = folder_of(folder / "before", SEVEN, dict.fromkeys(SEVEN, adapter.rank), torch.float16, host)
        for peft, wanted in ((read_adapter(before, TINY), SEVEN), (adapter, tuple(asked))):
            packer.fill(buffer, peft, wanted)
            assert bits(buffer.packed) == bits(plain(peft, wanted, host))
        packer.close()


def test_a_file_system_that_hands_out_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, at: whole(file, [into[0][:1000]], at))
    folder = folder_of(tmp_path / "x", SEVEN, dict.fromkeys(SEVEN, 8), torch.float32, torch.float32)
    adapter = read_adapter(folder, TINY)
    packer, buffer = Packer(LAYOUT, torch.float32), HostBuffer(8, LAYOUT.unit, torch.float32, pinned=False)
    packer.fill(buffer, adapter, SEVEN)
    assert bits(buffer.packed) == bits(plain(adapter, SEVEN, torch.float32))
    packer.close()


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    """Says so, and the memory is as good as before for the next."""
    folder = folder_of(tmp_path / "x", SEVEN, dict.fromkeys(SEVEN, 8), torch.float32, torch.float32)
    other = read_adapter(folder_of(tmp_path / "y", ["q_proj"], {"q_proj": 8}, FLOATS[0], FLOATS[0]), TINY)
    adapter = read_adapter(folder, TINY)
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)
    packer, buffer = Packer(LAYOUT, torch.float32), HostBuffer(8, LAYOUT.unit, torch.float32, pinned=False)
    with pytest.raises(BackendError, match=rf"{WEIGHTS}: ends inside .*lora_[AB].weight now: it changed"):
        packer.fill(buffer, adapter, SEVEN)
    packer.fill(buffer, other, SEVEN)
    assert bits(buffer.packed) == bits(plain(other, SEVEN, torch.float32))
    packer.close()


def test_memory_serves_one_adapter_after_the_other() -> None:
    """As many buffers of a rank as were ever staged at once; the threads end with the store."""
    threads = threading.active_count()
    store = HostStore(TINY, LAYOUT, torch.float32, pinned=False, seed=0)
    for adapter in range(3):
        store.stage(AdapterShape(adapter, 8, SEVEN))
    assert len({store.packed(adapter).data_ptr() for adapter in range(3)}) == 3
    first = {buffer.packed.data_ptr() for buffer in store.staged.values()}
    for adapter in range(3, 20):
        store.drop(adapter - 3)
        timing = store.stage(AdapterShape(adapter, 8, SEVEN))
        assert timing.nbytes == 8 * LAYOUT.unit * 4
        assert {buffer.packed.data_ptr() for buffer in store.staged.values()} == first
    with pytest.raises(BackendError, match="adapter 3 must be staged"):
        store.packed(3)
    assert not store.spare[8]
    store.close()
    assert threading.active_count() == threads
    assert not Path(store.folder.name).exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_torch_converts_so_much_on_the_calling_thread() -> None:
    """In a fresh process: no thread starts for `GRAIN` elements, some do for many more."""
    code = f"""
import os, torch
def threads_after(count):
    weights = torch.ones(count, dtype=torch.float16)
    (weights.float() * 1.5).to(torch.bfloat16)
    return len(os.listdir("/proc/self/task"))
print(*(threads_after(count) for count in (1, {packing.GRAIN}, {packing.GRAIN * 64})))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    one, grain, many = map(int, done.stdout.split())
    assert one == grain < many
