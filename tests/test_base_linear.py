"""Which kernel takes a base product, and that the structures Python fills are those the kernels read."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from backend.sgmv import base_linear
from backend.sgmv.arguments import ExpandArgs, LinearArgs, ShrinkArgs, WideArgs
from backend.sgmv.nvrtc import Kernels

ROOM = 227 * 1024
WIDE = {f"linear_wide_{rows}_{groups}": ROOM - 4096 for rows in (64, 128) for groups in (1, 2)}
FEW = {f"linear_{kind}{rows}": ROOM - 2048 for kind in ("", "gated_") for rows in (8, 16, 32)}
HOPPER = Kernels({}, {**FEW, **WIDE}, 132)
AMPERE = Kernels({}, dict.fromkeys(FEW, 163 * 1024), 108)
LINEARS = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("rank", [0, 16, 64])
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 32, 33, 64, 65, 128])
def test_a_launch_fits_its_processor(name: str, rank: int, rows: int) -> None:
    slices, width = LINEARS[name]
    few = rows <= 32
    plan = base_linear._few(rows, slices, rank, HOPPER) if few else base_linear._wide(rows, slices, width, rank, HOPPER)
    if plan is None:
        assert rows > 32 and (name == "o" or rank == 0)
        return
    assert plan.shared_bytes <= HOPPER.rooms[plan.name]
    assert rows <= int(plan.name.split("_")[1 if few else 2])  # the rows that the kernel is made for
    assert few or 3 <= plan.depth <= base_linear.RING_MOST
    assert plan.ring == 0 if not few or not rank else base_linear.FEWEST_PLACES <= plan.ring <= base_linear.MOST_PLACES
    assert plan.grid % plan.cluster == 0
    tiles = -(-sum(slices) // plan.columns)
    assert plan.grid == tiles * plan.cluster if plan.cluster > 1 else plan.grid <= min(tiles, HOPPER.processors)


@pytest.mark.parametrize("rank", [0, 16, 64, 128])
@pytest.mark.parametrize("rows", [1, 8, 9, 17, 32])
def test_gate_and_up_of_few_rows_are_one_launch_with_swiglu(rank: int, rows: int) -> None:
    plan = base_linear._gated(rows, 14336, rank, HOPPER)
    assert plan is not None and plan.shared_bytes <= HOPPER.rooms[plan.name] and plan.grid == HOPPER.processors
    assert rows <= int(plan.name.split("_")[2])
    assert base_linear._gated(rows, 14340, rank, HOPPER) is None, "gate and up must be cut alike"
    assert base_linear._gated(33, 14336, rank, HOPPER) is None


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("rows", [8, 16, 32])
def test_few_rows_leave_room_for_the_norm_behind_them(rank: int, rows: int) -> None:
    plans = base_linear._few(rows, (4096,), rank, HOPPER), base_linear._gated(rows, 14336, rank, HOPPER)
    for plan in plans:
        assert plan is not None and plan.shared_bytes + base_linear.NORM_BYTES <= HOPPER.rooms[plan.name]


def test_slices_that_do_not_end_with_a_tile_are_left_to_others() -> None:
    assert base_linear._few(8, (3584, 520, 520), 16, HOPPER) is None
    assert base_linear._few(8, (3584, 520, 520), 0, HOPPER) is not None
    assert base_linear._wide(64, (3584, 520, 520), 3584, 16, HOPPER) is None


def test_without_wgmma_or_shared_memory_only_few_rows_are_taken() -> None:
    assert base_linear._wide(64, (4096,), 14336, 16, AMPERE) is None
    assert base_linear._few(8, (4096,), 16, AMPERE) is not None
    assert base_linear._few(32, (4096,), 16, AMPERE) is None


def test_a_rank_that_leaves_no_room_for_a_ring_is_not_taken() -> None:
    assert base_linear._wide(128, (14336, 14336), 4096, 64, HOPPER) is not None
    assert base_linear._wide(128, (14336, 14336), 4096, 256, HOPPER) is None


def test_the_structures_are_as_large_as_the_kernels_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    from backend.sgmv import nvrtc

    pairs = {"Shrink": ShrinkArgs, "Expand": ExpandArgs, "Linear": LinearArgs, "LinearWide": WideArgs}
    checks = "".join(f'static_assert(sizeof({name}) == {ctypes.sizeof(kind)}, "");\n' for name, kind in pairs.items())
    # Structures without kernels, which `test_sgmv.py` compiles, take a second instead of half a minute.
    source = re.sub(r"#define KERNEL\((.*?)\).*?\n.*?\n", r"#define KERNEL(\1)\n", nvrtc.source().decode())
    assert "#define KERNEL(NAME, THREADS, BLOCKS, ARGS, BODY)\n" in source
    monkeypatch.setattr(nvrtc, "source", (source + checks).encode)
    try:
        nvrtc.compile_cubin((9, 0), half=False)
    except RuntimeError as error:
        if "do not compile" in str(error):
            raise
        pytest.skip(f"no NVRTC library: {error}")


def test_bias_and_odd_widths_go_to_cublas() -> None:
    x, weight = torch.zeros(4, 4096), torch.zeros(8, 4096)
    assert not base_linear.takes(x, weight, torch.zeros(8))
    assert not base_linear.takes(torch.zeros(4, 4092), torch.zeros(8, 4092), None)
