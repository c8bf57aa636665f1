"""`benchmarks.sgmv --cell`: what a cell may be, and one clear sentence otherwise."""

from __future__ import annotations

import pytest
import torch

from backend.errors import BackendError
from benchmarks.sgmv import cell_of, main
from benchmarks.sgmv_cells import grid


def test_every_cell_of_the_grid_can_be_named() -> None:
    for cell in grid():
        assert cell_of(f"{cell.layer},{cell.rows},{cell.distribution},{cell.adapters},{cell.rank}") == cell


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("qkv,1,identical", "must be LAYER,T,DISTRIBUTION,ADAPTERS,RANK"),
        ("qkv,one,identical,1,16", "must be LAYER,T,DISTRIBUTION,ADAPTERS,RANK"),
        ("lm_head,1,identical,1,16", "LAYER must be one of qkv, o, gate_up, down"),
        ("o,8,zipf,2,16", "DISTRIBUTION must be one of distinct, identical, uniform, skewed or seg2"),
        ("o,8,seg4,2,16", "or seg2"),
        ("o,8,uniform,0,16", "at least 1"),
        ("o,8,uniform,9,16", "ADAPTERS at most T"),
        ("o,8,distinct,4,16", "ADAPTERS must be 8 where rows are distinct"),
        ("o,8,identical,4,16", "ADAPTERS must be 1 where rows are identical"),
    ],
)
def test_what_is_no_cell_is_refused(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match=said):
        cell_of(text)
    assert main(["--cell", text]) == 2
    assert capsys.readouterr().err.startswith(f"error: --cell {text}: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cell_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cell", "qkv,1,identical,1,16"]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err
