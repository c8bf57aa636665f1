"""Engines whose inner loop is compiled (`sim/native`): the same decisions and the same bits, sooner.

Between two events of the simulation an engine of the replay is arithmetic. It keeps a clock of its own and catches up with
SimPy's whenever somebody looks at it or sends it a request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import simpy

from sim.compiled_inputs import Shared, _native
from sim.errors import AdapterError, IntegrityError
from sim.integrity import livelock
from sim.tables import AdapterUse, MoveRow, StepRow, StepTotals, row_frame

if TYPE_CHECKING:
    from collections.abc import Generator

KINDS = ("stage", "keep", "drop", "load", "evict")
ROWS_AT_ONCE = 1 << 16
"""Step rows that an engine collects before somebody must take them."""

Rows = Callable[[pd.DataFrame, pd.DataFrame], None]
"""Takes step rows and moves as they come."""


@dataclass(slots=True)
class CompiledState:
    """One attempt to serve a request, as `sim.state.RequestState` but kept by the engine that it was sent to (None: by none yet).

    `place`: where in that engine; `earlier`: preemptions and skips of attempts that a failed replica lost.
    """

    row: int
    arrival_s: float
    adapter: int
    engine: CompiledReplica | None = None
    place: int = -1
    earlier: tuple[int, int] = (0, 0)

    def again(self) -> CompiledState:
        """A new attempt from the beginning, after a failure; its preemptions and skips count on."""
        return CompiledState(self.row, self.arrival_s, self.adapter, earlier=(self.preemptions, self.skips))

    def progress(self) -> tuple[float, float, int]:
        """First token and finish (nan: not yet), and tokens so far."""
        return self._facts()[:3]

    def _facts(self) -> tuple[float, float, int, int, int]:
        return (np.nan, np.nan, 0, 0, 0) if self.engine is None else self.engine.facts(self.place)

    @property
    def finish_s(self) -> float | None:
        at_s = self._facts()[1]
        return None if math.isnan(at_s) else at_s

    @property
    def emitted(self) -> int:
        return self._facts()[2]

    @property
    def preemptions(self) -> int:
        return self.earlier[0] + self._facts()[3]

    @property
    def skips(self) -> int:
        return self.earlier[1] + self._facts()[4]


class CompiledReplica:
    """One engine, as `sim.replica.Replica`. `over`: the event after which no request comes from outside any more."""

    def __init__(
        self,
        env: simpy.Environment,
        shared: Shared,
        *,
        pinned: Sequence[int] = (),
        registered: Sequence[int] = (),
        keep_rows: bool = True,
        on_rows: Rows | None = None,
        over: simpy.Event | None = None,
    ) -> None:
        self.env = env
        self._core = _native.Engine(
            shared.config, shared.requests, shared.adapters, shared.costs, list(pinned), list(registered),
            ROWS_AT_ONCE if keep_rows else 0, env.now,
        )  # fmt: skip
        self._kept: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self._on_rows = on_rows
        self._over = env.event() if over is None else over
        self._shared = shared
        self._arrival = env.event()
        self._seen_s = -1.0
        self._dead = False
        self._states: list[CompiledState] = []

    def run(self) -> Generator[simpy.Event, Any, None]:
        """Sleeps as long as requests come, for they wake it where it matters; then from event to event, to the end."""
        yield self._over
        while True:
            if self._core.idle():
                self._arrival = self.env.event()
                yield self._arrival
            self._advance(self.env.now, last=True)
            # Nothing can happen to it before the next event of the simulation.
            self._advance(min(self.env.peek(), self._shared.stop_s), last=False)
            yield self.env.timeout(max(0.0, self._core.next_s() - self.env.now))
            yield self.env.timeout(0.0)  # what else happens at that instant comes first

    def add(self, state: CompiledState) -> None:
        """A request arrives."""
        self.add_row(state.row)
        state.engine, state.place = self, len(self._states)
        self._states.append(state)
        if self._over.triggered and not self._arrival.triggered:
            self._arrival.succeed()

    def add_row(self, row: int) -> None:
        """The request of that row arrives."""
        self.catch_up()
        self._core.add(row, self.env.now)

    def catch_up(self) -> None:
        """Play to SimPy's now, short of what is planned at this very instant."""
        if self._seen_s != self.env.now and not self._dead:
            self._seen_s = self.env.now
            self._advance(self._seen_s, last=False)

    def finish(self, until_s: float) -> None:
        """Play to the end, or until `until_s`."""
        if not self._dead:
            self._advance(until_s, last=True)

    def kill(self) -> None:
        """The engine stops here, for good."""
        self.catch_up()
        self._dead = True

    def _advance(self, until_s: float, *, last: bool) -> None:
        try:
            while self._core.advance(until_s, last):
                self._take_rows()
        except _ERRORS as error:
            raise _told(error) from error

    def _take_rows(self) -> None:
        taken = self._core.rows(), self._core.moves()
        self._core.forget_rows()
        if self._on_rows is None:
            self._kept.append(taken)
        else:
            self._on_rows(step_frame(taken[0]), move_frame(taken[1]))

    @property
    def now_s(self) -> float:
        """When the last thing happened in this engine."""
        return float(self._core.now_s)

    @property
    def finished(self) -> int:
        """Requests that have finished so far."""
        return int(self._core.finished)

    @property
    def waiting(self) -> int:
        self.catch_up()
        return int(self._core.waiting())

    @property
    def outstanding(self) -> int:
        if self._dead:
            return int(self._core.waiting()) + int(self._core.running())
        self._seen_s = self.env.now
        try:
            while (count := self._core.look(self._seen_s)) < 0:
                self._take_rows()
        except _ERRORS as error:
            raise _told(error) from error
        return int(count)

    @property
    def looked_at(self) -> int:
        """How often a plan or the end of a step looked at a request by itself: what the inner loop's work goes with, beside steps."""
        return int(self._core.looked_at())

    @property
    def kv_usage(self) -> float:
        self.catch_up()
        used, free = self._core.used_blocks(), self._core.free_blocks()
        return float(used / max(1, used + free))

    @property
    def resident(self) -> Collection[int]:
        self.catch_up()
        return list(self._core.resident())

    @property
    def running_adapters(self) -> Collection[int]:
        self.catch_up()
        return set(self._core.running_adapters())

    @property
    def waiting_adapters(self) -> Collection[int]:
        self.catch_up()
        return set(self._core.waiting_adapters())

    def unfinished(self) -> list[CompiledState]:
        """All that wait or run, by their rows."""
        self.catch_up()
        return sorted((self._states[place] for place in self._core.unfinished()), key=lambda state: state.row)

    def facts(self, place: int) -> tuple[float, float, int, int, int]:
        """First token, finish (nan: not yet), tokens, preemptions and skips of the request at `place`."""
        self.catch_up()
        return self._core.state(place)  # type: ignore[no-any-return]

    def states(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """What became of its requests, a column a fact (`sim.tables.request_frame`), and each one's `row`."""
        return self._core.states()  # type: ignore[no-any-return]

    @property
    def totals(self) -> StepTotals:
        return StepTotals(*self._core.totals())

    @property
    def uses(self) -> dict[int, AdapterUse]:
        """What each adapter that was used or moved lived through."""
        table = self._core.uses()
        used = np.nonzero(np.any([table[f.name] for f in fields(AdapterUse)], axis=0))[0]
        return {int(a): AdapterUse(*(int(table[f.name][a]) for f in fields(AdapterUse))) for a in used}

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Step rows and moves, those that were not taken."""
        parts = [*self._kept, (self._core.rows(), self._core.moves())]
        steps, moves = (np.concatenate(column) for column in zip(*parts, strict=True))
        return step_frame(steps), move_frame(moves)


_ERRORS: tuple[type[Exception], ...] = (
    () if _native is None else (_native.NativeIntegrityError, _native.NativeLivelockError, _native.NativeAdapterError)
)


def _told(error: Exception) -> Exception:
    """An error of the compiled loop as one of `sim.errors`."""
    if isinstance(error, _native.NativeLivelockError):
        return livelock(int(str(error)))
    return IntegrityError(str(error)) if isinstance(error, _native.NativeIntegrityError) else AdapterError(str(error))


def step_frame(rows: np.ndarray[Any, Any]) -> pd.DataFrame:
    """The table of steps from the compiled loop's rows."""
    return row_frame({f.name: rows[f.name] for f in fields(StepRow)}, StepRow)


def move_frame(rows: np.ndarray[Any, Any]) -> pd.DataFrame:
    """The table of moves from the compiled loop's rows."""
    columns = {f.name: rows[f.name] for f in fields(MoveRow) if f.name != "kind"}
    return row_frame({**columns, "kind": np.array(KINDS, dtype=object)[rows["kind"]]}, MoveRow)
