"""Trace loaders: the real slices to the digit, and one clear sentence for a bad row."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workloads.build import build_workload
from workloads.errors import WorkloadError
from workloads.traces import azure_llm, servegen
from workloads.traces import table as trace_table

DATA = Path(__file__).parents[1] / "workloads" / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "traces"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/traces is not here")


@needs_shared
@pytest.mark.parametrize("name", ["conv", "code"])
def test_azure_slices(name: str) -> None:
    key = f"azure_llm_2023/AzureLLMInferenceTrace_{name}.csv"
    facts = json.loads((SHARED / "expected.json").read_text())[key]
    arrival, prompt, output, *_ = azure_llm.load(SHARED / key).requests.columns()
    assert len(arrival) == facts["rows"]
    assert (prompt.sum(), output.sum()) == (facts["sum_context"], facts["sum_generated"])
    assert (prompt.max(), output.max()) == (facts["max_context"], facts["max_generated"])
    assert arrival[-1] == pytest.approx(facts["span_s"], abs=1e-6)


def test_azure_sample() -> None:
    arrival, prompt, *_ = azure_llm.load(DATA / "azure_conv_sample.csv").requests.columns()
    assert len(arrival) == 2867
    assert arrival[0] == 0
    assert arrival[-1] < 600
    assert prompt[:2].tolist() == [374, 396]


@needs_shared
@pytest.mark.parametrize("key", ["servegen/language/m-large", "servegen/reason/deepseek-r1"])
def test_servegen_slices(key: str) -> None:
    facts = json.loads((SHARED / "expected.json").read_text())[key]
    clients = servegen.load(SHARED / key)
    assert len(clients) == facts["clients"]
    assert {len(c.windows) for c in clients} == {facts["windows_per_client"]}
    starts = [w.start_s for c in clients for w in c.windows]
    assert (min(starts), max(starts)) == (facts["first_ts"], facts["last_ts"])
    requests = {c.client: sum(w.rate for w in c.windows) * 600 for c in clients}
    total = sum(requests.values())
    assert total == pytest.approx(facts["requests"], abs=1e-3)
    assert total / 600 / facts["windows_per_client"] == pytest.approx(facts["mean_total_rate"], abs=1e-6)
    assert sum(r > 0 for r in requests.values()) == facts["active_clients"]
    ranked = sorted(requests, key=requests.__getitem__, reverse=True)
    assert ranked[0] == facts["top1_client"]
    assert requests[ranked[0]] / total == pytest.approx(facts["top1_share"], abs=1e-5)
    active = [requests[c] for c in ranked if requests[c] > 0]
    assert sum(active[: -(-len(active) // 10)]) / total == pytest.approx(facts["top10pct_share"], abs=1e-5)
    patterns = Counter(w.pattern or "none" for c in clients for w in c.windows)
    assert dict(patterns) == facts["patterns"]
    bare = [c.client for c in clients if requests[c.client] > 0 and not c.lengths]
    assert bare == facts["active_without_any_lengths"]
    assert {start for c in clients for start, _, _ in c.lengths} <= set(facts["dataset_windows"])


def test_servegen_draws_each_window_as_often_as_it_says() -> None:
    clients = servegen.load(DATA / "servegen_m_large")
    arrival, prompt, output, adapter, notes = servegen.draw(clients, 0.0, 1200.0, 0.01, np.random.default_rng(0))
    expected = np.array([sum(w.rate * 600 * 0.01 for w in c.windows[:2]) for c in clients])
    assert np.abs(np.bincount(adapter, minlength=len(clients) + 1)[1:] - expected).max() <= 2
    assert (np.diff(arrival) >= 0).all()
    assert 0 <= arrival[0] <= arrival[-1] < 1200
    assert min(prompt.min(), output.min()) >= 1
    assert [n.split()[1] for n in notes] == ["73", "120"]
    one = next(i for i, c in enumerate(clients, start=1) if c.lengths and (adapter == i).sum() > 20)
    assert set(prompt[adapter == one]) <= {max(1, t) for t in clients[one - 1].lengths[0][1]}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("TIMESTAMP,ContextTokens\n", r"t\.csv:1"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,3,4\n2023-11-16 18:15:45.0,3,4",
            r"t\.csv:3: TIME",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,3,x", r"t\.csv:2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,3,-1", r"t\.csv:2: GeneratedTokens is '-1'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,3,0", r"t\.csv: no row has prompt and output"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,3", r"t\.csv:2: 2 fields"),
    ],
)
def test_bad_azure_rows(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        azure_llm.load(write(tmp_path / "t.csv", text))


def test_azure_rows_without_tokens_are_left_out_and_offsets_read(tmp_path: Path) -> None:
    rows = [
        "2024-05-10 00:00:00.009930+00:00,2162,5",
        "2024-05-10 00:00:00.5+00:00,7,0",
        "2024-05-10 00:00:01.009930+00:00,9,1",
    ]
    workload = azure_llm.load(write(tmp_path / "t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows)))
    assert workload.requests.arrival_s.tolist() == [0.0, 1.0]
    assert workload.notes == ("1 of 3 rows have no prompt or no output tokens: left out",)


HEADER = "arrival_s,prompt_tokens,output_tokens,adapter\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arrival_s,prompt_tokens,adapter\n0,1,a\n", r"missing: \['output_tokens'\]"),
        (HEADER + "1,5,5,a\n0.5,5,5,b\n", r"t\.csv:3: arrival_s is before"),
        (HEADER + "1,5,5,a\n2,-5,5,b\n", r"t\.csv:3: prompt_tokens is -5"),
        (HEADER + "1,5,,a\n", r"t\.csv:2: output_tokens"),
        (HEADER.strip() + ",colour\n1,5,5,a,red\n", "unknown: .*colour"),
    ],
)
def test_bad_table_rows(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        trace_table.load(write(tmp_path / "t.csv", text))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_the_table_in_every_format(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame(
        {
            "arrival_s": [0.0, 0.5, 0.5],
            "prompt_tokens": [3, 4, 5],
            "output_tokens": [1, 2, 3],
            "adapter": ["b", None, "a"],
        }
    )
    path = tmp_path / f"t.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False)
    elif suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    workload = build_workload({"kind": "table", "path": path.name}, adapter_count=None, seed=0, base_dir=tmp_path)
    assert workload.adapter_names == ("b", "a")
    assert workload.requests.adapter.tolist() == [1, 0, 2]
    assert workload.requests.prompt_tokens.tolist() == [3, 4, 5]


def test_a_table_with_common_beginnings(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    head = "arrival_s,prompt_tokens,output_tokens,adapter,prefix_id,prefix_tokens\n"
    file.write_text(head + "0,10,5,a,chat,8\n1,10,5,,,\n2,10,5,a,007,4\n3,10,5,b,chat,10\n".replace(",,,\n", ",,,0\n"))
    requests, _ = trace_table.load(file)
    assert requests.prefix_id.tolist() == [0, -1, 1, 0]
    assert requests.prefix_tokens.tolist() == [8, 0, 4, 10]


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("prefix_id", "x", "t.csv:1: prefix_id and prefix_tokens must both be there, or neither"),
        ("prefix_id,prefix_tokens", "x,16", "t.csv:2: prefix_tokens must be <= prompt_tokens"),
        ("prefix_id,prefix_tokens", "x,-1", "t.csv:2: prefix_tokens is -1, must be a whole number >= 0"),
    ],
)
def test_beginnings_that_cannot_be(tmp_path: Path, header: str, row: str, message: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text(f"arrival_s,prompt_tokens,output_tokens,adapter,{header}\n0,10,5,a,{row}\n")
    with pytest.raises(WorkloadError, match=message):
        trace_table.load(file)
