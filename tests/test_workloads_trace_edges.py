"""Trace files that must not be misread in silence: odd names, shifted columns, bad numbers, windows of histograms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.errors import WorkloadError
from workloads.traces import azure_llm, servegen
from workloads.traces import table as trace_table

HEADER = "arrival_s,prompt_tokens,output_tokens,adapter\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = {"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "adapter": "x"}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["NA", "null", "None", "nan", "007"])
def test_an_adapter_may_have_any_name(tmp_path: Path, name: str) -> None:
    requests, names = trace_table.load(write(tmp_path, "t.csv", f"{HEADER}0,1,1,{name}\n1,1,1,\n"))
    assert names == (name,)
    assert requests.adapter.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("0,5,6,7,x\n1,5,6,7,y\n", r"t\.csv:2: the rows have more fields"),
        ("0,5,6,x\n1,5.9,6,x\n", r"t\.csv:3: prompt_tokens is 5\.9, must be a whole number"),
        ("0,5,6,x\ninf,5,6,x\n", r"t\.csv:3: arrival_s is inf"),
        ("0,5,1e300,x\n", r"t\.csv:2: output_tokens is 1e\+300"),
        ("0,5,6,x\n\n\n1,0,6,x\n", r"t\.csv:5: prompt_tokens is 0"),
        ("0,5,6,x\n\n1,5,6,x\n0.5,5,6,x\n", r"t\.csv:5: arrival_s is before"),
        ("0,NA,6,x\n", r"t\.csv:2: prompt_tokens is NA"),
    ],
)
def test_bad_csv_rows_are_named_by_their_line(tmp_path: Path, rows: str, says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        trace_table.load(write(tmp_path, "t.csv", HEADER + rows))


def test_a_blank_last_line_is_no_row(tmp_path: Path) -> None:
    assert len(trace_table.load(write(tmp_path, "t.csv", HEADER + "0,5,6,x\n\n"))[0]) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (json.dumps(ROW) + "\n\n{oops\n", r"t\.jsonl:3: not JSON"),
        (json.dumps(ROW) + "\n[1]\n", r"t\.jsonl:2: must be a JSON object"),
        (json.dumps(ROW | {"prompt_tokens": True}), r"t\.jsonl:1: prompt_tokens is True"),
        ("\n" + json.dumps({**ROW, "output_tokens": 0}), r"t\.jsonl:2: output_tokens is 0"),
    ],
)
def test_bad_jsonl_rows_are_named_by_their_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        trace_table.load(write(tmp_path, "t.jsonl", text))


TOKENS = st.integers(1, 2**31 - 1)
NAMES = st.one_of(st.none(), st.sampled_from(["NA", "null", "1", "1.0", "ä b", "True"]))


@given(st.lists(st.tuples(st.floats(0, 1e6), TOKENS, TOKENS, NAMES), min_size=1, max_size=20))
def test_jsonl_comes_back_as_written(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    rows.sort(key=lambda row: row[0])
    text = "\n".join(json.dumps(dict(zip(ROW, row, strict=True))) for row in rows)
    requests, names = trace_table.load(write(tmp_path_factory.mktemp("t"), "t.jsonl", text))
    assert requests.arrival_s.tolist() == [row[0] for row in rows]
    assert requests.prompt_tokens.tolist() == [row[1] for row in rows]
    assert requests.output_tokens.tolist() == [row[2] for row in rows]
    assert [None if a == 0 else names[a - 1] for a in requests.adapter] == [row[3] for row in rows]


@pytest.mark.parametrize("stamp", ["", "NaT"])
def test_an_azure_row_needs_its_time(tmp_path: Path, stamp: str) -> None:
    text = f"{AZURE}2023-11-16 18:15:46.6805900,1,1\n{stamp},1,1"
    with pytest.raises(WorkloadError, match=r"t\.csv:3: TIMESTAMP is"):
        azure_llm.load(write(tmp_path, "t.csv", text))


@pytest.mark.parametrize(("at", "tokens"), [(0.0, 1), (12_000.0, 1), (21_000.0, 1), (21_600.0, 2), (90_000.0, 2)])
def test_a_servegen_histogram_holds_until_the_next(at: float, tokens: int) -> None:
    entries = ((21_600.0, {2: 1.0}, {2: 1.0}), (0.0, {1: 1.0}, {1: 1.0}))
    assert servegen.Client(1, (), entries).histograms(at) == ({tokens: 1.0}, {tokens: 1.0})


def test_a_servegen_histogram_that_begins_later_stands_in() -> None:
    assert servegen.Client(1, (), ((21_600.0, {2: 1.0}, {3: 1.0}),)).histograms(0.0) == ({2: 1.0}, {3: 1.0})
    assert servegen.Client(1, (), ()).histograms(0.0) is None


GOOD = '{"0": {"input_tokens": "{5: 1.0}", "output_tokens": "{0: 1.0}"}}'


@pytest.mark.parametrize(
    ("trace", "dataset", "says"),
    [
        ("0,nan,1,Gamma,1,1", GOOD, r"trace\.csv:1: .* finite"),
        ("0,0.1,1,Gamma,1,1\n600,inf,1,Gamma,1,1", GOOD, r"trace\.csv:2: .* finite"),
        ("0,0.1,1,Gamma,1,1", '{"0": 5}', r"dataset\.json: not a ServeGen dataset"),
        ("0,0.1,1,Gamma,1,1", '{"0": "x"}', r"dataset\.json: not a ServeGen dataset"),
        ("0,0.1,1,Gamma,1,1", '{"0": {"input_tokens": "[1]", "output_tokens": "[1]"}}', r"is no dict"),
        ("0,0.1,1,Gamma,1,1", '{"0": {"input_tokens": "{5: -1}", "output_tokens": "{5: 1}"}}', r"5: -1 is no token"),
    ],
)
def test_bad_servegen_files_are_named(tmp_path: Path, trace: str, dataset: str, says: str) -> None:
    write(tmp_path, "chunk-1-trace.csv", trace)
    write(tmp_path, "chunk-1-dataset.json", dataset)
    with pytest.raises(WorkloadError, match=says):
        servegen.load(tmp_path)


def test_servegen_without_any_lengths_says_so(tmp_path: Path) -> None:
    write(tmp_path, "chunk-7-trace.csv", "0,0.1,1,Gamma,1,1")
    with pytest.raises(WorkloadError, match="no ServeGen client has lengths, so client 7"):
        servegen.draw(servegen.load(tmp_path), 0.0, 600.0, 1.0, np.random.default_rng(0))
