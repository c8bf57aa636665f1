"""The committed Nsight Compute text parses into a row a kernel, each with its cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import ncu_table

COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results" / "sgmv_h100_ncu.txt"


def test_each_kernel_of_the_committed_profile_has_its_cell_and_metrics() -> None:
    found = ncu_table.table(COMMITTED.read_text())
    profiled = COMMITTED.read_text().count("==PROF== Profiling")
    assert len(found) == profiled > 0
    assert found["cell"].str.fullmatch(r"\w+,\d+,\w+,\d+,\d+").all()
    assert (found["us"] > 0).all()
    assert found[["dram_pct", "l2_pct", "sm_pct", "warps_pct", "active_pct"]].stack().between(0, 100).all()
    of_o = found.loc[found["cell"] == "o,2048,seg1,1,16", "kernel"].tolist()
    assert of_o[0].startswith("nvjet")  # cuBLAS
    assert of_o[1:] == ["shrink_short_2", "expand_long"] * 2


def test_a_file_without_kernels_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "ncu.txt"
    empty.write_text("nothing\n")
    assert ncu_table.main([str(empty)]) == 2
    assert f"{empty}: has no kernel sections" in capsys.readouterr().err
