"""Mooncake, BurstGPT, VTC and Azure Functions: the real slices to the digit, and one clear sentence for a bad row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workloads.errors import WorkloadError
from workloads.requests import BASE
from workloads.traces import azure_functions, burstgpt, mooncake, vtc

DATA = Path(__file__).parents[1] / "workloads" / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "traces"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/traces is not here")


def facts(key: str) -> dict[str, Any]:
    return json.loads((SHARED / "expected.json").read_text())[key]


def ends_and_arrivals(path: Path) -> tuple[list[float], list[float]]:
    with path.open(newline="") as file:
        rows = [(float(r["end_timestamp"]), float(r["duration"])) for r in csv.DictReader(file)]
    return [end for end, _ in rows], sorted(end - duration for end, duration in rows)


# The real slices


@needs_shared
@pytest.mark.parametrize("spread", [True, False])
def test_mooncake_slice(spread: bool) -> None:
    key = "mooncake/conversation_trace.jsonl"
    want = facts(key)
    workload = mooncake.load(SHARED / key, spread=spread)
    r = workload.requests
    assert len(r) == want["rows"]
    assert (r.prompt_tokens.sum(), r.output_tokens.sum()) == (want["sum_input"], want["sum_output"])
    assert r.tree is not None
    # In this trace an id has one parent only, so that tree nodes are distinct ids.
    assert len(r.tree.parent) == want["distinct_blocks"]
    assert (r.tree.end_tokens[r.prefix_id] // 512).sum() == want["sum_blocks"]
    assert workload.notes[0].startswith(f"{want['rows']} requests came at {want['distinct_timestamps']} distinct times")
    assert (workload.adapter_names, set(r.adapter.tolist())) == ((), {BASE})
    assert r.arrival_s[0] == 0
    step = np.floor(r.arrival_s / 3 + 1e-9) * 3
    assert step[-1] == (want["last_ms"] - want["first_ms"]) / 1000
    assert len(np.unique(r.arrival_s)) == (want["rows"] if spread else want["distinct_timestamps"])


@needs_shared
def test_vtc_slice() -> None:
    key = "vtc_arena/FCFS/all_results_real.jsonl"
    want = facts(key)
    workload = vtc.load(SHARED / key)
    r = workload.requests
    assert (len(r), len(workload.adapter_names)) == (want["rows"], want["adapters"])
    assert (r.prompt_tokens.sum(), r.output_tokens.sum()) == (want["sum_prompt"], want["sum_output"])
    counts = np.bincount(r.adapter)
    assert workload.adapter_names[counts.argmax() - 1] == want["hottest"]
    assert counts.max() == want["hottest_count"]
    assert r.arrival_s[-1] == want["last_req_time"]
    assert workload.notes == ()


@needs_shared
@pytest.mark.parametrize("name", ["1000_inv", "500_invocations"])
def test_functions_2019_slices(name: str) -> None:
    key = f"azure_functions_2019/{name}.csv"
    want = facts(key)
    counts = azure_functions.load_counts(SHARED / key)
    per_function = np.sort(counts.counts.sum(axis=1))[::-1]
    total = per_function.sum()
    assert counts.counts.shape == (want["rows"], want["minutes"])
    assert counts.first_minute == int(want["first_minute"].removeprefix("minute_"))
    assert counts.first_minute + want["minutes"] - 1 == int(want["last_minute"].removeprefix("minute_"))
    assert (total, per_function[0]) == (want["total"], want["top1"])
    assert (per_function > 0).sum() == want["functions_invoked"]
    assert round(per_function[0] / total, 5) == want["top1_share"]
    # The share in expected.json is that of a tenth of the functions invoked, 75 of 749 (100 of 1,000 have 0.94062).
    tenth = -(-want["functions_invoked"] // 10)
    assert round(per_function[:tenth].sum() / total, 5) == want["top10pct_share"]
    assert len(set(counts.names)) == want["rows"]


@needs_shared
def test_functions_2019_drawn_whole() -> None:
    counts = azure_functions.load_counts(SHARED / "azure_functions_2019/1000_inv.csv")
    arrival, function = azure_functions.draw_arrivals(counts, np.random.default_rng(0))
    assert len(arrival) == facts("azure_functions_2019/1000_inv.csv")["total"]
    assert (np.bincount(function, minlength=1000) == counts.counts.sum(axis=1)).all()
    assert (np.bincount((arrival // 60).astype(int)) == counts.counts.sum(axis=0)).all()
    within = arrival % 60
    assert within.mean() == pytest.approx(30, abs=0.1)
    assert within.std() == pytest.approx(60 / 12**0.5, abs=0.1)


@needs_shared
def test_functions_2021_slice() -> None:
    key = "azure_functions_2021/Azure2021_200.csv"
    want = facts(key)
    arrival, function, names = azure_functions.load_invocations(SHARED / key)
    assert (len(arrival), len(names)) == (want["rows"], want["functions"])
    assert len({name.split("/")[0] for name in names}) == want["apps"]
    ends, starts = ends_and_arrivals(SHARED / key)
    assert (min(ends), max(ends)) == (want["first_end"], want["last_end"])
    assert arrival.tolist() == [start - starts[0] for start in starts]
    assert list(dict.fromkeys(function.tolist())) == list(range(want["functions"]))


# The samples of the package


def test_mooncake_sample() -> None:
    workload = mooncake.load(DATA / "mooncake_conversation_sample.jsonl")
    r = workload.requests
    assert (len(r), r.prompt_tokens.sum(), r.output_tokens.sum()) == (100, 1_524_742, 36_758)
    assert r.tree is not None
    assert (len(r.tree.parent), (r.tree.parent == -1).sum()) == (2935, 1)
    assert workload.notes == ("100 requests came at 12 distinct times: those of one time spread evenly up to the next",)
    first, second = next(iter(r)), list(r)[1]
    assert first.prefix[0] == second.prefix[0] == (512, 0)
    assert first.prefix[-1] == (6758, 13)  # 14 blocks, the last one cut where the prompt ends
    assert {node for _, node in first.prefix} & {node for _, node in second.prefix} == {0}


def test_vtc_sample() -> None:
    workload = vtc.load(DATA / "vtc_arena_sample.jsonl")
    r = workload.requests
    assert (len(r), r.prompt_tokens.sum(), r.output_tokens.sum()) == (150, 20_325, 34_496)
    assert len(workload.adapter_names) == 17
    assert workload.adapter_names[:2] == ("dummy-lora-7b-rank-8-13", "dummy-lora-7b-rank-8-2")
    assert r.adapter[:5].tolist() == [1, 2, 3, 4, 3]
    assert r.arrival_s[-1] == 59.59149372379781


def test_functions_2019_sample() -> None:
    counts = azure_functions.load_counts(DATA / "azure_functions_2019_sample.csv")
    per_function = counts.counts.sum(axis=1)
    assert (counts.counts.shape, counts.first_minute) == ((40, 120), 480)
    assert (per_function.sum(), per_function.max(), (per_function > 0).sum()) == (39_862, 23_945, 34)


def test_functions_2021_sample() -> None:
    path = DATA / "azure_functions_2021_sample.csv"
    arrival, function, names = azure_functions.load_invocations(path)
    assert (len(arrival), len(function), len(names)) == (199, 199, 31)
    _, starts = ends_and_arrivals(path)
    assert arrival[-1] == starts[-1] - starts[0]


# What the formats mean, on made-up files

BURST = ",".join(burstgpt.HEADER) + "\n"
BLOCKS = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'
RESPONSE = {"adapter_dir": "a", "prompt_len": 3, "output_len": 4, "req_time": 0.5}
COUNTED = "HashOwner,HashApp,HashFunction,Trigger,1,2\no,a,f,http,0,3\n"
INVOKED = "app,func,end_timestamp,duration\na,f,1.5,0.5\n"


def responses(*changes: dict[str, Any]) -> str:
    return json.dumps({"config": {}, "result": {"responses": [RESPONSE | change for change in changes]}}) + "\n"


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_burstgpt_on_a_made_up_file(tmp_path: Path) -> None:
    """BurstGPT's own files could not be had: these rows are made up after its documented format."""
    rows = (
        "3,ChatGPT,9,0,9,Conversation log\n5,ChatGPT,472,18,490,Conversation log\n5,GPT-4,10,0,10,API log\n"
        "45.5,GPT-4,1087,230,1317,API log\n45.5,ChatGPT,417,276,693,Conversation log\n"
    )
    workload = burstgpt.load(written(tmp_path / "t.csv", BURST + rows))
    r = workload.requests
    assert r.arrival_s.tolist() == [0, 40.5, 40.5]
    assert (r.prompt_tokens.tolist(), r.output_tokens.tolist()) == ([472, 1087, 417], [18, 230, 276])
    assert (workload.adapter_names, r.adapter.tolist()) == ((), [BASE] * 3)
    assert workload.notes == (
        "2 of 5 requests failed (no response tokens): left out",
        "Model is a chat model, no adapter: all requests are for the base model (ChatGPT 2, GPT-4 1)",
    )


def mooncake_file(path: Path, *rows: tuple[int, int, list[int]]) -> Path:
    keys = mooncake.KEYS
    lines = (json.dumps(dict(zip(keys, (t, n, 7, ids), strict=True))) for t, n, ids in rows)
    return written(path, "\n".join(lines) + "\n")


@pytest.mark.parametrize(("spread", "arrival"), [(True, [0, 1, 2, 3, 4, 5]), (False, [0, 0, 0, 3, 3, 5])])
def test_mooncake_clock(tmp_path: Path, spread: bool, arrival: list[float]) -> None:
    file = mooncake_file(tmp_path / "t.jsonl", *((t, 1, [0]) for t in (9000, 9000, 9000, 12000, 12000, 14000)))
    assert mooncake.load(file, spread=spread).requests.arrival_s.tolist() == arrival


def test_mooncake_last_time_is_spread_over_the_gap_before_it(tmp_path: Path) -> None:
    file = mooncake_file(tmp_path / "t.jsonl", (0, 1, [0]), (3000, 1, [0]), (3000, 1, [0]))
    assert mooncake.load(file).requests.arrival_s.tolist() == [0, 3, 4.5]
    one = mooncake_file(tmp_path / "one.jsonl", (7, 1, [0]), (7, 1, [0]))
    together = mooncake.load(one)
    assert together.requests.arrival_s.tolist() == [0, 0]
    assert together.notes == ("2 requests came at 1 distinct times: those of one time come together",)


def test_mooncake_nodes_are_paths_not_ids(tmp_path: Path) -> None:
    file = mooncake_file(tmp_path / "t.jsonl", (0, 1024, [5, 6]), (1, 513, [7, 6]), (2, 1500, [5, 6, 6]))
    r = mooncake.load(file).requests
    assert r.tree is not None
    assert r.tree.parent.tolist() == [-1, 0, -1, 2, 1]
    assert r.tree.end_tokens.tolist() == [512, 1024, 512, 1024, 1536]
    assert r.prefix_id.tolist() == [1, 3, 4]
    assert r.prefix_tokens.tolist() == [1024, 513, 1500]


def test_vtc_sorts_stably_and_says_so(tmp_path: Path) -> None:
    late = [{"req_time": 2, "adapter_dir": "z"}, {"req_time": 1, "prompt_len": 8}, {"req_time": 1, "prompt_len": 9}]
    workload = vtc.load(written(tmp_path / "t.jsonl", responses(*late)))
    assert workload.requests.prompt_tokens.tolist() == [8, 9, 3]
    assert workload.adapter_names == ("a", "z")
    assert workload.notes == ("1 of 3 requests came before the one above them: sorted by req_time",)


def test_functions_get_names_of_their_own(tmp_path: Path) -> None:
    text = "HashFunction,HashApp,HashOwner,minute_5\nf,a,o,1\ng,a,o,2\nf,b,o,3\n"
    counts = azure_functions.load_counts(written(tmp_path / "t.csv", text))
    assert counts.names == ("o/a/f", "g", "o/b/f")
    assert (counts.counts.tolist(), counts.first_minute) == ([[1], [2], [3]], 5)


def test_invocations_come_in_order_of_arrival(tmp_path: Path) -> None:
    text = "app,func,end_timestamp,duration\na,f,9,1\nb,f,10,5\na,f,11,0\n"
    arrival, function, names = azure_functions.load_invocations(written(tmp_path / "t.csv", text))
    assert (arrival.tolist(), function.tolist(), names) == ([0, 3, 6], [0, 1, 1], ("b/f", "a/f"))


# One sentence for a bad row: what, where, what would be right


def bad(loader: Callable[[Path], object], *cases: tuple[str, str]) -> list[Any]:
    name = f"{loader.__module__.rsplit('.', 1)[1]}.{loader.__name__}"
    return [pytest.param(loader, text, says, id=f"{name}-{i}") for i, (text, says) in enumerate(cases)]


def burst_rows(*rows: str) -> str:
    return BURST + "".join(f"{row},API log\n" for row in rows)


def block(**change: Any) -> str:
    return BLOCKS + json.dumps(json.loads(BLOCKS) | change) + "\n"


WHOLE = "must be a whole number >= "
CASES = [
    *bad(
        mooncake.load,
        ("", "t: an empty file, must be a Mooncake trace with at least one request"),
        (BLOCKS + "{\n", "t:2: not JSON (*), must be one object a line"),
        (BLOCKS + "[1]\n", "t:2: is a JSON list, must be an object"),
        (
            '\n{"timestamp": 0}\n',
            "t:2: keys missing: ['input_length', 'output_length', 'hash_ids'], unknown: []; must*",
        ),
        (block(chat_id=1), "t:2: keys missing: [], unknown: ['chat_id']; must be timestamp, input_length, *"),
        (block(timestamp=-1), f"t:2: timestamp is -1, {WHOLE}0*"),
        (block(timestamp=True), f"t:2: timestamp is True, {WHOLE}0*"),
        (block(timestamp=1.0), f"t:2: timestamp is 1.0, {WHOLE}0*"),
        (block(timestamp=float("nan")), f"t:2: timestamp is nan, {WHOLE}0*"),
        (block(output_length=0), f"t:2: output_length is 0, {WHOLE}1*"),
        (block(input_length=2**31), f"t:2: input_length is 2147483648, {WHOLE}1 and < 2147483648"),
        (block(input_length=513.5), f"t:2: input_length is 513.5, {WHOLE}1*"),
        (block(hash_ids=[0]), "t:2: hash_ids has 1 ids, must be a list of 2, one per 512 tokens of input_length"),
        (block(hash_ids="ab"), "t:2: hash_ids is ab, must be a list of 2, *"),
        (block(hash_ids=[0, "b"]), f"t:2: hash_ids[1] is b, {WHOLE}0*"),
        (block(timestamp=5) + BLOCKS, "t:3: timestamp is before the row above, rows must be in arrival order"),
    ),
    *bad(
        burstgpt.load,
        ("", "t: an empty file, must be a BurstGPT trace with at least one row"),
        (BURST, "t: a header and no rows, must be a BurstGPT trace with at least one row"),
        ("Timestamp,Model\n0,x\n", f"t:1: columns are Timestamp,Model, must be {BURST.strip()}"),
        (burst_rows("1,m,2,3"), "t:2: 5 fields, must be 6"),
        (burst_rows("1,m,2,3,5", "nan,m,2,3,5"), "t:3: Timestamp is 'nan', must be a number of seconds >= 0"),
        (burst_rows("inf,m,2,3,5"), "t:2: Timestamp is 'inf', must be a number of seconds >= 0"),
        (burst_rows("-1,m,2,3,5"), "t:2: Timestamp is '-1', must be a number of seconds >= 0"),
        (burst_rows("1_0,m,2,3,5"), "t:2: Timestamp is '1_0', must be a number of seconds >= 0"),
        (burst_rows("2,m,2,3,5", "1,m,2,0,2"), "t:3: Timestamp is before the row above, rows must be in arrival order"),
        (burst_rows("1,m,2.5,3,5"), f"t:2: Request tokens is '2.5', {WHOLE}0*"),
        (burst_rows("1,m,2,-3,5"), f"t:2: Response tokens is '-3', {WHOLE}0*"),
        (burst_rows("1,m,2,3,"), f"t:2: Total tokens is '', {WHOLE}0*"),
        (burst_rows("1,m,2,3,6"), "t:2: Total tokens is 6, must be the sum 5"),
        (burst_rows("1,m,0,3,3"), "t:2: Request tokens is 0, must be >= 1 where there is a response"),
        (burst_rows("1,,2,3,5"), "t:2: Model is empty, must name a model"),
        (burst_rows("1,m,2,0,2"), "t: none of its 1 rows has response tokens, at least one must"),
        (BURST + '1,"m,2,3,5,log\n', "t: cannot be read (*), must be CSV in UTF-8"),
    ),
    *bad(
        vtc.load,
        ("\n", "t: an empty file, must be a VTC results file with at least one request"),
        (responses({}) * 2, "t:2: a second JSON line, a VTC results file must have one"),
        ('{"config": {}}\n', "t: result.responses is missing or empty, must be a list of requests"),
        (responses(), "t: result.responses is missing or empty, must be a list of requests"),
        ('{"result": {"responses": [3]}}', "t: result.responses[0]: must be an object with adapter_dir, *; got 3"),
        (responses({}, {"adapter_dir": None}), "t: result.responses[1]: adapter_dir is 'None', must be a name"),
        (responses({}, {"prompt_len": True}), f"t: result.responses[1]: prompt_len is True, {WHOLE}1*"),
        (responses({"output_len": 0}), f"t: result.responses[0]: output_len is 0, {WHOLE}1*"),
        *(
            (responses({"req_time": value}), f"t: result.responses[0]: req_time is {value}, must be a number of seco*")
            for value in (-0.5, float("nan"), float("inf"), "1", False)
        ),
    ),
    *bad(
        azure_functions.load_counts,
        ("", "t: an empty file, must be an Azure Functions 2019 trace with at least one row"),
        ("HashOwner,HashApp,HashFunction,1\n", "t: a header and no rows, must be an Azure Functions 2019 trace with *"),
        ("HashOwner,HashFunction,1\no,f,1\n", "t:1: id columns are *, must be HashOwner, HashApp, HashFunction (and *"),
        (COUNTED.replace(",1,2", ",1,3"), "t:1: column '3', must be consecutive minutes (1, 2, … or minute_1, …) *"),
        (COUNTED.replace(",1,2", ",first,2"), "t:1: column 'first', must be consecutive minutes *"),
        ("HashOwner,HashApp,HashFunction\no,a,f\n", "t:1: no minute columns, must be consecutive minutes *"),
        (COUNTED + "o,a,g,http,1\n", "t:3: 5 fields, must be 6"),
        (COUNTED + "o,a,g,http,1,2,3\n", "t:3: 7 fields, must be 6"),
        (COUNTED + "o,a,,http,1,2\n", "t:3: HashFunction is empty, must be an id"),
        (COUNTED + "o,a,f,timer,1,2\n", "t:3: the same function as in line 2, must be one row each"),
        *(
            (COUNTED + f"o,a,g,http,1,{value}\n", f"t:3: column 2 is '{value}', {WHOLE}0*")
            for value in ("-1", "1.5", "nan", "", "1e3", "²", "9999999999")
        ),
    ),
    *bad(
        azure_functions.load_invocations,
        ("", "t: an empty file, must be an Azure Functions 2021 trace with at least one row"),
        ("app,func,end_timestamp,duration\n", "t: a header and no rows, must be an Azure Functions 2021 trace *"),
        ("app,func,duration\na,f,1\n", "t:1: columns are app,func,duration, must be app,func,end_timestamp,duration"),
        (INVOKED + "a,f,1\n", "t:3: 3 fields, must be 4"),
        (INVOKED + "a,,1,1\n", "t:3: func is empty, must be an id"),
        (INVOKED + "a,f,inf,1\n", "t:3: end_timestamp is 'inf', must be a number of seconds >= 0"),
        (INVOKED + "a,f,1,-1\n", "t:3: duration is '-1', must be a number of seconds >= 0"),
    ),
]


def says_exactly(path: Path, says: str, message: str) -> None:
    """`*` stands for any text, and the `t` at the beginning for the file."""
    assert message.startswith(str(path))
    rest = message.removeprefix(str(path))
    for i, part in enumerate(says.removeprefix("t").split("*")):
        at = rest.find(part)
        assert at == 0 if i == 0 else at >= 0, message
        rest = rest[at + len(part) :]
    assert says.endswith("*") or not rest, message


@pytest.mark.parametrize(("loader", "text", "says"), CASES)
def test_bad_rows(tmp_path: Path, loader: Callable[[Path], object], text: str, says: str) -> None:
    path = written(tmp_path / "t", text)
    with pytest.raises(WorkloadError) as error:
        loader(path)
    says_exactly(path, says, str(error.value))


LOADERS = [mooncake.load, burstgpt.load, vtc.load, azure_functions.load_counts, azure_functions.load_invocations]


@pytest.mark.parametrize("loader", LOADERS)
def test_files_that_cannot_be_read(tmp_path: Path, loader: Callable[[Path], object]) -> None:
    with pytest.raises(WorkloadError, match=r"none: no such file; workload\.path must name an? \w+"):
        loader(tmp_path / "none")
    (tmp_path / "t").write_bytes(b"\xff\xfe")
    with pytest.raises(WorkloadError, match=r"t: cannot be read \(.*\), must be .* in UTF-8"):
        loader(tmp_path / "t")


# Functions onto adapters and minutes


@given(
    counts=hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 20)),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_drawn_arrivals_conserve_counts(counts: np.ndarray, seed: int, data: st.DataObject) -> None:
    functions, width = counts.shape
    start = data.draw(st.integers(0, width - 1))
    minutes = data.draw(st.none() | st.integers(1, width - start))
    table = azure_functions.Counts(tuple(map(str, range(functions))), counts, first_minute=480)
    arrival, function = azure_functions.draw_arrivals(table, np.random.default_rng(seed), start, minutes)
    want = counts[:, start : width if minutes is None else start + minutes]
    got = np.zeros_like(want)
    np.add.at(got, (function, (arrival // 60).astype(int)), 1)
    assert (got == want).all()
    assert (np.diff(arrival) >= 0).all()


@given(
    functions=hnp.arrays(np.int64, st.integers(0, 60), elements=st.integers(0, 40)),
    adapters=st.none() | st.integers(1, 12),
)
@settings(deadline=None, max_examples=60)
def test_fold_conserves_counts(functions: np.ndarray, adapters: int | None) -> None:
    adapter, note = azure_functions.fold(functions, adapters)
    size = 41 if adapters is None else adapters
    want = np.zeros(size, dtype=np.int64)
    for f, count in enumerate(np.bincount(functions, minlength=41)):
        want[f % size] += count
    assert (np.bincount(adapter, minlength=size + 1)[1:] == want).all()
    assert adapter.dtype == np.int64
    assert ("of its own" if adapters is None else "AlpaServe") in note


def test_a_draw_just_below_the_next_minute_stays_in_its_own() -> None:
    class Highest:
        def random(self, size: int) -> np.ndarray:
            return np.full(size, np.nextafter(1.0, 0))

    counts = azure_functions.Counts(("f",), np.ones((1, 480), dtype=np.int64), 0)
    arrival, _ = azure_functions.draw_arrivals(counts, Highest())  # type: ignore[arg-type]
    assert (arrival // 60).tolist() == list(range(480))


@pytest.mark.parametrize(("start", "minutes"), [(-1, 1), (0, 0), (2, None), (1, 2)])
def test_minutes_that_are_not_there(start: int, minutes: int | None) -> None:
    counts = azure_functions.Counts(("f",), np.ones((1, 2), dtype=np.int64), 0)
    with pytest.raises(WorkloadError, match="are asked for, must be some within 0 to 2"):
        azure_functions.draw_arrivals(counts, np.random.default_rng(0), start, minutes)


@pytest.mark.parametrize("adapters", [0, -3, True])
def test_fold_needs_an_adapter(adapters: int) -> None:
    with pytest.raises(WorkloadError, match=f"onto 1 adapter or more, not {adapters}"):
        azure_functions.fold(np.zeros(1, dtype=np.int64), adapters)
