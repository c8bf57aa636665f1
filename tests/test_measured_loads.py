"""Loads are measured as a run has them: each adapter read, then copied, far apart among the steps of all rounds."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from backend.base import AdapterShape, Backend, LoadTiming, StepBatch, StepTiming
from backend.load_turns import TURNS, LoadTurns
from backend.rounds import Rounds, measure_rounds

BATCHES = [StepBatch((2,) * n, (5,) * n, (-1,) * n, (True,) * n, ((0,),) * n) for n in range(1, 41)]
SHAPES = [AdapterShape(100 * rank + i, rank, ("q_proj",)) for rank in (8, 64) for i in range(2)]
ROUNDS = 3


class Recorded:
    """Notes what it is asked for; its n-th move or step takes n milliseconds."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def _next(self, kind: str, what: object) -> float:
        self.asked.append((kind, what))
        return 1e-3 * len(self.asked)

    def stage(self, adapter: AdapterShape) -> LoadTiming:
        return LoadTiming(self._next("stage", adapter), adapter.rank)

    def load(self, adapter: AdapterShape, slot: int) -> LoadTiming:
        return LoadTiming(self._next("load", (adapter, slot)), adapter.rank)

    def drop(self, adapter_id: int) -> None:
        self.asked.append(("drop", adapter_id))

    def hold_tables(self, batch: StepBatch) -> None:
        pass

    def is_new(self, batch: StepBatch) -> bool:
        return False

    def prepare(self, batch: StepBatch) -> None:
        raise AssertionError("nothing is new")

    def execute(self, batch: StepBatch) -> StepTiming:
        return StepTiming(self._next("step", len(batch.query_lens)), 0.0)


def measured(backend: Recorded, rounds: Rounds, count: int = ROUNDS) -> LoadTurns:
    turns = LoadTurns(cast("Backend", backend), SHAPES, {8: 0, 64: 5})
    measure_rounds(backend, BATCHES, count, rounds=rounds, loads=turns)
    return turns


def test_an_adapter_is_read_then_copied_into_a_slot_of_its_rank(tmp_path: Path) -> None:
    backend, rounds = Recorded(), Rounds(tmp_path / "part", {})
    measured(backend, rounds)
    moves = [(kind, what) for kind, what in backend.asked if kind in ("stage", "load")]
    for (kind, what), (after, then) in zip(moves[::2], moves[1::2], strict=True):
        assert (kind, after) == ("stage", "load") and then == (what, {8: 0, 64: 5}[what.rank])
    assert Counter(what.adapter_id for kind, what in moves if kind == "stage") == {
        shape.adapter_id: TURNS * ROUNDS for shape in SHAPES
    }


def test_reads_lie_among_the_steps_of_every_round(tmp_path: Path) -> None:
    backend = Recorded()
    measured(backend, Rounds(tmp_path / "part", {}))
    steps, before = 0, []
    for kind, _ in backend.asked:
        steps += kind == "step"
        if kind == "stage":
            before.append(steps)
    assert steps == ROUNDS * len(BATCHES)
    assert {b - a for a, b in pairwise(before)} == {len(BATCHES) // (TURNS * len(SHAPES))}


def test_what_is_read_again_was_dropped_and_nothing_is_left(tmp_path: Path) -> None:
    backend = Recorded()
    measured(backend, Rounds(tmp_path / "part", {})).close()
    held: set[int] = set()
    for kind, what in backend.asked:
        if kind == "stage":
            assert what.adapter_id not in held
            held.add(what.adapter_id)
        elif kind == "drop":
            held.remove(what)
    assert not held


def test_all_but_the_first_read_of_a_rank_are_kept_with_their_round(tmp_path: Path) -> None:
    backend, rounds = Recorded(), Rounds(tmp_path / "part", {})
    measured(backend, rounds)
    each = [rounds.loads(number) for number in range(ROUNDS)]
    assert [len(table) for table in each] == [2 * (8 - 2), 2 * 8, 2 * 8]
    staged = [1e-3 * (i + 1) for i, (kind, _) in enumerate(backend.asked) if kind == "stage"]
    found = [t for table in each for t in table.loc[table["kind"] == "stage", "elapsed_s"]]
    assert found == [t for t in staged if t in found] and len(found) == len(staged) - 2


def test_a_killed_measurement_reads_only_in_the_rounds_that_are_left(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path / "part", {})
    measured(Recorded(), rounds, 1)
    first, later = rounds.loads(0), Recorded()
    measured(later, rounds)
    assert rounds.loads(0).equals(first)
    assert sum(kind == "stage" for kind, _ in later.asked) == 2 * TURNS * len(SHAPES)
    assert len(rounds.loads(1)) == 2 * (8 - 2), "another process: the first read of a rank is again not timed"
