"""Several replicas in one simulation: a router in front, failures and recoveries, scale-out and scale-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import simpy

from backend.base import Backend
from sim.autoscaling import Steady, wanted
from sim.compiled import CompiledReplica, CompiledState
from sim.compiled_inputs import Shared, supports
from sim.config import EngineConfig
from sim.engine import limit, refuse_impossible
from sim.errors import ScenarioError
from sim.fleet_config import FleetConfig
from sim.fleet_member import DOWN, DRAINING, GONE, NOWHERE, STARTING, UP, Member, Ticket
from sim.placement import PLACEMENTS, Homes, weights_of
from sim.replica import Process, Replica
from sim.router import ROUTERS
from sim.state import RequestState
from workloads.adapters import Catalogue
from workloads.requests import RequestTable


class Fleet:
    """A fleet that serves `requests`; `run()` plays it, `sim.fleet_tables` makes tables of what is left.

    `open_backend` gives each engine a backend of its own. Every request is always in one place: not arrived, held at the
    router (`held`), in one member, or finished (I1). `step_rows`, `fast_forward`: as `sim.engine.simulate`.
    Raises `ScenarioError` for what no engine could serve and for events that cannot be.
    """

    def __init__(
        self,
        requests: RequestTable,
        catalogue: Catalogue,
        config: EngineConfig,
        open_backend: Callable[[], Backend],
        fleet: FleetConfig,
        *,
        pinned: Sequence[int] = (),
        check: bool = False,
        seed: int = 0,
        step_rows: bool = True,
        fast_forward: bool = True,
    ) -> None:
        self.env = simpy.Environment()
        self.requests = requests
        self.catalogue = catalogue
        self.config = config
        self.fleet = fleet
        self.tickets: list[Ticket] = []
        self.held: list[Ticket] = []
        self.members: list[Member] = []
        self.end_s = 0.0
        self._open_backend = open_backend
        self._pinned = pinned
        self._check = check
        self._router = ROUTERS[fleet.router](fleet.load_bound, seed)
        self._weights = weights_of(requests, catalogue)
        self._homes: Homes = {}
        self._step_rows = step_rows
        backend = open_backend()
        refuse_impossible(requests, catalogue, config, backend, pinned)
        compiled = fast_forward and not check and supports(config, backend)
        self.shared = Shared(requests, catalogue, config, backend) if compiled else None
        self._over = self.env.event()
        for _ in range(fleet.replicas):
            self._ready(self._new())
        self._place()
        self.env.process(self._arrivals())
        for i, event in enumerate(sorted(fleet.events, key=lambda e: e.at_s)):
            self.env.process(self._event(i, event.at_s, event.kind, event.replica))
        if fleet.autoscaling is not None:
            self.env.process(self._autoscale())

    def run(
        self, horizon_s: float | None = None, watch: Callable[[Fleet], bool] | None = None, every: int = 64
    ) -> float:
        """Play to the end or to `horizon_s`; the clock at the end. `watch`, asked every so many events, may stop it."""
        stop = float("inf") if horizon_s is None else horizon_s
        if self.shared is not None:
            self.shared.stop_s = stop
        # Events and autoscaling go on when all is served; nothing is left to learn then.
        may_outlive = bool(self.fleet.events) or self.fleet.autoscaling is not None
        played = 0
        while (upcoming := self.env.peek()) <= stop and upcoming != float("inf"):
            self.env.step()
            played += 1
            if (watch is not None and played % every == 0 and watch(self)) or (may_outlive and self.settled):
                break
        self.end_s = self._now_s() if horizon_s is None or self.settled else horizon_s
        for member in self.members:
            member.engine.finish(self.end_s)
        for member in self.members:
            if member.status not in (DOWN, GONE):
                self._stop_paying(member, self.end_s)
        return self.end_s

    def _now_s(self) -> float:
        """When the last step landed, by the clock of its engine: SimPy's may differ from it in the last bit."""
        clocks = [engine.now_s for member in self.members for engine in member.lives]
        return max(clocks) if self.tickets else float(self.env.now)

    @property
    def settled(self) -> bool:
        """Whether every request has arrived and finished."""
        return (
            len(self.tickets) == len(self.requests)
            and not self.held
            and not any(member.outstanding for member in self.members)
        )

    def up(self) -> list[Member]:
        """The members that take requests."""
        return [member for member in self.members if member.status == UP]

    def _arrivals(self) -> Process:
        for state in self._asked():
            if state.arrival_s > self.env.now:
                yield self.env.timeout(state.arrival_s - self.env.now)
            ticket = Ticket(state)
            self.tickets.append(ticket)
            self._dispatch(ticket)
        self._over.succeed()

    def _asked(self) -> Iterator[RequestState | CompiledState]:
        if self.shared is None:
            return (RequestState(request, limit(request, self.config)) for request in self.requests)
        columns = (self.requests.arrival_s.tolist(), self.requests.adapter.tolist())
        return (CompiledState(row, at_s, adapter) for row, (at_s, adapter) in enumerate(zip(*columns, strict=True)))

    def _dispatch(self, ticket: Ticket) -> None:
        """Send a request to a replica that may serve it; if all of those are away to any; if there is none, hold it."""
        candidates = self.up()
        if not candidates:
            ticket.replica = NOWHERE
            self.held.append(ticket)
            return
        homes = self._homes.get(ticket.state.adapter)
        at_home = candidates if homes is None else [member for member in candidates if member.index in homes]
        chosen = self._router.choose(ticket.state.adapter, at_home or candidates)
        ticket.replica = chosen.index
        member = self.members[chosen.index]
        member.sent += 1
        engine: Any = member.engine  # engines and states are of one kind throughout a fleet
        engine.add(ticket.state)

    def _place(self) -> None:
        """Give every adapter its homes among the replicas that are meant to stay."""
        there = [member.index for member in self.members if member.status not in (DRAINING, GONE)]
        place = PLACEMENTS[self.fleet.placement]
        homes = place(self._weights, max(1, len(there)), self.fleet.copies, self.fleet.hot_share)
        self._homes = {a: tuple(there[i] for i in chosen) for a, chosen in homes.items()} if there else {}

    def _new(self) -> Member:
        member = Member(len(self.members), self.config.max_loras, paid_from_s=self.env.now)
        self.members.append(member)
        self._boot(member)
        return member

    def _boot(self, member: Member) -> None:
        rows = self._step_rows
        if self.shared is not None:
            member.lives.append(
                CompiledReplica(self.env, self.shared, pinned=self._pinned, keep_rows=rows, over=self._over)
            )
            return
        backend = self._open_backend()
        member.lives.append(
            Replica(
                self.env, self.catalogue, self.config, backend, pinned=self._pinned, check=self._check, keep_rows=rows
            )
        )

    def _ready(self, member: Member) -> None:
        member.status = UP
        member.process = self.env.process(_until_killed(member.engine))
        held, self.held = self.held, []
        for ticket in held:
            self._dispatch(ticket)

    def _start(self, member: Member) -> Process:
        engine = member.engine
        yield self.env.timeout(self.fleet.startup_s)
        if member.status == STARTING and member.engine is engine:
            self._ready(member)

    def _event(self, number: int, at_s: float, kind: str, replica: int | None) -> Process:
        yield self.env.timeout(at_s)
        if replica is None:
            self._add()
            return
        member = self.members[replica] if replica < len(self.members) else None
        possible = {"fail": (UP, STARTING, DRAINING), "recover": (DOWN,), "remove": (UP, STARTING)}[kind]
        if member is None or member.status not in possible:
            status = "not there" if member is None else member.status
            raise ScenarioError(f"fleet.events[{number}]: replica {replica} is {status} at {at_s:g} s, cannot {kind}")
        {"fail": self._fail, "recover": self._recover, "remove": self._remove}[kind](member)

    def _add(self) -> None:
        self.env.process(self._start(self._new()))
        self._place()

    def _fail(self, member: Member) -> None:
        """The engine is gone, and with it its KV cache and adapters; its requests start over by way of the router."""
        member.status = DOWN
        member.failures += 1
        self._stop_paying(member, self.env.now)
        if member.process is not None and member.process.is_alive:
            member.process.interrupt()
        orphans = member.engine.unfinished()
        member.engine.kill()
        self._boot(member)  # an empty engine stands in until it recovers
        for state in orphans:
            ticket = self.tickets[state.row]
            ticket.requeues += 1
            ticket.lost_tokens += state.emitted
            ticket.state = state.again()
            self._dispatch(ticket)

    def _recover(self, member: Member) -> None:
        member.status = STARTING
        member.paid_from_s = self.env.now
        self.env.process(self._start(member))

    def _remove(self, member: Member) -> None:
        """It gets nothing new, finishes what it has, and is gone."""
        member.status = DRAINING
        self._place()
        self.env.process(self._drain(member))

    def _drain(self, member: Member) -> Process:
        while member.status == DRAINING and member.outstanding:
            yield self.env.timeout(1.0)
        if member.status == DRAINING:
            member.status = GONE
            self._stop_paying(member, self.env.now)

    def _stop_paying(self, member: Member, now_s: float) -> None:
        member.paid_s += max(0.0, now_s - member.paid_from_s)
        member.paid_from_s = now_s

    def _autoscale(self) -> Process:
        scaling = self.fleet.autoscaling
        assert scaling is not None
        steady = Steady(scaling.stabilization_s, self.fleet.replicas)
        while True:
            yield self.env.timeout(scaling.period_s)
            views = self.up()
            there = [member for member in self.members if member.status in (UP, STARTING)]
            if not views:
                continue
            count = wanted(views, scaling.signal, scaling.target, scaling.tolerance)
            if count == len(views):  # close to the target: those on their way stay, too
                count = len(there)
            count = steady(self.env.now, min(max(count, scaling.min_replicas), scaling.max_replicas))
            for _ in range(count - len(there)):
                self._add()
            if count < len(there):
                for member in sorted(there, key=lambda m: (m.status == UP, m.outstanding, -m.index))[
                    : len(there) - count
                ]:
                    self._remove(member)


def _until_killed(engine: Replica | CompiledReplica) -> Process:
    """The engine's loop, ended by an interrupt."""
    try:
        yield from engine.run()
    except simpy.Interrupt:
        return
