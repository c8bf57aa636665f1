"""What load generators read: each function writes a workload to `partial`, which will become `out`, and returns notes.

`vllm`: JSONL of `prompt` and `output_tokens` for `vllm bench serve --dataset-name custom`, which leaves other fields
alone (vllm-project/vllm, `vllm/benchmarks/datasets/datasets.py`, `CustomDataset`).

`sglang`: JSONL of `prompt, output_len, timestamp, extra_request_body` for `sglang.bench_serving --dataset-name
autobench` (sgl-project/sglang, `benchmark/datasets/autobench.py`, `bench_serving.py`). Of SGLang's formats only this one
keeps arrivals, lengths and adapters: `custom` is shuffled and has no arrivals, and of `mooncake` SGLang makes 128 words
a block, whatever `input_length` says.

`mooncake`: JSONL of `timestamp, input_length, output_length, hash_ids`, for aiperf's `mooncake_trace` and for `vllm
bench serve --dataset-name timed_trace` (vllm-project/vllm, pull request 39795).

`inference-perf`: the Azure CSV for load type `trace_replay`, format AzurePublicDataset (kubernetes-sigs/inference-perf,
`inference_perf/utils/trace_reader.py`; older releases read hundredths of a second).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from workloads.errors import WorkloadError
from workloads.requests import BASE, NO_PREFIX, Request
from workloads.traces.mooncake import BLOCK_TOKENS
from workloads.workload import Workload

WORD = " hi"
"""A text that common tokenizers read as one token."""

APPROXIMATE = (
    f"prompts are synthetic text of one {WORD.strip()!r} a token: their token counts are about right, not exact"
)


def prompt_text(request: Request) -> str:
    """About `prompt_tokens` tokens; requests that share a beginning (and nothing else) begin with the same text."""
    parts, begun = [], 0
    for end, node in request.prefix:
        end = min(end, request.prompt_tokens)  # noqa: PLW2901 a session's beginning goes on through the output
        parts.append(_words(f"p{node}", end - begun))
        begun = max(begun, end)
    parts.append(_words(f"r{request.request_id}", request.prompt_tokens - begun))
    return "".join(parts)


def _words(mark: str, tokens: int) -> str:
    """`tokens` words, the first of them `mark`, which tells one text from another."""
    return f" {mark}" + WORD * (tokens - 1) if tokens > 0 else ""


def _notes(workload: Workload, *, adapters: str = "", arrivals: str = "", texts: bool = False) -> tuple[str, ...]:
    """What a format cannot hold of `workload`: `adapters` and `arrivals` say it of those, if it applies."""
    r = workload.requests
    notes = [APPROXIMATE] if texts else []
    if texts and (r.prefix_tokens > r.prompt_tokens).any():
        notes.append("earlier answers in later prompts are synthetic too: a server cannot reuse what it generated")
    if adapters and (r.adapter != BASE).any():
        notes.append(adapters)
    if arrivals:
        notes.append(arrivals)
    elif r.arrival_s[0] > 0:
        notes.append("load generators begin with the first request: arrivals count from it")
    if r.priority.any():
        notes.append("the format has no priorities: they are lost")
    return tuple(notes)


def json_line(row: object) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _lines(workload: Workload, partial: Path, row: Callable[[Request], object]) -> None:
    with partial.open("w", encoding="utf-8") as file:
        for request in workload.requests:
            file.write(json_line(row(request)))


def vllm(workload: Workload, out: Path, partial: Path) -> tuple[str, ...]:
    if out.suffix != ".jsonl":
        raise WorkloadError(f"{out}: must be .jsonl, vLLM reads no other custom dataset")
    names = ("", *workload.adapter_names)

    def row(request: Request) -> object:
        text, adapter = prompt_text(request), names[request.adapter]
        return {"prompt": text, "output_tokens": request.output_tokens, "adapter": adapter}

    _lines(workload, partial, row)
    flags = "--custom-output-len -1 --disable-shuffle --skip-chat-template --ignore-eos"
    return (
        f"give --num-prompts {len(workload.requests)} {flags}",
        *_notes(
            workload,
            adapters="`adapter` is written for the reader: vLLM assigns --lora-modules at random or in turn",
            arrivals="the format has no arrival times: give the load generator a rate",
            texts=True,
        ),
    )


def sglang(workload: Workload, out: Path, partial: Path) -> tuple[str, ...]:
    del out
    names = ("", *workload.adapter_names)

    def row(request: Request) -> object:
        fields = {
            "prompt": prompt_text(request),
            "output_len": request.output_tokens,
            "timestamp": 1000 * request.arrival_s,
        }
        if request.adapter != BASE:
            fields["extra_request_body"] = {"lora_path": names[request.adapter]}
        return fields

    _lines(workload, partial, row)
    loaded = "adapters are asked for by name, in `lora_path`: load them into the server under these names"
    return (
        f"give --backend sglang --dataset-name autobench --num-prompts {len(workload.requests)} --use-trace-timestamps",
        *_notes(workload, adapters=loaded, texts=True),
    )


def mooncake(workload: Workload, out: Path, partial: Path) -> tuple[str, ...]:
    del out
    shared: dict[tuple[int, int], int] = {}
    made = 0

    def block(node: int | None, index: int) -> int:
        nonlocal made
        # A node stands for all that comes before it; a block that nobody can share needs no memory.
        number = made if node is None else shared.setdefault((node, index), made)
        made += number == made
        return number

    def row(request: Request) -> object:
        ids, pairs = [], list(reversed(request.prefix))
        for index in range(-(-request.prompt_tokens // BLOCK_TOKENS)):
            end = (index + 1) * BLOCK_TOKENS
            while pairs and pairs[-1][0] < end:
                pairs.pop()
            ids.append(block(pairs[-1][1] if pairs and end <= request.prompt_tokens else None, index))
        return {
            "timestamp": round(1000 * request.arrival_s),
            "input_length": request.prompt_tokens,
            "output_length": request.output_tokens,
            "hash_ids": ids,
        }

    _lines(workload, partial, row)
    flags = f"--self-timed --timed-trace-chunk-hash-size {BLOCK_TOKENS} --timed-trace-sec-multiplier 0.001"
    return (
        f"common beginnings are kept in whole blocks of {BLOCK_TOKENS} tokens, arrivals in whole milliseconds",
        f"for vLLM give --dataset-name timed_trace {flags}",
        *_notes(workload, adapters="the format has no adapter per request: adapters are lost"),
    )


EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
"""The moment that stands for arrival 0 where a format wants a date."""


def inference_perf(workload: Workload, out: Path, partial: Path) -> tuple[str, ...]:
    del out
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        for request in workload.requests:
            stamp = EPOCH + timedelta(microseconds=round(1e6 * request.arrival_s))
            writer.writerow([f"{stamp:%Y-%m-%d %H:%M:%S.%f}", request.prompt_tokens, request.output_tokens])
    shares = "the format has no adapter per request: give their shares as load.lora_traffic_split"
    notes = _notes(workload, adapters=shares)
    if (workload.requests.prefix_id != NO_PREFIX).any():
        notes = (*notes, "the format has no common beginnings: they are lost")
    how = (
        "give load.type trace_replay, data.type random, and the file as load.trace and data.trace (AzurePublicDataset)"
    )
    return (how, *notes)
