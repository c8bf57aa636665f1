"""Converting traffic: the generic table comes back as it was, foreign formats have their fields, nothing half-written."""

from __future__ import annotations

import csv
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.cli import main
from workloads import convert as converting
from workloads.convert import WORD, convert, prompt_text
from workloads.errors import WorkloadError
from workloads.requests import PrefixTree, Request, RequestTable
from workloads.traces import azure_llm, mooncake
from workloads.traces import table as trace_table
from workloads.workload import Workload

NAMES = st.sampled_from(["a", "client 7", 'quo"ted', "co,mma", "ümläut", "NA", "1"])
ROWS = st.lists(
    st.tuples(st.floats(0, 1e6), st.integers(1, 9999), st.integers(1, 999), st.one_of(st.none(), NAMES), st.integers(-3, 3)),
    min_size=1, max_size=12,
)  # fmt: skip


def workload(rows: list[tuple]) -> Workload:
    rows = sorted(rows, key=lambda row: row[0])
    names = list(dict.fromkeys(row[3] for row in rows if row[3] is not None))
    adapter = [0 if row[3] is None else 1 + names.index(row[3]) for row in rows]
    arrival, prompt, output, _, priority = (np.array(column) for column in zip(*rows, strict=True))
    return Workload(RequestTable(arrival.astype(float), prompt, output, np.array(adapter), priority), tuple(names))


def same(one: RequestTable, two: RequestTable) -> bool:
    return all(a.tolist() == b.tolist() for a, b in zip(one.columns(), two.columns(), strict=True))


@settings(max_examples=30, deadline=None)
@given(ROWS, st.sampled_from(["csv", "jsonl", "parquet"]))
def test_the_table_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple], suffix: str
) -> None:
    before = workload(rows)
    out = tmp_path_factory.mktemp("t") / f"x.{suffix}"
    assert convert(before, "table", out) == ()
    requests, names = trace_table.load(out)
    assert same(requests, before.requests)
    assert names == before.adapter_names


def sessions() -> Workload:
    """Two sessions of adapter 1 over one system prompt; the first has two turns; and a request without prefix."""
    tree = PrefixTree(np.array([-1, 0, 0]), np.array([600, 1500, 1400]))
    four = np.arange(4.0)
    return Workload(
        RequestTable(
            four, np.array([700, 1300, 1200, 50]), np.array([100, 200, 200, 9]), np.array([1, 1, 1, 0]),
            prefix_id=np.array([1, 2, 1, -1]), prefix_tokens=np.array([800, 1400, 1400, 0]), tree=tree,
        ), ("chat",),
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_growing_beginnings_come_back(tmp_path: Path, suffix: str) -> None:
    convert(sessions(), "table", tmp_path / f"x.{suffix}")
    requests, _ = trace_table.load(tmp_path / f"x.{suffix}")
    assert [r.prefix for r in requests] == [r.prefix for r in sessions().requests]


def test_single_beginnings_come_back(tmp_path: Path) -> None:
    ids, tokens = np.array([4, -1, 4]), np.array([10, 0, 20])
    table = RequestTable(
        np.arange(3.0), np.full(3, 30), np.full(3, 5), np.zeros(3, dtype=np.int64), prefix_id=ids, prefix_tokens=tokens
    )
    convert(Workload(table, ()), "table", tmp_path / "x.csv")
    requests, _ = trace_table.load(tmp_path / "x.csv")
    assert requests.prefix_id.tolist() == [0, -1, 0]
    assert requests.prefix_tokens.tolist() == [10, 0, 20]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("5", r"t\.csv:2: prefix_path has '5'"),
        ("5:a 4:b", r"t\.csv:2: prefix_path has '4:b'"),
        ("x:a", r"t\.csv:2: prefix_path has 'x:a'"),
        ("16:a", r"t\.csv:2: prefix_path has '16:a'"),
    ],
)
def test_paths_that_cannot_be(tmp_path: Path, path: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(f"arrival_s,prompt_tokens,output_tokens,adapter,prefix_path\n0,10,5,a,{path}\n")
    with pytest.raises(WorkloadError, match=says):
        trace_table.load(tmp_path / "t.csv")


def test_prompts_begin_alike_as_far_as_their_prefixes_say() -> None:
    first, other, again, alone = (prompt_text(r).split() for r in sessions().requests)
    assert [len(words) for words in (first, other, again, alone)] == [700, 1300, 1200, 50]
    assert first[:600] == other[:600]
    assert first[600] != other[600]
    assert first == again[:700]
    assert alone[0] not in {first[0], first[600]}
    assert set(first) - {WORD.strip()} == {"p0", "p1"}


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_vllm(tmp_path: Path) -> None:
    notes = convert(sessions(), "vllm", tmp_path / "v.jsonl")
    rows = rows_of(tmp_path / "v.jsonl")
    assert [(len(r["prompt"].split()), r["output_tokens"], r["adapter"]) for r in rows] == [
        (700, 100, "chat"), (1300, 200, "chat"), (1200, 200, "chat"), (50, 9, ""),
    ]  # fmt: skip
    assert any("no arrival times" in note for note in notes)
    assert any("--lora-modules" in note for note in notes)


def test_sglang(tmp_path: Path) -> None:
    notes = convert(sessions(), "sglang", tmp_path / "s.jsonl")
    turns = [[len(turn["content"].split()) for turn in row["conversations"]] for row in rows_of(tmp_path / "s.jsonl")]
    assert turns == [[700, 100], [1300, 200], [1200, 200], [50, 9]]
    assert any("adapters are lost" in note for note in notes)


def test_mooncake_is_read_back_with_its_whole_blocks(tmp_path: Path) -> None:
    convert(sessions(), "mooncake", tmp_path / "m.jsonl")
    back = mooncake.load(tmp_path / "m.jsonl", spread=False).requests
    assert back.arrival_s.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert back.prompt_tokens.tolist() == [700, 1300, 1200, 50]
    ids = [row["hash_ids"] for row in rows_of(tmp_path / "m.jsonl")]
    assert [len(i) for i in ids] == [2, 3, 3, 1]
    assert ids[0][0] == ids[1][0] == ids[2][0]
    assert len({ids[0][1], ids[1][1], ids[2][1]}) == 3


def test_a_mooncake_trace_comes_back(tmp_path: Path) -> None:
    sample = Path(__file__).parents[1] / "workloads" / "data" / "mooncake_conversation_sample.jsonl"
    assert main(["workload", "convert", str(sample), "--to", "mooncake", "--out", str(tmp_path / "m.jsonl")]) == 0
    before, after = (mooncake.load(f).requests for f in (sample, tmp_path / "m.jsonl"))
    assert after.prompt_tokens.tolist() == before.prompt_tokens.tolist()
    whole = [len([e for e, _ in r.prefix if e % 512 == 0]) for r in before]
    assert [len([e for e, _ in r.prefix if e % 512 == 0]) for r in after] == whole


def test_inference_perf_reads_azure_csv(tmp_path: Path) -> None:
    notes = convert(sessions(), "inference-perf", tmp_path / "i.csv")
    back = azure_llm.load(tmp_path / "i.csv").requests
    assert back.arrival_s.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert back.output_tokens.tolist() == [100, 200, 200, 9]
    with (tmp_path / "i.csv").open() as file:
        stamp = list(csv.reader(file))[1][0]
    assert datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S.%f")  # noqa: DTZ007 the reader's own format
    assert any("common beginnings" in note for note in notes)


def test_refusals_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.csv").touch()
    for to, name, says in (
        ("nothing", "x.csv", "format nothing: unknown"),
        ("table", "there.csv", "exists already"),
        ("table", "x.txt", "must be .csv, .jsonl or .parquet"),
        ("vllm", "no/folder/x.jsonl", "cannot be written"),
    ):
        with pytest.raises(WorkloadError, match=says):
            convert(sessions(), to, tmp_path / name)

    def fail(request: Request) -> str:
        if request.request_id == 2:
            raise RuntimeError
        return "x"

    monkeypatch.setattr(converting, "prompt_text", fail)
    with pytest.raises(RuntimeError):
        convert(sessions(), "vllm", tmp_path / "v.jsonl")
    assert [f.name for f in tmp_path.iterdir()] == ["there.csv"]
