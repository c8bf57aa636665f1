"""Steps measured in rounds: medians over rounds, an order a round, and a killed measurement that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.base import StepBatch, StepTiming
from backend.errors import BackendError
from backend.rounds import DECODE_TURNS, Rounds, measure_rounds, seconds_of

BATCHES = [StepBatch((2,) * n, (5,) * n, (-1,) * n, (True,) * n, ((0,),) * n) for n in (1, 2, 3, 4)]


class Clocked:
    """Takes a millisecond a request, and one more each time; stops after `most` steps."""

    def __init__(self, most: int = 10**6) -> None:
        self.seen: list[int] = []
        self.most = most

    def hold_tables(self, batch: StepBatch) -> None:
        self.held = batch

    def is_new(self, batch: StepBatch) -> bool:
        return len(batch.query_lens) not in self.seen

    def prepare(self, batch: StepBatch) -> None:
        self.seen.append(len(batch.query_lens))

    def execute(self, batch: StepBatch) -> StepTiming:
        if len(self.seen) == self.most:
            raise KeyboardInterrupt
        count = len(batch.query_lens)
        again = self.seen.count(count)
        self.seen.append(count)
        if again:
            assert self.held == batch
        return StepTiming(1e-3 * (count + again), 1e-4)


def test_the_median_leaves_the_first_use_out(tmp_path: Path) -> None:
    backend = Clocked()
    table = seconds_of(measure_rounds(backend, BATCHES, 3, rounds=Rounds(tmp_path / "part", {"gpu": "x"})))
    assert table["device_s"].tolist() == pytest.approx([3e-3, 4e-3, 5e-3, 6e-3])
    assert table["elapsed_s"].tolist() == pytest.approx([3.1e-3, 4.1e-3, 5.1e-3, 6.1e-3])
    assert table["p10_s"].tolist() < table["elapsed_s"].tolist() < table["p90_s"].tolist()
    orders = [tuple(backend.seen[i : i + 4]) for i in range(4, 16, 4)]
    assert all(sorted(order) == [1, 2, 3, 4] for order in orders)
    assert len(set(orders)) > 1


def test_rounds_keep_the_order_of_their_steps_and_when_each_began(tmp_path: Path) -> None:
    backend = Clocked()
    rounds = Rounds(tmp_path / "part", {})
    steps = measure_rounds(backend, BATCHES, 2, rounds=rounds)
    assert [i + 1 for i in steps["composition"]] == backend.seen[4:]
    assert steps["round"].tolist() == [0] * 4 + [1] * 4
    assert steps["start_s"].is_monotonic_increasing
    again = measure_rounds(backend, BATCHES, 2, rounds=rounds)
    assert again.equals(steps), "read from the finished rounds"


def test_what_is_not_new_is_executed_in_rounds_alone(tmp_path: Path) -> None:
    backend = Clocked()
    backend.seen = [3]
    measure_rounds(backend, [*BATCHES, BATCHES[0]], 1, rounds=Rounds(tmp_path / "part", {}))
    assert backend.seen[1:4] == [1, 2, 4], "each once, though the first is there twice"
    assert sorted(backend.seen[4:]) == [1, 1, 2, 3, 4]


def test_decodes_come_more_often_on_end_and_every_time_counts(tmp_path: Path) -> None:
    decode = StepBatch((1,) * 5, (5,) * 5, (-1,) * 5, (True,) * 5, ((0,),) * 5)
    backend = Clocked()
    table = seconds_of(measure_rounds(backend, [*BATCHES, decode], 3, rounds=Rounds(tmp_path / "part", {})))
    assert [backend.seen.count(n) for n in (1, 2, 3, 4, 5)] == [4, 4, 4, 4, 1 + 3 * DECODE_TURNS]
    assert table["device_s"].tolist()[4] == pytest.approx(1e-3 * (5 + (1 + 3 * DECODE_TURNS) / 2))
    orders = [backend.seen[i : i + 4 + DECODE_TURNS] for i in range(5, len(backend.seen), 4 + DECODE_TURNS)]
    at = [order.index(5) for order in orders]
    assert all(order[i : i + DECODE_TURNS] == [5] * DECODE_TURNS for i, order in zip(at, orders, strict=True))
    assert len(set(at)) > 1, "not always at the same place of a round"


def test_the_first_of_decodes_on_end_is_not_in_the_mean_of_the_host(tmp_path: Path) -> None:
    class SlowToBegin(Clocked):
        def execute(self, batch: StepBatch) -> StepTiming:
            other = self.seen[-1:] != [len(batch.query_lens)]
            return StepTiming(super().execute(batch).device_s, 5e-4 if other else 1e-4)

    decode = StepBatch((1,) * 5, (5,) * 5, (-1,) * 5, (True,) * 5, ((0,),) * 5)
    table = seconds_of(measure_rounds(SlowToBegin(), [*BATCHES, decode], 2, rounds=Rounds(tmp_path / "part", {})))
    assert table["host_s"].tolist()[4] == pytest.approx(1e-4)
    assert min(table["host_s"].tolist()[:4]) > 2e-4, "of others every time counts"
    assert table["elapsed_s"].tolist() == pytest.approx((table["device_s"] + table["host_s"]).tolist())


def test_a_killed_measurement_goes_on(tmp_path: Path) -> None:
    facts = {"gpu": "x"}
    with pytest.raises(KeyboardInterrupt):
        measure_rounds(Clocked(10), BATCHES, 3, rounds=Rounds(tmp_path / "part", facts))
    later = Clocked()
    measure_rounds(later, BATCHES, 3, rounds=Rounds(tmp_path / "part", facts))
    assert len(later.seen) == 4 + 2 * 4, "one round was kept, the broken one starts over"
    done = Clocked()
    measure_rounds(done, BATCHES, 3, rounds=Rounds(tmp_path / "part", facts))
    assert not done.seen


def test_rounds_of_another_measurement_are_refused(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path / "part", {"gpu": "x"})
    with pytest.raises(BackendError, match="rounds of another measurement"):
        Rounds(tmp_path / "part", {"gpu": "y"})
    rounds.remove()
    Rounds(tmp_path / "part", {"gpu": "y"})
