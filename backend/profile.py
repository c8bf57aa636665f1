"""A profile: cost curves measured on a real device, as a folder of data that replays anywhere."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import BackendError
from backend.predictor import Predictor
from backend.profile_values import Values

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 3
FITTED = ("format", "name", "gpu_bytes", "accuracy", "stage", "load", "predictor")
"""Keys of the file that are no facts about the measurement (`Profile.meta`)."""


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """Seconds to move an adapter: straight lines through the measured `points` (bytes, seconds); before the first and beyond the
    last, and everywhere where there are none, as `latency_s + bytes / bytes_per_s` rises.

    Raises `ValueError` unless the points' bytes rise and their seconds do not fall.
    """

    latency_s: float
    bytes_per_s: float
    points: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if any(b[0] <= a[0] or b[1] < a[1] for a, b in pairwise(self.points)):
            raise ValueError("points of a load curve must have rising bytes, and seconds that do not fall")

    def seconds(self, nbytes: int) -> float:
        """What a move of `nbytes` takes."""
        if not self.points:
            return self._trend_s(nbytes)
        right = bisect_right(self.points, nbytes, key=itemgetter(0))
        if right in (0, len(self.points)):
            at, seconds = self.points[0 if right == 0 else -1]
            return max(0.0, seconds + self._trend_s(nbytes) - self._trend_s(at))
        (low, low_s), (high, high_s) = self.points[right - 1], self.points[right]
        return low_s + (nbytes - low) / (high - low) * (high_s - low_s)

    def _trend_s(self, nbytes: float) -> float:
        return self.latency_s + nbytes / self.bytes_per_s

    def to_json(self) -> dict[str, object]:
        """As `profile.json` has it."""
        return {"latency_s": self.latency_s, "bytes_per_s": self.bytes_per_s, "points": [list(p) for p in self.points]}


@dataclass(frozen=True, slots=True)
class Profile:
    """What one device takes for steps and loads of one geometry, and how well that is known.

    `accuracy`: error of the predictor on held-out random steps (`steps`, `mape`, `p95`); `meta`: GPU, driver,
    versions, date, geometry name and the limits it was measured under.
    """

    name: str
    gpu_bytes: int
    predictor: Predictor
    stage: LoadCurve
    load: LoadCurve
    accuracy: Mapping[str, float]
    meta: Mapping[str, object]

    def write(self, folder: Path) -> None:
        """Write `profile.json` into `folder`."""
        data = {
            "format": FORMAT,
            "name": self.name,
            "gpu_bytes": self.gpu_bytes,
            "accuracy": dict(self.accuracy),
            **self.meta,
            "stage": self.stage.to_json(),
            "load": self.load.to_json(),
            "predictor": self.predictor.to_json(),
        }
        (folder / "profile.json").write_text(json.dumps(data, indent=1) + "\n")


def shipped_profiles() -> list[str]:
    """Names of the profiles inside the package."""
    folder = files("backend") / "profiles"
    return sorted(entry.name for entry in folder.iterdir() if (entry / "profile.json").is_file())


def measured_steps(name_or_path: str) -> Path | None:
    """The Parquet file of a profile's measured steps; None if it has none."""
    return _table(name_or_path, "steps")


def measured_loads(name_or_path: str) -> Path | None:
    """The Parquet file of a profile's measured loads; None if it has none."""
    return _table(name_or_path, "loads")


def measured_rounds(name_or_path: str) -> Path | None:
    """The Parquet file of a profile's steps in the order in which they were measured; None if it has none."""
    return _table(name_or_path, "rounds")


def measured_parts(name_or_path: str) -> Path | None:
    """The Parquet file of the parts of a step (`backend/parts.py`) measured beside a profile; None if it has none."""
    return _table(name_or_path, "parts")


def _table(name_or_path: str, table: str) -> Path | None:
    folder = profile_folder(name_or_path)
    file = folder / f"{table}.parquet"
    return file if file.is_file() else None


def profile_folder(name_or_path: str) -> Path:
    """Where a shipped profile lies, or the path itself."""
    shipped = name_or_path in shipped_profiles()
    return Path(str(files("backend") / "profiles" / name_or_path)) if shipped else Path(name_or_path)


def load_profile(name_or_path: str) -> Profile:
    """A shipped profile by name, or a profile folder. Raises `BackendError` for anything else."""
    if name_or_path in shipped_profiles():
        text, where = (files("backend") / "profiles" / name_or_path / "profile.json").read_text(), name_or_path
    else:
        path = Path(name_or_path) / "profile.json"
        if not path.is_file():
            known = ", ".join(shipped_profiles())
            raise BackendError(
                f"profile {name_or_path}: neither a shipped profile ({known}) nor a folder with profile.json"
            )
        text, where = path.read_text(), str(path)
    data = _parsed(text, where)
    if data.pop("format", None) != FORMAT:
        raise BackendError(
            f"{where}: profile format must be {FORMAT}; `multilora measure --refit` makes it of older ones"
        )
    try:
        values = Values(data)
        return Profile(
            name=values.text("name"),
            gpu_bytes=values.whole("gpu_bytes", least=1),
            predictor=Predictor.from_json(values.table("predictor").data),
            stage=_curve(values.table("stage")),
            load=_curve(values.table("load")),
            accuracy=_accuracy(values.table("accuracy")),
            meta={key: value for key, value in data.items() if key not in FITTED},
        )
    except ValueError as error:
        raise BackendError(f"{where}: not a profile: {error}; measure it again") from error


def _curve(values: Values) -> LoadCurve:
    points = values.pairs("points") if "points" in values.data else ()  # profiles of before have none
    return LoadCurve(values.number("latency_s", least=0), values.number("bytes_per_s", above=0), points)


def _accuracy(values: Values) -> dict[str, float]:
    return {
        "steps": values.whole("steps", least=0),
        **{k: values.number(k, least=0) for k in ("mape", "p95", "spread")},
    }


def measured_facts(folder: Path) -> tuple[int, list[int], dict[str, object]]:
    """What a profile folder of any format says of its measurement: GPU bytes, graph sizes, and `Profile.meta`."""
    path = folder / "profile.json"
    if not path.is_file():
        raise BackendError(f"{folder}: has no profile.json")
    data = _parsed(path.read_text(), str(path))
    try:
        values = Values(data)
        sizes = values.table("predictor").numbers("graph_sizes", rising=True)
        meta = {key: value for key, value in data.items() if key not in FITTED}
        return values.whole("gpu_bytes", least=1), [int(size) for size in sizes], meta
    except ValueError as error:
        raise BackendError(f"{path}: not a profile: {error}; measure it again") from error


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise BackendError(f"{where}: not a profile ({error}); measure it again") from error
    if not isinstance(data, dict):
        raise BackendError(f"{where}: not a profile; measure it again")
    return data


def write_profile(
    profile: Profile, steps: pd.DataFrame, loads: pd.DataFrame, out: Path, rounds: pd.DataFrame | None = None
) -> None:
    """Write the profile's folder in one move, so that a broken-off one never looks whole; `rounds`: the steps in the order in which they
    were executed (`backend.rounds`), for those who know it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".profile-") as scratch:
        folder = Path(scratch) / "profile"
        folder.mkdir()
        profile.write(folder)
        steps.to_parquet(folder / "steps.parquet", index=False)
        loads.to_parquet(folder / "loads.parquet", index=False)
        if rounds is not None:
            rounds.to_parquet(folder / "rounds.parquet", index=False, compression="zstd")
        folder.rename(out)
