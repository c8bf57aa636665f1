"""Converting traffic: the generic table comes back as it was, foreign formats have their fields, nothing half-written."""

from __future__ import annotations

import csv
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.cli import main
from workloads import convert as converting
from workloads import replay
from workloads.convert import TARGETS, convert
from workloads.errors import WorkloadError
from workloads.replay import APPROXIMATE, WORD, prompt_text
from workloads.requests import PrefixTree, Request, RequestTable
from workloads.traces import azure_llm, mooncake
from workloads.traces import table as trace_table
from workloads.workload import Workload

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
NAMES = (
    st.sampled_from(["a", "client 7", 'quo"ted', "co,mma", "ümläut", "NA", "1", " ", "two\nlines", "\r", "\u2028"])
    | TEXT
)
ROWS = st.lists(
    st.tuples(st.floats(0, 1e6), st.integers(1, 9999), st.integers(1, 999), st.one_of(st.none(), NAMES), st.integers(-3, 3)),
    min_size=1, max_size=12,
)  # fmt: skip


SUFFIXES = st.sampled_from(["csv", "jsonl", "parquet"])


def workload(rows: list[tuple]) -> Workload:
    rows = sorted(rows, key=lambda row: row[0])
    names = list(dict.fromkeys(row[3] for row in rows if row[3] is not None))
    adapter = [0 if row[3] is None else 1 + names.index(row[3]) for row in rows]
    arrival, prompt, output, _, priority = (np.array(column) for column in zip(*rows, strict=True))
    return Workload(RequestTable(arrival.astype(float), prompt, output, np.array(adapter), priority), tuple(names))


def same(one: RequestTable, two: RequestTable) -> bool:
    return all(a.tolist() == b.tolist() for a, b in zip(one.columns(), two.columns(), strict=True))


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, suffix=SUFFIXES, chunk=st.sampled_from([1, 3, 1 << 16]))
def test_the_table_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple], suffix: str, chunk: int
) -> None:
    before = workload(rows)
    out = tmp_path_factory.mktemp("t") / f"x.{suffix}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converting, "_CHUNK", chunk)
        assert convert(before, "table", out) == ()
    requests, names = trace_table.load(out)
    assert same(requests, before.requests)
    assert names == before.adapter_names


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_arrivals_come_back_to_the_last_bit(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    arrival = np.sort(rng.random(20_000) * 10 ** rng.uniform(-12, 9, 20_000))
    one = np.ones(len(arrival), dtype=np.int64)
    convert(Workload(RequestTable(arrival, one, one, 0 * one), ()), "table", tmp_path / f"x.{suffix}")
    assert trace_table.load(tmp_path / f"x.{suffix}")[0].arrival_s.tobytes() == arrival.tobytes()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_optional_columns_only_where_they_say_something(tmp_path: Path, suffix: str) -> None:
    def columns(what: Workload, name: str) -> list[str]:
        out = tmp_path / f"{name}.{suffix}"
        convert(what, "table", out)
        return list(trace_table._read(out))

    plain = workload([(0.0, 1, 1, None, 0)])
    assert columns(plain, "plain") == list(trace_table.REQUIRED)
    assert columns(workload([(0.0, 1, 1, None, 2)]), "priority") == [*trace_table.REQUIRED, "priority"]
    assert columns(sessions(), "tree") == [*trace_table.REQUIRED, "prefix_path"]
    empty = Workload(RequestTable(*plain.requests.columns(), tree=sessions().requests.tree), ())
    assert columns(empty, "no prefix") == list(trace_table.REQUIRED)


def test_adapters_are_known_by_name(tmp_path: Path) -> None:
    """Their numbers are those of first appearance; one without requests is not in the table."""
    one = np.ones(2, dtype=np.int64)
    requests = RequestTable(np.arange(2.0), one, one, np.array([3, 1]))
    notes = convert(Workload(requests, ("a", "unused", "b")), "table", tmp_path / "x.csv")
    assert notes == ("adapters without a request: 1; the table does not name them",)
    back, names = trace_table.load(tmp_path / "x.csv")
    assert [names[i - 1] for i in back.adapter] == ["b", "a"]
    for wrong in (("a", "", ""), ("a", "b", "a")):
        with pytest.raises(WorkloadError, match="their names must differ and not be empty"):
            convert(Workload(requests, wrong), "table", tmp_path / "y.csv")


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


@st.composite
def forests(draw: st.DrawFn) -> Workload:
    """Requests anywhere in a random forest: inside its nodes, at their ends, past them, or with nothing in common."""
    parent, ends = [], []
    for node in range(draw(st.integers(1, 6))):
        parent.append(draw(st.integers(-1, node - 1)))
        ends.append((ends[parent[-1]] if parent[-1] >= 0 else 0) + draw(st.integers(1, 9)))
    n = draw(st.integers(1, 8))
    leaf = [draw(st.integers(-1, len(parent) - 1)) for _ in range(n)]
    tokens = [0 if i < 0 else draw(st.integers(1, ends[i] + 3)) for i in leaf]
    output = [draw(st.integers(1, 5)) for _ in leaf]
    prompt = [max(1, t - draw(st.integers(0, o))) for t, o in zip(tokens, output, strict=True)]
    requests = RequestTable(
        np.arange(float(n)), np.array(prompt), np.array(output), np.zeros(n, dtype=np.int64),
        prefix_id=np.array(leaf), prefix_tokens=np.array(tokens), tree=PrefixTree(np.array(parent), np.array(ends)),
    )  # fmt: skip
    return Workload(requests, ())


def in_common(one: Request, two: Request) -> int:
    """How many tokens two requests begin with that are the same."""
    tokens = 0
    for (end, node), (other_end, other) in zip(one.prefix, two.prefix, strict=False):
        if node != other:
            break
        tokens = min(end, other_end)
    return tokens


@settings(max_examples=60, deadline=None)
@given(before=forests(), suffix=SUFFIXES)
def test_any_tree_comes_back(tmp_path_factory: pytest.TempPathFactory, before: Workload, suffix: str) -> None:
    out = tmp_path_factory.mktemp("t") / f"x.{suffix}"
    convert(before, "table", out)
    new: dict[int, int] = {}
    for one, two in zip(before.requests, trace_table.load(out)[0], strict=True):
        assert [end for end, _ in one.prefix] == [end for end, _ in two.prefix]
        for (_, node), (_, name) in zip(one.prefix, two.prefix, strict=True):
            assert new.setdefault(node, name) == name
    assert len(set(new.values())) == len(new)


@settings(max_examples=60, deadline=None)
@given(what=forests())
def test_prompts_share_exactly_what_their_prefixes_say(what: Workload) -> None:
    requests = list(what.requests)
    texts = [prompt_text(request).split() for request in requests]
    for i, (one, text) in enumerate(zip(requests, texts, strict=True)):
        assert len(text) == one.prompt_tokens
        for two, other in zip(requests[:i], texts[:i], strict=True):
            want = min(in_common(one, two), one.prompt_tokens, two.prompt_tokens)
            got = next(
                (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other))
            )
            assert got == want


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
    ("paths", "says"),
    [
        ("5", r"t\.csv:2: prefix_path has '5'"),
        ("5:a 4:b", r"t\.csv:2: prefix_path has '4:b'"),
        ("x:a", r"t\.csv:2: prefix_path has 'x:a'"),
        ("16:a", r"t\.csv:2: prefix_path has '16:a'"),
        ("5:", r"t\.csv:2: prefix_path has '5:'"),
        ("3:a 8:b\n5:a 8:b", r"t\.csv:3: prefix_path has '5:a', but a ends at 3 above"),
        ("3:a 8:b\n5:a", r"t\.csv:3: prefix_path has '5:a', but a ends at 3 above"),
        ("3:a 8:b\n2:a 8:b", r"t\.csv:3: prefix_path has '2:a', but a ends at 3 above"),
        ("9:a\n3:a 5:b", r"t\.csv:3: prefix_path has '3:a', but a ends at 9 above"),
    ],
)
def test_paths_that_cannot_be(tmp_path: Path, paths: str, says: str) -> None:
    rows = "".join(f"0,10,5,a,{path}\n" for path in paths.split("\n"))
    (tmp_path / "t.csv").write_text(f"arrival_s,prompt_tokens,output_tokens,adapter,prefix_path\n{rows}")
    with pytest.raises(WorkloadError, match=says):
        trace_table.load(tmp_path / "t.csv")


def test_paths_may_end_inside_an_id(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens,adapter,prefix_path\n0,9,9,a,2:a\n0,9,9,a,3:a 8:b\n0,9,9,a,3:a 5:b\n0,9,9,a,\n"
    )
    requests, _ = trace_table.load(tmp_path / "t.csv")
    assert [r.prefix for r in requests] == [((2, 0),), ((3, 0), (8, 1)), ((3, 0), (5, 1)), ()]


def test_a_path_and_an_id_are_one_too_many(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens,adapter,prefix_id,prefix_tokens,prefix_path\n0,9,9,a,x,2,2:a\n"
    )
    with pytest.raises(WorkloadError, match=r"t\.csv:1: prefix_path and prefix_id: give one of them"):
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
    as_vllm_reads_it = pd.read_json(tmp_path / "v.jsonl", lines=True)
    assert as_vllm_reads_it["prompt"].tolist() == [r["prompt"] for r in rows]
    assert as_vllm_reads_it["output_tokens"].tolist() == [100, 200, 200, 9]
    assert APPROXIMATE in notes
    for says in ("--num-prompts 4 --custom-output-len -1", "no arrival times", "--lora-modules", "earlier answers"):
        assert sum(says in note for note in notes) == 1


def test_sglang_keeps_arrivals_lengths_and_adapters(tmp_path: Path) -> None:
    notes = convert(sessions(), "sglang", tmp_path / "s.jsonl")
    rows = rows_of(tmp_path / "s.jsonl")
    assert [r["timestamp"] for r in rows] == [0.0, 1000.0, 2000.0, 3000.0]
    assert [(len(r["prompt"].split()), r["output_len"]) for r in rows] == [
        (700, 100),
        (1300, 200),
        (1200, 200),
        (50, 9),
    ]
    assert [r.get("extra_request_body") for r in rows] == [{"lora_path": "chat"}] * 3 + [None]
    # What else a row has, the reader sends to the server.
    assert {key for row in rows for key in row} == {"prompt", "output_len", "timestamp", "extra_request_body"}
    assert any("--dataset-name autobench --num-prompts 4 --use-trace-timestamps" in note for note in notes)


def test_notes_say_only_what_is_lost(tmp_path: Path) -> None:
    plain, late = workload([(0.0, 5, 5, None, 0)]), workload([(2.0, 5, 5, "a", 1)])
    assert convert(plain, "inference-perf", tmp_path / "p.csv")[1:] == ()
    for to in ("sglang", "mooncake", "inference-perf"):
        notes = convert(late, to, tmp_path / f"{to}.out")
        for says in ("priorities", "adapter", "arrivals count from"):
            assert sum(says in note for note in notes) == 1, (to, says)


@pytest.mark.parametrize("to", [to for to in TARGETS if to != "inference-perf"])
def test_the_same_workload_gives_the_same_file(tmp_path: Path, to: str) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        convert(sessions(), to, tmp_path / name)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


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


@settings(max_examples=30, deadline=None)
@given(ROWS)
def test_inference_perf_finds_the_header(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    """Its reader asks `csv.Sniffer`: without a header found, arrivals would count from 1970."""
    out = tmp_path_factory.mktemp("t") / "i.csv"
    convert(workload(rows), "inference-perf", out)
    assert csv.Sniffer().has_header(out.read_text()[:2048])


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "there.csv").touch()
    (tmp_path / "dangling.csv").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    nothing = Workload(RequestTable(np.empty(0), *(np.empty(0, dtype=np.int64) for _ in range(3))), ())
    late = Workload(RequestTable(np.array([1e18]), *(np.ones(1, dtype=np.int64) for _ in range(3))), ("a",))
    surrogate = workload([(0.0, 1, 1, "\ud800", 0)])
    for what, to, name, says in (
        (sessions(), "nothing", "x.csv", "format nothing: unknown"),
        (sessions(), "table", "there.csv", r"there\.csv exists; give another name"),
        (sessions(), "table", "dangling.csv", r"dangling\.csv exists; give another name"),
        (sessions(), "table", "x.txt", "must be .csv, .jsonl or .parquet"),
        (sessions(), "vllm", "x.json", r"must be \.jsonl"),
        (sessions(), "vllm", "no/folder/x.jsonl", "there is no folder"),
        (sessions(), "vllm", "there.csv/x.jsonl", "there is no folder"),
        (sessions(), "table", "x" * 250 + ".csv", "cannot be written"),
        (nothing, "table", "x.jsonl", "no requests"),
        (late, "inference-perf", "x.csv", "cannot be written"),
        (surrogate, "table", "x.csv", "cannot be written"),
        (surrogate, "table", "x.parquet", "cannot be written"),
    ):
        with pytest.raises(WorkloadError, match=says):
            convert(what, to, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, error: type[BaseException]
) -> None:
    seen = []

    def fail(*args: object) -> tuple:
        seen.append(args)
        if len(seen) == 3:
            raise error
        return ()

    monkeypatch.setattr(RequestTable, "prefix", fail)
    with pytest.raises(WorkloadError if error is OSError else error):
        convert(sessions(), to, tmp_path / "x.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is made for one request at a time, and the file has its name only when it is whole."""
    sizes, text = [], prompt_text

    def watched(request: Request) -> str:
        assert not (tmp_path / "v.jsonl").exists()
        sizes.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
        return text(request)

    monkeypatch.setattr(replay, "prompt_text", watched)
    n = 300
    column = np.full(n, 1000)
    convert(Workload(RequestTable(np.arange(float(n)), column, column, 0 * column), ()), "vllm", tmp_path / "v.jsonl")
    assert sizes[0] == 0
    assert 0 < sizes[n // 2] < sizes[-1]
