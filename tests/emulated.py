"""The CUDA kernels on the CPU: their sources as they are, over those in `emulator/`, compiled with the C++ compiler that is there."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.sgmv import base_linear, cuda_kernels, nvrtc
from backend.sgmv.arguments import TensorMap

EMULATOR = Path(__file__).parent / "emulator"
PARTS = ("machine", "instructions", "hopper", "launches")
ONE_FUNCTION = re.compile(
    r"^(?:template <int \w+>\n)?static __device__ __forceinline__ [\w ]+? \*?\w+\((?:[^;{]|\n)*?\) \{(?:[^\n]*\}\n|.*?\n\}\n)",
    re.MULTILINE | re.DOTALL,
)
PLAIN = """
static Register segment_map_known("segment_map", [](void** a) {
    auto slots = *(const int**)a[0], ranks = *(const int**)a[1]; auto header = *(int**)a[2]; auto tiles = *(int4**)a[3];
    auto rows = *(int**)a[4]; int count = *(int*)a[5], most = *(int*)a[6], size = *(int*)a[7];
    return std::function<void()>([=] { segment_map(slots, ranks, header, tiles, rows, count, most, size); });
});
static Register settle_known("settle", [](void** a) {
    auto h = *(float**)a[0]; int pieces = *(int*)a[1], cells = *(int*)a[2];
    return std::function<void()>([=] { settle(h, pieces, cells); });
});
"""


def translated() -> str:
    """The sources with what `emulator/` stands for left out: functions that are one instruction, and all of `hopper.cu`."""
    text = nvrtc.source().decode()
    text = re.sub(r'#line 1 "hopper.cu".*?(?=#line 1 ")', "", text, flags=re.DOTALL)
    text = re.sub(r"#define KERNEL\(.*?\n.*?\n", "", text)
    text = re.sub(r"^typedef unsigned .*?;\n", "", text, flags=re.MULTILINE)
    text = re.sub(r'asm volatile\("(?:fence|wgmma)\.[^"]*" ::: "memory"\);', ";", text)  # orders what is in order here
    text = ONE_FUNCTION.sub(lambda found: "" if "asm" in found[0] else found[0], text)
    text = re.sub(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];", r"\1* \2 = (\1*)running->shared;", text)
    return text.replace("__shared__ ", "static thread_local ")


def build(folder: Path, *, half: bool) -> ctypes.CDLL:
    """Compile for float16 (`half`) or bfloat16."""
    source, made = folder / "kernels.cpp", folder / f"kernels-{'fp16' if half else 'bf16'}.so"
    includes = "".join(f'#include "{EMULATOR / part}.hpp"\n' for part in PARTS)
    source.write_text(f"{includes}{translated()}{PLAIN}")
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", *(["-DFP16"] * half)]
    subprocess.run(["g++", *flags, "-o", str(made), str(source)], check=True)
    return ctypes.CDLL(str(made))


@dataclass(frozen=True, slots=True)
class Emulated:
    """Stands for `nvrtc.Kernels`; `launched`: the names of all launches, `kept`: what must live until they have ended."""

    compiled: ctypes.CDLL
    processors: int
    rooms: Mapping[str, int]
    launched: list[str] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)

    def launch(
        self,
        name: str,
        grid: int,
        threads: int,
        values: Sequence[Any],
        shared_bytes: int = 0,
        *,
        early: bool,
        cluster: int = 1,
    ) -> None:
        self.launched.append(name)
        code = self.compiled.launch(
            name.encode(), grid, threads, nvrtc.pointers_to(values), shared_bytes, cluster, early
        )
        assert code == 0, f"{name}: not known"

    def synchronize(self) -> None:
        """Until all launches have ended: before anybody looks at what they wrote."""
        name = ctypes.create_string_buffer(64)
        assert self.compiled.synchronize(name, len(name)) == 0, f"{name.value.decode()}: never ends"
        self.kept.clear()


def on_the_cpu(monkeypatch: pytest.MonkeyPatch, compiled: ctypes.CDLL, processors: int) -> Emulated:
    """Have all launches run in `compiled`, on so many multiprocessors with the shared memory of an H100's."""
    names = [f"linear_{kind}{rows}" for kind in ("", "gated_") for rows in (8, 16, 32)]
    names += [f"linear_wide_{rows}_{groups}" for rows in (64, 128) for groups in (1, 2)]
    names += ["shrink_long_2", "shrink_long_4", "expand_long", "expand_long_swiglu"]
    run = Emulated(compiled, processors, dict.fromkeys(names, 220 * 1024))
    for module in (nvrtc, cuda_kernels, base_linear):
        monkeypatch.setattr(module, "kernels", lambda _: run)
    monkeypatch.setattr(base_linear, "_tensor_map", _tensor_map)
    return run


def _tensor_map(
    address: int, _: torch.dtype, rows: int, width: int, stride: int, box_rows: int
) -> ctypes.Array[ctypes.c_ulonglong]:
    return TensorMap(address, width, rows, 2 * stride, box_rows)
