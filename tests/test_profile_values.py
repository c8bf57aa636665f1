"""A profile that was cut short or edited is refused by one sentence that names the key."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from backend.errors import BackendError
from backend.profile import load_profile, measured_facts, profile_folder, shipped_profiles
from backend.profile_values import Values
from sim.flags import whole

DECODE = ("predictor", "regimes", "decode")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("name",), None, "name is None, must be a text"),
        (("gpu_bytes",), 0, "gpu_bytes is 0, must be a whole number >= 1"),
        (("gpu_bytes",), 2**70, "gpu_bytes is "),
        (("accuracy", "mape"), "x", "accuracy.mape is 'x', must be a finite number >= 0"),
        (("load", "bytes_per_s"), 0, "load.bytes_per_s is 0, must be a finite number > 0"),
        (("stage",), 1.0, "stage is 1.0, must be a table"),
        (("stage", "points"), 1, "stage.points is 1, must be a list of pairs of numbers"),
        (("stage", "points", 1), [4e7], "stage.points[1] is [40000000.0], must be two finite numbers >= 0"),
        (("stage", "points", 2), [1, 2], "stage.points[2] is [1, 2], must be above the pair before"),
        (("predictor", "graph_sizes"), [1, 4, 2], "predictor.graph_sizes[2] is 2, must be above the one before, 4"),
        (("predictor", "graph_sizes"), [0.5], "predictor.graph_sizes is [0.5], must be whole numbers >= 1"),
        (("predictor", "regimes"), {}, "predictor.regimes has , must have eager"),
        ((*DECODE, "device", 3), None, "predictor.regimes.decode.device[3] is None, must be a finite number"),
        ((*DECODE, "device", 3), float("nan"), "predictor.regimes.decode.device[3] is nan, must be a finite number"),
        ((*DECODE, "device"), [1.0], "predictor.regimes.decode.device has 1 numbers, must have 49 to 65"),
        ((*DECODE, "knots"), [], "predictor.regimes.decode.knots has 0 numbers"),
        ((*DECODE, "host"), True, "predictor.regimes.decode.host is True, must be a list of numbers"),
        ((*DECODE, "low", "rows"), [], "predictor.regimes.decode.low.rows is [], must be a finite number"),
        ((*DECODE, "high"), {}, "predictor.regimes.decode.high.rows is missing"),
        ((*DECODE, "lora_rows"), 0, "predictor.regimes.decode.lora_rows is 0, must be a whole number >= 1"),
    ],
)
def test_what_is_no_profile(tmp_path: Path, path: tuple[str | int, ...], value: object, says: str) -> None:
    data = json.loads((profile_folder("h100-llama-3.1-8b") / "profile.json").read_text())
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(data))
    with pytest.raises(BackendError) as caught:
        load_profile(str(tmp_path))
    assert str(caught.value).startswith(f"{file}: not a profile: {says}")
    if path[0] == "gpu_bytes" or (path[-1] == "graph_sizes" and value != [0.5]):
        with pytest.raises(BackendError, match="not a profile"):
            measured_facts(tmp_path)


def test_shipped_profiles_are_read_as_they_were_written(tmp_path: Path) -> None:
    for name in shipped_profiles():
        profile = load_profile(name)
        (tmp_path / name).mkdir()
        profile.write(tmp_path / name)
        assert load_profile(str(tmp_path / name)) == profile


def test_numbers_have_a_length() -> None:
    assert Values({"a": (1, 2.5)}).numbers("a", least=2, most=2, rising=True) == (1, 2.5)
    with pytest.raises(ValueError, match=r"^t\.a has 2 numbers, must have 3 to 4$"):
        Values({"a": [1, 2]}, "t.").numbers("a", least=3, most=4)


def test_flags_are_numbers_that_a_machine_counts_with() -> None:
    assert whole("-3") == -3
    for text in ("x", "1.5", "", str(2**70)):
        with pytest.raises(ArgumentTypeError, match="must be a whole number below 2147483648"):
            whole(text)
