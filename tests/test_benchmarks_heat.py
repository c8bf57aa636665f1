"""The committed order of a measurement shows the heat that its profile has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backend.errors import BackendError
from backend.profile import load_profile
from benchmarks import heat

NAME = "h100-llama-3.1-8b"


def test_steps_take_longer_the_more_heat_they_began_with() -> None:
    """Held against a fit to single steps: their medians in groups of rising heat."""
    table = heat.repeats(NAME)
    groups = heat.by_level(table)
    spare = load_profile(NAME).predictor.heat.spare
    for regime in ("decode", "mixed", "long"):
        own = groups[groups["regime"] == regime]
        assert own["over"].to_numpy() == pytest.approx(own["factor"].to_numpy(), abs=0.006)
        assert own["over"].iloc[-1] > 1.025 > 1.006 > own.loc[own["level"] < spare, "over"].max()
    as_it_was, without = heat.spread(table)
    assert without < 0.7 * as_it_was
    assert table["factor"].min() == 1.0
    assert np.isfinite(groups["over"]).all()


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert heat.main(["--figure", str(tmp_path / "heat.png")]) == 0
    assert "repeats of one step lie" in capsys.readouterr().out
    assert (tmp_path / "heat.png").stat().st_size > 10_000


def test_a_profile_without_an_order_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match="has no steps in the order"):
        heat.repeats("h200-llama-3.1-8b")
    assert heat.main(["--profile", "h100-llama-3.2-1b"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
