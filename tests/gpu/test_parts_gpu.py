"""The parts of a step on a GPU: each is measured, and together they are about the step."""

from __future__ import annotations

import pytest

from backend.geometry import load_geometry
from backend.parts import measure_points

pytestmark = pytest.mark.gpu


def test_parts_make_up_the_step() -> None:
    points = measure_points(
        load_geometry("llama-3.2-1b"), "cuda", [32], [16], [1, 8, 32], context=512, max_lora_rank=64, repeats=10
    )
    base = points[(points["adapters"] == 0) & (points["batch"] == 32)].iloc[0]
    adapted = points[points["adapters"] > 0]
    parts = ["attention_ms", "shrink_ms", "expand_ms", "loop_ms", "padded_step_ms"]
    assert (adapted[parts] > 0).all(axis=None)
    together = base["device_ms"] + adapted["shrink_ms"] + adapted["expand_ms"]
    assert ((together / adapted["device_ms"]).between(0.7, 1.5)).all()
    assert adapted["loop_ms"].is_monotonic_increasing
    assert adapted["loop_ms"].iloc[-1] > (adapted["shrink_ms"] + adapted["expand_ms"]).iloc[-1]
    # Reading is faster than the copy that the floor is taken at.
    assert (points["step_ms"] > 0.8 * points["floor_bytes"] / points["copy_gb_per_s"] / 1e6).all()
