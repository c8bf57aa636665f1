"""Adapters as PEFT saves them: a folder with `adapter_config.json` and `adapter_model.safetensors`, taken as it is.

Only shapes are read here, without torch: a replay needs no more. `backend/packing.py` reads the weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from backend.errors import BackendError

if TYPE_CHECKING:
    from backend.geometry import ModelGeometry

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<path>(?:.+\.)?layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<module>\w+))"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)

_REFUSED = (
    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices", "alora_invocation_tokens",
    "target_parameters",
)  # fmt: skip
"""Keys that say an adapter is more than A and B of linears, which is all that slots hold."""


class Stored(NamedTuple):
    """A tensor inside a safetensors file; its bytes begin at `start` of the file."""

    name: str
    dtype: str
    shape: list[int]
    start: int


@dataclass(frozen=True, slots=True)
class Part:
    """One adapted linear: its A [rank, in] and B [out, rank]; B is multiplied by `factor` as it is read."""

    layer: int
    module: str
    a: Stored
    b: Stored
    rank: int
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter folder in numbers.

    `rank`: the largest of its linears', rounded up to a multiple of 8, which is what slots hold; `target_modules`: those of
    the seven linears that some layer adapts; `scaling`: `lora_alpha / r` (`/ sqrt(r)` with `use_rslora`). Where a pattern
    gives linears other scalings, `scaling` is the first one's and `Part.factor` makes the difference.
    """

    folder: Path
    rank: int
    target_modules: tuple[str, ...]
    scaling: float
    parts: tuple[Part, ...]


def read_adapter(folder: Path, geometry: ModelGeometry) -> PeftAdapter:
    """Read an adapter's config and the shapes of its tensors. Raises `BackendError` with file and key or tensor."""
    config = _Config.read(folder / CONFIG)
    pairs = _pairs(_tensors(folder / WEIGHTS), folder / WEIGHTS, geometry)
    config.check_targets([path for path, *_ in pairs], folder / WEIGHTS)
    found, linears = [], geometry.linears()
    for path, layer, module, a, b in pairs:
        rank = config.rank(path)
        inside, outside = linears[module]
        for tensor, right in ((a, [rank, inside]), (b, [outside, rank])):
            if tensor.shape != right:
                raise BackendError(
                    f"{folder / WEIGHTS}: {tensor.name} has shape {tensor.shape}, must be {right}: rank {rank} by {CONFIG},"
                    f" {module} of {geometry.name} is {inside} -> {outside}"
                )
        found.append((layer, module, a, b, rank, config.scaling(path)))
    scaling = found[0][-1]
    parts = tuple(Part(layer, module, a, b, r, own / scaling) for layer, module, a, b, r, own in found)
    used = {part.module for part in parts}
    rank = -(-max(part.rank for part in parts) // 8) * 8
    return PeftAdapter(folder, rank, tuple(m for m in linears if m in used), scaling, parts)


def adapter_folders(folder: Path) -> list[Path]:
    """The subfolders of `folder` that hold an adapter, by name. Raises `BackendError` if there is none."""
    found = sorted(f.parent for f in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
    if not found:
        raise BackendError(f"adapters.folder {folder}: must be a folder whose subfolders hold adapters ({CONFIG})")
    return found


@dataclass(frozen=True, slots=True)
class _Config:
    """A checked `adapter_config.json`; patterns match the end of a linear's path, as in PEFT (`get_pattern_key`)."""

    path: Path
    data: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> _Config:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise BackendError(f"{path}:{error.lineno}: not JSON ({error.msg}); PEFT's {CONFIG} is wanted") from error
        except (OSError, UnicodeDecodeError) as error:
            raise BackendError(f"{path}: not readable as UTF-8 text ({error}); PEFT's {CONFIG} is wanted") from error
        if not isinstance(data, dict) or data.get("peft_type") != "LORA":
            kind = data.get("peft_type") if isinstance(data, dict) else None
            raise BackendError(f'{path}: peft_type is {kind!r}, must be "LORA"')
        config = cls(path, data)
        config._check()
        return config

    def _check(self) -> None:
        for key in _REFUSED:
            if self.data.get(key):
                raise BackendError(f"{self.path}: {key} is {self.data[key]!r}, must be off: slots hold A and B only")
        if self.data.get("bias", "none") != "none":
            raise BackendError(f'{self.path}: bias is {self.data["bias"]!r}, must be "none": slots hold A and B only')
        self._number("r", self.data.get("r"), whole=True)
        self._number("lora_alpha", self.data.get("lora_alpha"))
        for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
            pattern = self.data.get(key) or {}
            if not isinstance(pattern, dict):
                raise BackendError(f"{self.path}: {key} is {pattern!r}, must be an object of numbers")
            for name, value in pattern.items():
                self._number(f"{key}.{name}", value, whole=whole)
                try:
                    re.compile(name)
                except re.error as error:
                    raise BackendError(f"{self.path}: {key}.{name} is no regular expression ({error})") from error
        if not isinstance(self.data.get("use_rslora", False), bool):
            raise BackendError(f"{self.path}: use_rslora is {self.data['use_rslora']!r}, must be true or false")

    def _number(self, key: str, value: object, *, whole: bool = False) -> None:
        kinds = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise BackendError(f"{self.path}: {key} is {value!r}, must be a {'whole ' if whole else ''}number > 0")

    def _own(self, path: str, pattern: str, key: str) -> float:
        """What the first pattern that matches `path` says, else the adapter's `key`."""
        for name, value in (self.data.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({name})$", path):
                return float(value)
        return float(self.data[key])

    def rank(self, path: str) -> int:
        return int(self._own(path, "rank_pattern", "r"))

    def scaling(self, path: str) -> float:
        rank = self.rank(path)
        return self._own(path, "alpha_pattern", "lora_alpha") / (
            math.sqrt(rank) if self.data.get("use_rslora") else rank
        )

    def check_targets(self, paths: list[str], weights: Path) -> None:
        """Every listed target must have tensors (a text is a regular expression of PEFT's, which needs the whole model)."""
        targets = self.data.get("target_modules")
        for target in targets if isinstance(targets, list) else ():
            if not any(path == target or path.endswith(f".{target}") for path in paths):
                raise BackendError(
                    f"{self.path}: target_modules names {target!r}, of which {weights.name} has no A and B"
                )


def _tensors(path: Path) -> dict[str, Stored]:
    """A safetensors file's tensors, from its header."""
    if not path.is_file():
        old = path.with_suffix(".bin")
        more = f"; {old.name} is there: save it again with safe_serialization=True" if old.is_file() else ""
        raise BackendError(f"{path}: is missing, PEFT writes it beside {CONFIG}{more}")
    try:
        with safe_open(path, framework="np") as file:  # checks the file; where its tensors lie it does not tell
            names = list(file.keys())
        with path.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
    except (SafetensorError, OSError) as error:
        raise BackendError(f"{path}: not a safetensors file ({error})") from error
    tensors = {}
    for name in names:
        about = header[name]
        if about["dtype"] not in ("F32", "F16", "BF16"):
            raise BackendError(f"{path}: {name} has dtype {about['dtype']}, must be one of F32, F16, BF16")
        tensors[name] = Stored(name, about["dtype"], about["shape"], 8 + size + about["data_offsets"][0])
    return tensors


def _pairs(
    tensors: Mapping[str, Stored], path: Path, geometry: ModelGeometry
) -> list[tuple[str, int, str, Stored, Stored]]:
    """(path, layer, module, A, B) of every adapted linear, in order of layers and modules."""
    sides: dict[tuple[int, str], dict[str, str]] = {}
    paths: dict[tuple[int, str], str] = {}
    known = list(geometry.linears())
    for name in tensors:
        found = _TENSOR.fullmatch(name)
        if found is None or found["module"] not in known:
            raise BackendError(
                f"{path}: {name} is no lora_A or lora_B of a layer's {', '.join(known)}, which is all that slots hold"
            )
        layer = int(found["layer"])
        if layer >= geometry.num_layers:
            raise BackendError(
                f"{path}: {name} is of layer {layer}, {geometry.name} has layers 0 to {geometry.num_layers - 1}"
            )
        key = layer, found["module"]
        if found["side"] in sides.setdefault(key, {}):
            raise BackendError(f"{path}: {name} comes twice, as {sides[key][found['side']]} too")
        sides[key][found["side"]] = name
        paths[key] = found["path"]
    if not sides:
        raise BackendError(f"{path}: holds no tensors, must have lora_A and lora_B of some linear")
    for (layer, module), pair in sides.items():
        if len(pair) < 2:
            raise BackendError(
                f"{path}: {module} of layer {layer} has only {next(iter(pair.values()))}, must have A and B"
            )
    order = sorted(sides, key=lambda key: (key[0], known.index(key[1])))
    return [(paths[key], *key, tensors[sides[key]["A"]], tensors[sides[key]["B"]]) for key in order]
