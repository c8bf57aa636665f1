"""Typed reads from a scenario's tables; every error names the key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from workloads import lengths
from workloads.errors import WorkloadError

LARGEST = 2**31
"""Whole numbers stay below it: more tokens or adapters than that are a slip of the pen."""


class Reader:
    """A TOML table at `where`, whose keys must be among `known`. Paths in it are relative to `base_dir`."""

    def __init__(self, data: Mapping[str, object], where: str, known: tuple[str, ...], base_dir: Path) -> None:
        self.data = data
        self.where = where
        self.base_dir = base_dir
        for key in data:
            if key not in known:
                raise WorkloadError(f"{where}.{key}: unknown key; known: {', '.join(known)}")

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A finite number above zero (or zero, where that means something); infinite only as a default."""
        value = self.data.get(key, default)
        want = f"must be a number {'>=' if zero else '>'} 0"
        if value is None:
            raise WorkloadError(f"{self.where}.{key} is missing, {want}")
        sound = isinstance(value, int | float) and not isinstance(value, bool)
        number = float(value) if isinstance(value, int | float) else 0.0
        finite = number < float("inf") or key not in self.data
        if not (sound and finite and (number > 0 or (zero and number == 0))):
            raise WorkloadError(f"{self.where}.{key} is {value!r}, {want}")
        return number + 0.0  # -0.0 becomes 0.0, as some laws know no negative zero

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least` and below `LARGEST`."""
        value = self.data.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST:
            raise WorkloadError(
                f"{self.where}.{key} is {'missing' if value is None else repr(value)}, must be a whole number >= {least}"
                f" and < {LARGEST}"
            )
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.data.get(key, default)
        if not isinstance(value, str):
            raise WorkloadError(f"{self.where}.{key} is {value!r}, must be a text")
        return value

    def numbers(self, key: str) -> npt.NDArray[np.float64]:
        """A list of finite numbers >= 0, at least one."""
        value = self.data.get(key)
        listed = value if isinstance(value, list) else []
        numbers = [
            v for v in listed if isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < float("inf")
        ]
        if not listed or len(numbers) < len(listed):
            raise WorkloadError(f"{self.where}.{key} is {value!r}, must be a list of numbers >= 0")
        return np.array(numbers, dtype=np.float64)

    def path(self, key: str) -> Path:
        return self.base_dir / self.text(key)

    def table(self, key: str, known: tuple[str, ...]) -> Reader | None:
        """A nested table; None if it is not there."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise WorkloadError(f"{self.where}.{key} is {value!r}, must be a table with {', '.join(known)}")
        return Reader(value, f"{self.where}.{key}", known, self.base_dir)

    def tables(self, key: str, known: tuple[str, ...]) -> list[Reader]:
        """A list of nested tables, at least one."""
        value = self.data.get(key)
        if not (isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value)):
            raise WorkloadError(f"{self.where}.{key} is {value!r}, must be a list of tables: [[{self.where}.{key}]]")
        return [Reader(v, f"{self.where}.{key}[{i}]", known, self.base_dir) for i, v in enumerate(value)]

    def choice(self, key: str, known: Mapping[str, tuple[str, ...]]) -> tuple[str, Reader]:
        """A nested table with a `kind`, and its kind."""
        value = self.data.get(key)
        where = f"{self.where}.{key}"
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(kind, str) or kind not in known:
            raise WorkloadError(f"{where} must be a table with kind = one of {', '.join(known)}; got {value!r}")
        return kind, Reader(value, where, ("kind", *known[kind]), self.base_dir)


LENGTHS: Mapping[str, tuple[str, ...]] = {
    "fixed": ("tokens",),
    "lognormal": ("median", "sigma", "min", "max"),
    "quantiles": ("tokens", "shares"),
    "empirical": ("path",),
}


def draw_lengths(table: Reader, key: str, size: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Token counts int64[size] by the length table under `key`."""
    kind, sub = table.choice(key, LENGTHS)
    if kind == "fixed":
        return lengths.fixed(sub.whole("tokens"), size)
    if kind == "empirical":
        return lengths.empirical(lengths.read_histogram(sub.path("path")), size, rng)
    if kind == "quantiles":
        shares = sub.numbers("shares") if "shares" in sub.data else None
        return lengths.quantiles(sub.numbers("tokens"), size, rng, shares)
    low, high = sub.whole("min", 1), sub.whole("max", 1 << 20)
    return lengths.lognormal(sub.number("median"), sub.number("sigma", zero=True), low, high, size, rng)
