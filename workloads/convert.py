"""The same traffic in other formats: the project's own table, and what load generators read.

`vllm`: JSONL of `prompt` and `output_tokens` for `vllm bench serve --dataset-name custom --custom-output-len -1`
(`vllm/benchmarks/datasets.py`, `CustomDataset`). `sglang`: JSONL of `conversations` for `sglang.bench_serving
--dataset-name custom` (`sglang/benchmark/datasets/custom.py`). `mooncake`: JSONL of `timestamp, input_length,
output_length, hash_ids`, for SGLang's `--dataset-name mooncake` and aiperf's `mooncake_trace`. `inference-perf`: the
Azure CSV for its `trace_replay` load, format AzurePublicDataset (`inference_perf/utils/trace_reader.py`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd

from workloads.errors import WorkloadError
from workloads.requests import BASE, NO_PREFIX, Request
from workloads.traces.mooncake import BLOCK_TOKENS
from workloads.workload import Workload

WORD = " hi"
"""A text that common tokenizers read as one token."""

APPROXIMATE = (
    f"prompts are synthetic text of one {WORD.strip()!r} a token: their token counts are about right, not exact"
)


def _table(workload: Workload, out: Path, partial: Path) -> tuple[str, ...]:
    r = workload.requests
    names = np.array(["", *workload.adapter_names], dtype=object)
    frame = pd.DataFrame({"arrival_s": r.arrival_s, "prompt_tokens": r.prompt_tokens, "output_tokens": r.output_tokens})
    frame["adapter"] = names[r.adapter]
    if r.priority.any():
        frame["priority"] = r.priority
    if (r.prefix_id != NO_PREFIX).any():
        if r.tree is None:
            ids = pd.Series(r.prefix_id.astype(str))
            frame["prefix_id"] = ids.where(r.prefix_id != NO_PREFIX, "")
            frame["prefix_tokens"] = r.prefix_tokens
        else:
            frame["prefix_path"] = [" ".join(f"{end}:{node}" for end, node in request.prefix) for request in r]
    if out.suffix == ".parquet":
        frame.to_parquet(partial, index=False)
    elif out.suffix == ".csv":
        frame.to_csv(partial, index=False, lineterminator="\n")
    elif out.suffix == ".jsonl":
        with partial.open("w", encoding="utf-8") as file:
            for row in frame.to_dict("records"):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        raise WorkloadError(f"{out}: a trace table must be .csv, .jsonl or .parquet")
    return ()


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


def _lost(workload: Workload, *, arrivals: bool, prefixes: bool) -> tuple[str, ...]:
    """What a format cannot hold of `workload`."""
    r = workload.requests
    notes = []
    if (r.adapter != BASE).any():
        notes.append("the format has no adapter per request: adapters are lost")
    if arrivals:
        notes.append("the format has no arrival times: give the load generator a rate")
    if prefixes and (r.prefix_id != NO_PREFIX).any():
        notes.append("the format has no common beginnings: they are lost")
    if r.priority.any():
        notes.append("the format has no priorities: they are lost")
    return tuple(notes)


def _lines(workload: Workload, partial: Path, row: Callable[[Request], object]) -> None:
    with partial.open("w", encoding="utf-8") as file:
        for request in workload.requests:
            file.write(json.dumps(row(request), ensure_ascii=False) + "\n")


def _vllm(workload: Workload, out: Path, partial: Path) -> tuple[str, ...]:
    del out
    names = ("", *workload.adapter_names)

    def row(request: Request) -> object:
        # vLLM reads the two fields it knows and leaves the others alone.
        return {
            "prompt": prompt_text(request),
            "output_tokens": request.output_tokens,
            "adapter": names[request.adapter],
        }

    _lines(workload, partial, row)
    lost = [note for note in _lost(workload, arrivals=True, prefixes=False) if "adapter" not in note]
    if (workload.requests.adapter != BASE).any():
        lost.append(
            "`adapter` is written for the reader: `vllm bench serve` itself assigns --lora-modules at random or in turn"
        )
    return (APPROXIMATE, "give --custom-output-len -1 --disable-shuffle --skip-chat-template", *lost)


def _sglang(workload: Workload, out: Path, partial: Path) -> tuple[str, ...]:
    del out

    def row(request: Request) -> object:
        answer = _words("a", request.output_tokens)
        return {"conversations": [{"content": prompt_text(request)}, {"content": answer}]}

    _lines(workload, partial, row)
    arrival = "`--to mooncake` keeps the arrivals, and prompts in whole blocks"
    return (APPROXIMATE, *_lost(workload, arrivals=True, prefixes=False), arrival)


def _mooncake(workload: Workload, out: Path, partial: Path) -> tuple[str, ...]:
    del out
    blocks: dict[tuple[int, ...], int] = {}

    def row(request: Request) -> object:
        keys = (_block(request, index) for index in range(-(-request.prompt_tokens // BLOCK_TOKENS)))
        ids = [blocks.setdefault(key, len(blocks)) for key in keys]
        stamp = round(1000 * request.arrival_s)
        return {
            "timestamp": stamp,
            "input_length": request.prompt_tokens,
            "output_length": request.output_tokens,
            "hash_ids": ids,
        }

    _lines(workload, partial, row)
    whole = f"common beginnings are kept in whole blocks of {BLOCK_TOKENS} tokens, arrivals in whole milliseconds"
    return (whole, *_lost(workload, arrivals=False, prefixes=False))


def _block(request: Request, index: int) -> tuple[int, ...]:
    """What identifies the tokens of a prompt's block, as for the KV cache."""
    end = min((index + 1) * BLOCK_TOKENS, request.prompt_tokens)
    whole = end == (index + 1) * BLOCK_TOKENS
    covering = next((node for upto, node in request.prefix if end <= upto), None)
    return (0, request.request_id, index) if covering is None or not whole else (1, covering, index)


EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
"""The moment that stands for arrival 0 where a format wants a date."""


def _inference_perf(workload: Workload, out: Path, partial: Path) -> tuple[str, ...]:
    del out
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        for request in workload.requests:
            stamp = EPOCH + timedelta(microseconds=round(1e6 * request.arrival_s))
            writer.writerow([f"{stamp:%Y-%m-%d %H:%M:%S.%f}", request.prompt_tokens, request.output_tokens])
    return _lost(workload, arrivals=False, prefixes=True)


TARGETS: Mapping[str, Callable[[Workload, Path, Path], tuple[str, ...]]] = {
    "table": _table,
    "vllm": _vllm,
    "sglang": _sglang,
    "mooncake": _mooncake,
    "inference-perf": _inference_perf,
}
"""Formats by name: each writes the workload to its third argument, which will become its second, and returns notes."""


def convert(workload: Workload, to: str, out: Path) -> tuple[str, ...]:
    """Write `workload` to `out` in the format `to`; notes say what it cannot hold. Nothing is left if that fails.

    Raises `WorkloadError` for an unknown format, an `out` that exists, or one that cannot be written.
    """
    if to not in TARGETS:
        raise WorkloadError(f"format {to}: unknown, must be one of {', '.join(TARGETS)}")
    if out.exists():
        raise WorkloadError(f"{out}: exists already; give another name")
    partial = out.with_name(f".{out.name}.partial")
    try:
        notes = TARGETS[to](workload, out, partial)
        partial.rename(out)
    except OSError as error:
        raise WorkloadError(f"{out}: cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return notes
