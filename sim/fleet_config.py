"""How many replicas there are, who decides between them, and what befalls them: `[fleet]` of a scenario."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TypeVar

from sim.autoscaling import SIGNALS
from sim.errors import ScenarioError
from sim.placement import PLACEMENTS
from sim.router import ROUTERS

T = TypeVar("T")

MOST_REPLICAS = 10_000
"""More are a slip of the pen; each is an engine of its own here."""

EVENTS = ("fail", "recover", "add", "remove")


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """What happens at `at_s`: `fail` (its requests go back to the router), `recover`, `add` one, `remove` (it is drained).

    `replica`: of which; `add` takes none. A replica that recovers or is added is ready after `startup_s`.
    """

    at_s: float
    kind: str
    replica: int | None = None


@dataclass(frozen=True, slots=True)
class Autoscaling:
    """The usual rule: as many replicas as bring the mean `signal` to `target`, looked at every `period_s`.

    Fewer only once the rule has asked for fewer during `stabilization_s`; within `tolerance` of the target nothing changes.
    """

    max_replicas: int
    target: float
    min_replicas: int = 1
    signal: str = "outstanding"
    period_s: float = 15.0
    stabilization_s: float = 300.0
    tolerance: float = 0.1


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """`[fleet]`: one replica that nothing befalls, unless said otherwise.

    `copies`, `hot_share`: of placement `hot_copies`; `load_bound`: of the routers that bound loads; `startup_s`: from asking
    for a replica to its first request. Raises `ScenarioError` naming the key whose value cannot be.
    """

    replicas: int = 1
    router: str = "least_outstanding"
    placement: str = "everywhere"
    copies: int = 2
    hot_share: float = 0.5
    load_bound: float = 1.25
    startup_s: float = 60.0
    events: tuple[FleetEvent, ...] = field(default=())
    autoscaling: Autoscaling | None = None

    @property
    def single(self) -> bool:
        """Whether it is one replica for ever: no router, no events."""
        return self.replicas == 1 and not self.events and self.autoscaling is None

    def __post_init__(self) -> None:
        _least("fleet.replicas", self.replicas, 1)
        if self.replicas > MOST_REPLICAS:
            raise ScenarioError(f"fleet.replicas is {self.replicas}, must be at most {MOST_REPLICAS}")
        _least("fleet.copies", self.copies, 1)
        _least("fleet.load_bound", self.load_bound, 1)
        _least("fleet.startup_s", self.startup_s, 0)
        if not 0 < self.hot_share <= 1:
            raise ScenarioError(f"fleet.hot_share is {self.hot_share}, must be in (0, 1]")
        _one_of("fleet.router", self.router, ROUTERS)
        _one_of("fleet.placement", self.placement, PLACEMENTS)
        added = self.replicas + sum(event.kind == "add" for event in self.events)
        for i, event in enumerate(self.events):
            where = f"fleet.events[{i}]"
            _one_of(f"{where}.kind", event.kind, EVENTS)
            _least(f"{where}.at_s", event.at_s, 0)
            if (event.kind == "add") != (event.replica is None):
                raise ScenarioError(f"{where}.replica: fail, recover and remove need one, add takes none")
            if event.replica is not None and not 0 <= event.replica < added:
                raise ScenarioError(f"{where}.replica is {event.replica}, must be 0 to {added - 1}")
        if (scaling := self.autoscaling) is not None:
            _one_of("fleet.autoscaling.signal", scaling.signal, SIGNALS)
            _least("fleet.autoscaling.min_replicas", scaling.min_replicas, 1)
            _least("fleet.autoscaling.stabilization_s", scaling.stabilization_s, 0)
            _least("fleet.autoscaling.tolerance", scaling.tolerance, 0)
            for key in ("target", "period_s"):
                if not getattr(scaling, key) > 0:
                    raise ScenarioError(f"fleet.autoscaling.{key} is {getattr(scaling, key)}, must be > 0")
            if not scaling.min_replicas <= self.replicas <= scaling.max_replicas:
                raise ScenarioError(
                    f"fleet.replicas is {self.replicas}, must be fleet.autoscaling.min_replicas ({scaling.min_replicas}) to"
                    f" max_replicas ({scaling.max_replicas})"
                )

    def to_table(self) -> dict[str, object]:
        """As a scenario's table; empty for the default."""
        if self == FleetConfig():
            return {}
        table = {k: v for k, v in asdict(self).items() if v is not None and k != "events"}
        events = [{k: v for k, v in asdict(event).items() if v is not None} for event in self.events]
        return {**table, "events": events} if events else table


def _least(key: str, value: float, least: float) -> None:
    if not (value >= least and math.isfinite(value)):
        raise ScenarioError(f"{key} is {value}, must be finite and >= {least}")


def _one_of(key: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ScenarioError(f"{key} is {value!r}, must be one of {', '.join(known)}")


def fleet_of(table: Mapping[str, object]) -> FleetConfig:
    """Read `[fleet]`. Raises `ScenarioError` naming the key."""
    plain = {k: v for k, v in table.items() if k not in ("events", "autoscaling")}
    events = table.get("events", [])
    if not isinstance(events, list):
        raise ScenarioError(f"fleet.events is {events!r}, must be a list of tables: [[fleet.events]]")
    made = tuple(_record(FleetEvent, event, f"fleet.events[{i}]") for i, event in enumerate(events))
    scaling = table.get("autoscaling")
    autoscaling = None if scaling is None else _record(Autoscaling, scaling, "fleet.autoscaling")
    return _record(FleetConfig, plain, "fleet", events=made, autoscaling=autoscaling)


def _record(kind: Callable[..., T], table: object, where: str, **given: object) -> T:
    """A dataclass from a table whose values have the types of its fields."""
    if not isinstance(table, dict):
        raise ScenarioError(f"{where} is {table!r}, must be a table")
    known = {f.name: f for f in fields(kind) if f.name not in given}  # type: ignore[arg-type]
    for key, value in table.items():
        if key not in known:
            raise ScenarioError(f"{where}.{key}: unknown key; known: {', '.join([*known, *given])}")
        wanted = str(known[key].type).removesuffix(" | None")
        kinds = {"str": str, "int": int, "float": int | float}[wanted]
        if isinstance(value, bool) or not isinstance(value, kinds):
            name = {"str": "text", "int": "whole number", "float": "number"}[wanted]
            raise ScenarioError(f"{where}.{key} is {value!r}, must be a {name}")
    missing = [n for n, f in known.items() if n not in table and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ScenarioError(f"{where}.{missing[0]} is missing")
    return kind(**table, **given)
