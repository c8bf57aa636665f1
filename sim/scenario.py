"""A scenario: one TOML file that says model, engine, adapters, workload and backend."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path

from backend.geometry import SHIPPED
from backend.profile import shipped_profiles
from sim.config import EngineConfig
from sim.errors import ScenarioError
from sim.fleet_config import FleetConfig, fleet_of

LARGEST, MOST_ADAPTERS = 2**53, 1_000_000  # whole numbers of the compiled replay; more adapters do not fit into memory

KEYS: Mapping[str, tuple[str, ...]] = {
    "model": ("geometry",),
    "engine": tuple(f.name for f in fields(EngineConfig)),
    "adapters": ("count", "rank", "ranks", "target_modules", "folder", "pinned"),
    "workload": (),
    "backend": ("kind", "profile", "gpu_memory_gib", "deterministic", "verify"),
    "slo": ("p99_ttft_ms", "p99_tpot_ms"),
    "fleet": tuple(f.name for f in fields(FleetConfig)),
    "cost": ("gpu_hour_usd", "model_load_gb_s"),
    "run": ("seed", "horizon_s", "check", "step_rows", "fast_forward"),
}
"""Tables and their keys; `[workload]` is checked where it is built."""

_TYPES = {f.name: str(f.type) for f in fields(EngineConfig)}


@dataclass(frozen=True, slots=True)
class Cost:
    """What the user pays: `gpu_hour_usd` by profile, under "" for any; `model_load_gb_s` where a profile lacks it."""

    gpu_hour_usd: Mapping[str, float]
    model_load_gb_s: float | None = None

    def of(self, profile: str) -> float | None:
        """USD per hour of the profile's GPU; None if it was not given."""
        return self.gpu_hour_usd.get(profile, self.gpu_hour_usd.get(""))


@dataclass(frozen=True, slots=True)
class Scenario:
    """A checked scenario. `workload` stays a table; its `path` is relative to `base_dir`."""

    name: str
    geometry: str
    engine: EngineConfig
    adapter_count: int | None
    ranks: tuple[int, ...]
    target_modules: tuple[str, ...] | None
    adapter_folder: str | None
    pinned: tuple[str, ...]
    workload: Mapping[str, object]
    backend: str
    profile: str | None
    gpu_memory_gib: float | None
    deterministic: bool
    verify: int
    slo: Mapping[str, float]
    fleet: FleetConfig
    cost: Cost
    seed: int
    horizon_s: float | None
    check: bool
    step_rows: bool
    fast_forward: bool
    base_dir: Path

    def resolved(self) -> dict[str, object]:
        """The scenario with its defaults filled in, as it is written back: it runs from any directory."""
        engine = {f.name: getattr(self.engine, f.name) for f in fields(EngineConfig)}
        engine["max_cpu_loras"] = self.engine.host_loras
        adapters = {
            "count": self.adapter_count,
            "ranks": list(self.ranks) if self.adapter_folder is None else None,
            "target_modules": self.target_modules,
            "folder": self.adapter_folder,
            "pinned": list(self.pinned),
        }
        backend = {
            "kind": self.backend,
            "profile": self.profile,
            "gpu_memory_gib": self.gpu_memory_gib,
            "deterministic": self.deterministic or None,
            "verify": self.verify or None,
        }
        workload = dict(self.workload)
        if isinstance(path := workload.get("path"), str):
            workload["path"] = str((self.base_dir / path).resolve())
        tables = {
            "model": {"geometry": self.geometry},
            "engine": engine,
            "adapters": adapters,
            "workload": workload,
            "backend": backend,
            "slo": dict(self.slo),
            "fleet": self.fleet.to_table(),
            "cost": self._cost_table(),
            "run": {
                "seed": self.seed,
                "horizon_s": self.horizon_s,
                "check": self.check,
                "step_rows": self.step_rows,
                "fast_forward": self.fast_forward,
            },
        }
        kept = {name: {k: v for k, v in table.items() if v is not None} for name, table in tables.items()}
        return {name: table for name, table in kept.items() if table}

    def _cost_table(self) -> dict[str, object]:
        prices = self.cost.gpu_hour_usd
        price = prices[""] if list(prices) == [""] else dict(prices) or None
        return {"gpu_hour_usd": price, "model_load_gb_s": self.cost.model_load_gb_s}


def find(name_or_path: str) -> Path:
    """A scenario file, or a shipped scenario by name."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = Path(str(files("sim") / "scenarios"))
    if (shipped / f"{name_or_path}.toml").is_file():
        return shipped / f"{name_or_path}.toml"
    known = ", ".join(sorted(f.stem for f in shipped.glob("*.toml")))
    raise ScenarioError(f"{name_or_path}: no such file, and no shipped scenario ({known})")


def load_scenario(name_or_path: str) -> Scenario:
    """Read and check a scenario. Raises `ScenarioError` with the key, or file and line."""
    path = find(name_or_path)
    return from_tables(read_tables(path), path.stem, path.parent)


def read_tables(path: Path) -> dict[str, object]:
    """The tables of a scenario file, unchecked. Raises `ScenarioError` with file and line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{path}{_line(str(error))}: not TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def from_tables(data: Mapping[str, object], name: str, base_dir: Path) -> Scenario:
    """Check the tables of a scenario."""
    for table, content in data.items():
        if table not in KEYS:
            raise ScenarioError(f"[{table}]: unknown table; known: {', '.join(KEYS)}")
        if not isinstance(content, dict):
            raise ScenarioError(f"{table} is {content!r}, must be a table: [{table}]")
        for key in content:
            if table != "workload" and key not in KEYS[table]:
                raise ScenarioError(f"{table}.{key}: unknown key; known: {', '.join(KEYS[table])}")
    get = _Reader(data)
    if "workload" not in data:
        raise ScenarioError("[workload] is missing, it says who asks for what")
    engine = {k: get.typed("engine", k, _TYPES[k]) for k in get.table("engine")}
    modules = get.texts("adapters", "target_modules")
    count = get.number("adapters", "count", whole=True, above=0)
    if count is not None and count > MOST_ADAPTERS:
        raise ScenarioError(f"adapters.count is {count}, must be at most {MOST_ADAPTERS}")
    geometry, profile = get.text("model", "geometry"), get.text("backend", "profile")
    return Scenario(
        name=name,
        geometry=_locate(geometry or _missing("model.geometry"), SHIPPED, base_dir),
        engine=EngineConfig(**engine),  # type: ignore[arg-type]
        adapter_count=None if count is None else int(count),
        ranks=_ranks(get.table("adapters")),
        target_modules=modules,
        adapter_folder=_folder(get, base_dir),
        pinned=get.texts("adapters", "pinned") or (),
        workload=get.table("workload"),
        backend=get.text("backend", "kind") or "profile",
        profile=None if profile is None else _locate(profile, shipped_profiles(), base_dir),
        gpu_memory_gib=get.number("backend", "gpu_memory_gib", above=0),
        deterministic=get.flag("backend", "deterministic") or False,
        verify=int(get.number("backend", "verify", whole=True, above=-1) or 0),
        slo={key: float(get.number("slo", key, above=0) or 0) for key in get.table("slo")},
        fleet=fleet_of(get.table("fleet")),
        cost=Cost(_prices(get), get.number("cost", "model_load_gb_s", above=0)),
        seed=int(get.number("run", "seed", whole=True, above=-1) or 0),
        horizon_s=get.number("run", "horizon_s", above=0),
        check=get.flag("run", "check") or False,
        step_rows=get.flag("run", "step_rows") is not False,
        fast_forward=get.flag("run", "fast_forward") is not False,
        base_dir=base_dir,
    )


def _line(message: str) -> str:
    """`:LINE` of a TOML error, from its message: the exception has no line number before Python 3.14."""
    found = re.search(r"at line (\d+)", message)
    return f":{found[1]}" if found else ""


def _locate(name: str, shipped: Collection[str], base_dir: Path) -> str:
    """A shipped name as it is; a path beside the scenario file made absolute; anything else for its reader to judge."""
    beside = base_dir / name
    return str(beside.resolve()) if name not in shipped and beside.exists() else name


def _missing(key: str) -> str:
    raise ScenarioError(f"{key} is missing")


def _folder(get: _Reader, base_dir: Path) -> str | None:
    """`adapters.folder`, made absolute; its adapters say themselves what the other keys would."""
    folder = get.text("adapters", "folder")
    if folder is None:
        return None
    for key in ("count", "rank", "ranks", "target_modules"):
        if key in get.table("adapters"):
            raise ScenarioError(
                f"adapters.{key} and adapters.folder: give one of them, the folder's adapters have their own"
            )
    return str((base_dir / folder).resolve())


def _prices(get: _Reader) -> dict[str, float]:
    """`cost.gpu_hour_usd`: one price, or a table of prices by profile."""
    table = get.table("cost").get("gpu_hour_usd")
    if not isinstance(table, dict):
        price = get.number("cost", "gpu_hour_usd", above=0)
        return {} if price is None else {"": float(price)}
    nested = _Reader({"cost.gpu_hour_usd": table})
    return {profile: float(nested.number("cost.gpu_hour_usd", profile, above=0) or 0) for profile in table}


def _ranks(table: Mapping[str, object]) -> tuple[int, ...]:
    if "rank" in table and "ranks" in table:
        raise ScenarioError("adapters.rank and adapters.ranks: give one of them")
    ranks = table.get("ranks", [table.get("rank", 16)])
    if (
        not isinstance(ranks, list)
        or not ranks
        or not all(isinstance(r, int) and not isinstance(r, bool) for r in ranks)
    ):
        raise ScenarioError(f"adapters.ranks is {ranks!r}, must be a list of whole numbers")
    return tuple(ranks)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed reads from the tables; every error names the key."""

    data: Mapping[str, object]

    def table(self, name: str) -> Mapping[str, object]:
        value = self.data.get(name, {})
        return value if isinstance(value, dict) else {}

    def number(self, table: str, key: str, *, whole: bool = False, above: float | None = None) -> float | int | None:
        value = self.table(table).get(key)
        if value is None:
            return None
        kinds = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ScenarioError(f"{table}.{key} is {value!r}, must be a {'whole ' if whole else ''}number")
        if abs(value) >= LARGEST and isinstance(value, int):
            raise ScenarioError(f"{table}.{key} is {value!r}, must be below 2**53")
        infinite = isinstance(value, float) and not math.isfinite(value)
        if infinite or (above is not None and value <= above):
            raise ScenarioError(
                f"{table}.{key} is {value!r}, must be finite{'' if above is None else f' and > {above}'}"
            )
        return value

    def typed(self, table: str, key: str, kind: str) -> object:
        """A value of the type that a field's annotation names."""
        if kind == "bool":
            return self.flag(table, key)
        return self.text(table, key) if kind == "str" else self.number(table, key, whole=kind.startswith("int"))

    def flag(self, table: str, key: str) -> bool | None:
        value = self.table(table).get(key)
        if value is not None and not isinstance(value, bool):
            raise ScenarioError(f"{table}.{key} is {value!r}, must be true or false")
        return value

    def texts(self, table: str, key: str) -> tuple[str, ...] | None:
        value = self.table(table).get(key)
        if value is None:
            return None
        if not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            raise ScenarioError(f"{table}.{key} is {value!r}, must be a list of texts")
        return tuple(value)

    def text(self, table: str, key: str) -> str | None:
        value = self.table(table).get(key)
        if value is not None and not isinstance(value, str):
            raise ScenarioError(f"{table}.{key} is {value!r}, must be a text")
        return value
