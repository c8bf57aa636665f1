"""`benchmarks.replay --grow` goes on where the compiled loop cannot be built by hand, as in an installation without pybind11."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import replay


def test_a_build_that_fails_is_told_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "Traceback\nModuleNotFoundError: No module named 'pybind11'\n"
        )

    monkeypatch.setattr(replay.subprocess, "run", failed)
    assert replay.price(tmp_path) == "not compiled here: ModuleNotFoundError: No module named 'pybind11'"
