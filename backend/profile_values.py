"""Values of `profile.json`, each checked as it is read: a profile is data, which may be cut short or edited by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


@dataclass(frozen=True, slots=True)
class Values:
    """A table of the file, `where` in it. Every read raises `ValueError` naming the key and what would be right."""

    data: Mapping[str, Any]
    where: str = ""

    def _bad(self, key: str, value: object, wanted: str) -> ValueError:
        return ValueError(f"{self.where}{key} is {value!r}, must be {wanted}")

    def _get(self, key: str) -> object:
        if key not in self.data:
            raise ValueError(f"{self.where}{key} is missing")
        return self.data[key]

    def table(self, key: str) -> Values:
        """A table inside this one."""
        value = self._get(key)
        if not isinstance(value, Mapping):
            raise self._bad(key, value, "a table")
        return Values(value, f"{self.where}{key}.")

    def text(self, key: str) -> str:
        """A text."""
        value = self._get(key)
        if not isinstance(value, str):
            raise self._bad(key, value, "a text")
        return value

    def number(self, key: str, *, above: float = -math.inf, least: float = -math.inf) -> float:
        """A finite number above `above`, at least `least`."""
        value = self._get(key)
        if not _is_number(value) or not value > above or not value >= least:  # type: ignore[operator]
            limit = f" > {above:g}" if above > -math.inf else f" >= {least:g}" if least > -math.inf else ""
            raise self._bad(key, value, f"a finite number{limit}")
        return value  # type: ignore[return-value]

    def whole(self, key: str, *, least: int) -> int:
        """A whole number of at least `least`."""
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**53:
            raise self._bad(key, value, f"a whole number >= {least}")
        return value

    def numbers(self, key: str, *, least: int = 0, most: int | None = None, rising: bool = False) -> tuple[float, ...]:
        """A list of `least` to `most` finite numbers, each above the one before if `rising`."""
        value = self._get(key)
        if not isinstance(value, list | tuple):
            raise self._bad(key, value, "a list of numbers")
        for i, item in enumerate(value):
            if not _is_number(item):
                raise self._bad(f"{key}[{i}]", item, "a finite number")
            if rising and i and not item > value[i - 1]:
                raise self._bad(f"{key}[{i}]", item, f"above the one before, {value[i - 1]}")
        if not least <= len(value) <= (len(value) if most is None else most):
            raise ValueError(f"{self.where}{key} has {len(value)} numbers, must have {least} to {most}")
        return tuple(value)

    def pairs(self, key: str) -> tuple[tuple[float, float], ...]:
        """A list of pairs of finite numbers >= 0; the first ones rise, the second ones do not fall."""
        value = self._get(key)
        if not isinstance(value, list | tuple):
            raise self._bad(key, value, "a list of pairs of numbers")
        for i, item in enumerate(value):
            pair = isinstance(item, list | tuple) and len(item) == 2 and all(_is_number(n) and n >= 0 for n in item)
            if not pair:
                raise self._bad(f"{key}[{i}]", item, "two finite numbers >= 0")
            if i and not (item[0] > value[i - 1][0] and item[1] >= value[i - 1][1]):
                raise self._bad(f"{key}[{i}]", item, f"above the pair before, {value[i - 1]}")
        return tuple((item[0], item[1]) for item in value)
