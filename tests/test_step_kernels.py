"""Kernels that overlap are charged what they move the end by, and each belongs to one part of the step."""

from __future__ import annotations

import pandas as pd
import pytest

from backend.base import StepBatch, StepTiming
from benchmarks.step import FRESH, LIMITS, PROMPTS, RANK, Bench, first, main
from benchmarks.step_kernels import charged, part_of, show_kernels
from benchmarks.step_tables import compare_profile


def test_overlapping_kernels_add_up_to_the_step() -> None:
    events = [("b", 8.0, 15.0), ("a", 0.0, 10.0), ("c", 9.0, 12.0), ("d", 20.0, 21.0)]
    moved = charged(events)
    assert moved == [("a", 10.0), ("b", 5.0), ("c", 0.0), ("d", 6.0)]
    assert sum(us for _, us in moved) == 21.0


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("shrink_short_1", "shrink"),
        ("expand_long_swiglu", "expand"),
        ("linear_wide_64_2", "base products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "base products"),
        ("_attention", "attention"),
        ("_silu_mul", "norm and SwiGLU"),
        ("segment_map", "start of the graph"),
        ("Memcpy HtoD (Pinned -> Device)", "other"),
    ],
)
def test_a_kernel_belongs_to_a_part(kernel: str, part: str) -> None:
    assert part_of(kernel) == part


def test_what_adapters_add_is_printed_beside_none(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(4, 0, 0, "nvjet", 4, 900.0), (4, 0, 1, "nvjet", 4, 910.0)]
    rows.append((4, 0, 1, "shrink_short_1", 4, 40.0))
    columns = ["B", "prompt_tokens", "D", "kernel", "launches", "us"]
    show_kernels(pd.DataFrame(rows, columns=columns))
    added = capsys.readouterr().out.split("what adapters add:")[1]
    assert "0.01" in added and "0.04" in added and "0.05" in added


def test_repeated_steps_are_held_against_a_profile() -> None:
    decodes = pd.DataFrame({"B": [4, 4], "D": [0, 1], "context": [490, 490], "median_ms": [6.0, 9.0]})
    prompts = pd.DataFrame({"tokens": [512, 512], "prompts": [1, 1], "D": [0, 1], "median_ms": [10.0, 20.0]})
    table, rows = compare_profile(decodes, prompts, "h100-llama-3.1-8b", LIMITS, RANK)
    none, one = table.loc[4]
    assert 1.2 < one / none < 1.5  # 1.5 times as long, by a profile in which an adapter takes some of it
    assert 0.5 < none < 1.5
    assert rows["over_profile"].iloc[1] > 1.5 * rows["over_profile"].iloc[0]


def test_prompts_of_new_lengths_are_told_from_repeated_ones() -> None:
    class Faked:
        def batch(self, query: list[int], context: list[int], adapters: int) -> int:
            assert (context, adapters) == ([0], 1)
            return query[0]

        def times(self, steps: list[list[int]], skipped: int) -> list[pd.DataFrame]:
            assert skipped == 0 and len(steps) == 1
            elapsed = [float(steps[0][0]), 1.0, 2.0, 3.0, 4.0, 9.0]
            return [pd.DataFrame({"elapsed": elapsed, "device": [0.5 * ms for ms in elapsed], "host": 0.0})]

    table = first(Faked())  # type: ignore[arg-type]
    assert table["first_ms"].tolist() == table["tokens"].tolist() == list(FRESH)
    assert set(table["again_ms"]) == {3.0} and set(table["again_device_ms"]) == {1.5}
    assert not set(FRESH) & {tokens for tokens, _ in PROMPTS}


def test_steps_that_differ_in_their_adapters_take_turns_in_random_order() -> None:
    asked: list[int] = []

    class Counted:
        """Its n-th step takes n milliseconds."""

        def execute(self, batch: StepBatch) -> StepTiming:
            asked.append(batch.context_lens[0])
            return StepTiming(1e-3 * len(asked), 0.0)

    bench = Bench.__new__(Bench)
    bench.backend = Counted()  # type: ignore[assignment]
    steps = [[StepBatch((1,), (10 * i + turn,), (-1,), (True,), ((0,),)) for turn in range(8)] for i in range(3)]
    tables = bench.times(steps, 1)
    turns = [asked[3 * turn : 3 * turn + 3] for turn in range(8)]
    assert all(sorted(turn) == [at, 10 + at, 20 + at] for at, turn in enumerate(turns))
    assert len({tuple(context // 10 for context in turn) for turn in turns}) > 2, "not always in the same order"
    for i, table in enumerate(tables):
        assert table["device"].round(6).tolist() == [1.0 + asked.index(10 * i + turn) for turn in range(1, 8)]


def test_a_table_is_not_written_where_its_facts_go(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "compare", "--out", "step.json"])
    assert stopped.value.code == 2
    assert "step.json must end in .csv" in capsys.readouterr().err
