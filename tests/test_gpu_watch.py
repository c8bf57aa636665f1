"""Clocks watched while measuring: samples to facts, and no GPU at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backend.gpu_watch import summary, watching

LINES = ["1980, 0x0000000000000000, 310.5, 51", "1755, 0x0000000000000004, 699.9, 63", "1770, 0x4, 698, 64", "[N/A], x"]


def test_samples_become_facts() -> None:
    assert summary(LINES) == {
        "clocks": {
            "samples": 3,
            "sm_clock_mhz": {"median": 1770.0, "least": 1755.0},
            "power_w": 698.0,
            "temperature_c": 64.0,
            "throttled": {"power cap": 0.667},
        }
    }


def test_nothing_sampled_is_said() -> None:
    assert summary(["NVIDIA-SMI has failed"]) == {"clocks": "not measured"}
    with watching(enabled=False) as watch:
        pass
    assert watch.facts == {"clocks": "not measured"}


def test_a_tool_that_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '1200, 0x8, 100, 40'\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with watching(enabled=True) as watch:
        import time

        time.sleep(0.5)
    assert watch.facts["clocks"]["throttled"] == {"hardware slowdown": 1.0}  # type: ignore[index]
