"""The process in front of the engine: first in first out, first requests of adapters, and metrics that grow."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.front_end import READ_EVERY_S, FrontEnd, SetsSeen, passage, sets_seen

FRONT = FrontEnd(request_s=0.001, first_use_s=0.3, token_s=0.0, read_s=0.0, read_set_s=0.0, read_name_s=0.0)


def test_the_first_request_of_an_adapter_holds_up_those_behind_it() -> None:
    way = passage(np.array([0.0, 0.1, 1.0, 1.1]), np.array([1, 1, 1, 2]), FRONT, SetsSeen.none(), 1.5)
    np.testing.assert_allclose(way.engine_s, [0.301, 0.302, 1.001, 1.401])


def test_what_comes_out_of_the_engine_waits_for_long_work() -> None:
    way = passage(np.array([0.0, 1.0]), np.array([1, 2]), FRONT, SetsSeen.none(), 1.5)
    np.testing.assert_allclose(way.out(np.array([0.1, 0.5, 1.2, 2.0])), [0.301, 0.5, 1.301, 2.0])


def test_reading_metrics_takes_as_long_as_there_are_sets_and_repeats_after_it_ended() -> None:
    front = FrontEnd(0.0, 0.0, 0.0, 0.1, 0.01, 0.001)
    seen = SetsSeen(np.array([0.0, 3.0]), np.array([10.0, 40.0]), np.array([20.0, 100.0]))
    way = passage(np.array([2.1]), np.array([1]), front, seen, 5.0)
    first, second = 0.1 + 0.1 + 0.02, 0.1 + 0.4 + 0.1
    begin = 2 * READ_EVERY_S + first
    np.testing.assert_allclose(way.busy_from_s, [READ_EVERY_S, begin])
    np.testing.assert_allclose(way.busy_to_s, [READ_EVERY_S + first, begin + second])
    assert way.engine_s[0] == pytest.approx(READ_EVERY_S + first)


def test_sets_are_pairs_of_running_and_waiting_adapters_after_a_step() -> None:
    requests = pd.DataFrame(
        {
            "adapter": [1, 2, 1],
            "arrival_s": [0.0, 0.5, 2.5],
            "first_scheduled_s": [0.0, 1.0, 3.0],
            "finish_s": [2.0, 3.0, np.nan],
        }
    )
    steps = pd.DataFrame({"end_s": [1.0, 2.0, 3.0, 4.0, 5.0]})
    seen = sets_seen(requests, steps)
    # {1 runs, 2 waits}; {2 runs}; {1 waits}; {1 runs}; {1 runs} again
    assert seen.sets.tolist() == [1, 2, 3, 4, 4]
    assert seen.names.tolist() == [2, 3, 4, 5, 5]


@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(1, 5)), min_size=1, max_size=40),
    st.floats(0, 0.01),
    st.floats(0, 0.5),
)
def test_nobody_overtakes_and_nobody_is_early(calls: list[tuple[float, int]], request_s: float, first_s: float) -> None:
    times, adapters = (np.array(column) for column in zip(*sorted(calls), strict=True))
    front = FrontEnd(request_s, first_s, 0.0, 0.02, 0.0, 0.0)
    way = passage(times, adapters, front, SetsSeen.none(), 60.0)
    assert (way.engine_s >= times).all()
    assert (np.diff(way.engine_s) >= 0).all()
    out = way.out(times)
    assert (out >= times).all()
    assert (out <= times + max(0.02, request_s + first_s) + 1e-9).all()
