"""`python -m benchmarks.conformance FILE.json.gz …`: does the simulator decide as the real vLLM did, step for step.

FILE: a recorded log (`vllm-lora-sched-golden/1`, plain or gzipped JSON) of vLLM's scheduler and LoRA managers. Its
configuration and trace are simulated anew, and each step compared in full: tokens of each request, admissions,
preemptions, skips, free blocks, adapter loads and evictions, finishes, queue order. Prints steps and differences of
each file and the first difference; exits 1 if there is any, 2 if a file cannot be used.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sim.adapter_manager import AdapterManager, PlainAdapterManager
from sim.config import EngineConfig
from sim.errors import AdapterError, ScenarioError
from sim.kv_cache import BlockPool
from sim.scheduler import Scheduler, StepPlan
from sim.state import RequestState
from workloads.requests import BASE, Request

FORMAT = "vllm-lora-sched-golden/1"
EVENTS = {"stage": "load", "keep": "cpu+", "drop": "cpu-", "load": "gpu+", "evict": "gpu-"}
RENAMED = {"policy": "scheduling_policy"}
COPIED = (
    "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "long_prefill_token_threshold",
    "enable_prefix_caching", "enable_chunked_prefill", "policy", "async_scheduling", "scheduler_reserve_full_isl",
    "watermark",
)  # fmt: skip
Row = dict[str, Any]


class LogError(ValueError):
    """A file that is no log of this schema."""


def read_log(file: Path) -> Row:
    """The log in `file`. Raises `LogError`."""
    try:
        raw = file.read_bytes()
        log = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (OSError, EOFError, ValueError) as error:
        raise LogError(f"{file}: not a readable JSON or gzipped JSON file ({error})") from error
    if not isinstance(log, dict) or log.get("format") != FORMAT or log.get("kind") not in REPLAY:
        raise LogError(f"{file}: not a log with format {FORMAT} and kind {' or '.join(REPLAY)}")
    return log


def events(manager: AdapterManager) -> list[list[object]]:
    """The manager's moves since the last call, as the log writes them."""
    return [[EVENTS[m.kind], m.adapter] + ([m.slot] if m.slot >= 0 else []) for m in manager.take()]


def slots(manager: AdapterManager) -> list[int]:
    """The adapter of each GPU slot, 0 = empty."""
    at = {slot: adapter for adapter, slot in manager.slots.items()}
    return [at.get(slot, 0) for slot in range(manager.max_loras)]


class ScheduleReplay:
    """The engine loop around scheduler and manager, on a clock that counts steps (`EngineCore.step` and its async form)."""

    def __init__(self, log: Row) -> None:
        c = log["config"]
        self.log = log
        self.order: str = c["lora_order"]
        self.lora: bool = c["enable_lora"]
        settings = {RENAMED.get(key, key): c[key] for key in COPIED}
        if self.lora:
            settings |= {"max_loras": c["max_loras"], "max_cpu_loras": c["max_cpu_loras"]}
        self.config = EngineConfig(**settings)
        self.pool = BlockPool(c["num_blocks"], c["block_size"], prefix_caching=c["enable_prefix_caching"])
        self.scheduler = Scheduler(self.config, self.pool)
        self.manager = AdapterManager(self.config.max_loras, self.config.host_loras)
        for adapter in c.get("static_loras", []):
            self.manager.bring(adapter)
        self.manager.take()
        self.requests = [self._request(i, row) for i, row in enumerate(log["trace"]["requests"])]
        self.aborts: list[list[int]] = sorted(log["trace"].get("aborts", []), key=lambda a: a[0])
        self.states: dict[int, RequestState] = {}
        self.in_flight: StepPlan | None = None
        self.totals = dict.fromkeys(
            ("steps", "tokens", "preemptions", "skips", "finished", "cached_tokens", "lora_loads", "lora_activations"),
            0,
        )

    def _request(self, index: int, row: list[int]) -> Request:
        step, prompt, output, adapter, priority, group, shared = row
        # Queue order is by row where the log's arrival times are row numbers; `Request` wants them in order anyhow.
        at = step if self.log["config"]["arrival_time"] == "step" else index
        shared = min(shared, prompt)
        prefix = ((shared, group),) if group >= 0 < shared else ()
        return Request(index, float(at), prompt, output, adapter if self.lora else BASE, priority, prefix)

    def rows(self) -> Iterator[Row]:
        """One row per step, with the log's keys; empty lists are left out."""
        arrival_steps = [row[0] for row in self.log["trace"]["requests"]]
        clock, arrived = 0, 0
        while True:
            if not self._busy():
                if arrived == len(arrival_steps):
                    return
                clock = max(clock, arrival_steps[arrived])
            while arrived < len(arrival_steps) and arrival_steps[arrived] <= clock:
                self._arrive(arrived)
                arrived += 1
            aborted = self._abort(clock)
            if self._busy():
                yield {key: value for key, value in self._step(clock, aborted).items() if value != []}
                clock += 1

    def _busy(self) -> bool:
        in_flight = self.in_flight is not None and bool(self.in_flight.scheduled)
        return in_flight or any(True for _ in self.scheduler.unfinished())

    def _arrive(self, index: int) -> None:
        request = self.requests[index]
        if request.prompt_tokens < self.config.max_model_len:
            limit = min(request.output_tokens, self.config.max_model_len - request.prompt_tokens)
            self.states[index] = RequestState(request, limit)
            self.scheduler.add(self.states[index])

    def _abort(self, clock: int) -> list[int]:
        aborted = []
        while self.aborts and self.aborts[0][0] <= clock:
            state = self.states.get(self.aborts.pop(0)[1])
            if state is not None and not state.done:
                self.scheduler.abort(state)
                aborted.append(state.request.request_id)
        return aborted

    def _step(self, clock: int, aborted: list[int]) -> Row:
        plan = self.scheduler.schedule()
        free, running = self.pool.free, list(self.scheduler.running)
        active = {item.state.request.request_id for item in plan.scheduled}
        adapters = self._apply(plan)
        lev = events(self.manager)
        if self.config.async_scheduling:
            landed, self.in_flight = self.in_flight, plan
        else:
            landed = plan
        finished = self.scheduler.update(landed) if landed else []
        row: Row = {
            "k": self.totals["steps"],
            "t": clock,
            "run": [[i.state.request.request_id, i.tokens] for i in plan.running],
            "adm": [[i.state.request.request_id, i.tokens, i.found, int(i.resumed)] for i in plan.admitted],
            "pre": ids(plan.preempted),
            "skip": ids(plan.skipped),
            "idle": [i for i in ids(running) if i not in active],
            "free": [free, self.pool.free],
            "held": sorted({s.adapter for s in running} - {BASE}),
            "lora": adapters,
            "lev": lev,
            "slots": slots(self.manager) if lev else [],
            "cpu": list(self.manager.host.entries) if lev else [],
            "fin": ids(finished),
            "abort": aborted,
            "nrun": len(self.scheduler.running),
            "nwait": len(self.scheduler.waiting),
            "wait": ids(list(self.scheduler.waiting)),
        }
        self._count(plan, row)
        return row

    def _apply(self, plan: StepPlan) -> list[int]:
        """Bring the batch's adapters in, in the order that the log's `lora_order` says."""
        adapters = list(dict.fromkeys(i.state.adapter for i in plan.scheduled if i.state.adapter != BASE))
        if self.order == "id":
            adapters.sort()
        if self.order == "hashset":
            # vLLM iterates a Python set of adapters, whose order is that run's own: only the log knows it.
            steps = self.log["steps"]
            seen = steps[self.totals["steps"]].get("lora", []) if self.totals["steps"] < len(steps) else []
            adapters.sort(key=lambda a: seen.index(a) if a in seen else len(seen))
        self.manager.apply(adapters)
        return adapters

    def _count(self, plan: StepPlan, row: Row) -> None:
        kinds = [event[0] for event in row["lev"]]
        for key, value in (
            ("steps", 1), ("tokens", plan.tokens), ("preemptions", len(plan.preempted)), ("skips", len(plan.skipped)),
            ("finished", len(row["fin"])), ("cached_tokens", sum(i.found for i in plan.admitted)),
            ("lora_loads", kinds.count("load")), ("lora_activations", kinds.count("gpu+")),
        ):  # fmt: skip
            self.totals[key] += value

    def summary(self) -> Row:
        """The totals and final states, as the log's `summary`."""
        final = {"final_slots": slots(self.manager), "final_cpu_lru": list(self.manager.host.entries)}
        return {**self.totals, **final, "final_gpu_lru": list(self.manager.gpu.entries)}


def ids(states: list[RequestState]) -> list[int]:
    """Request ids."""
    return [state.request.request_id for state in states]


def replay_schedule(log: Row) -> Iterator[tuple[str, Row, Row]]:
    """(where, the log's row, the row simulated) of every step, and of the rejections and the summary."""
    replay = ScheduleReplay(log)
    simulated, recorded = replay.rows(), iter(log["steps"])
    for k, row in enumerate(recorded):
        here = next(simulated, {})
        if row.get("nosched"):  # nothing was scheduled, so the log has nothing of it
            here = {key: value for key, value in here.items() if key in row} | {"nosched": row["nosched"]}
        yield f"step {k}", row, here
    for here in simulated:
        yield "after the last step of the log", {}, here
    limit = replay.config.max_model_len
    rejected = [r.request_id for r in replay.requests if r.prompt_tokens >= limit]
    yield "rejected", {"rejected": log.get("rejected", [])}, {"rejected": rejected}
    if "summary" in log:
        here = replay.summary() if replay.lora else replay.totals
        # Whether adapters loaded before the start are counted in the totals is the recorder's affair.
        open_keys = ("lora_loads", "lora_activations") if log["config"].get("static_loras") else ()
        known = {key: value for key, value in log["summary"].items() if key in here and key not in open_keys}
        yield "summary", known, {key: here[key] for key in known}


def replay_manager(log: Row) -> Iterator[tuple[str, Row, Row]]:
    """(where, the log's entry, the entry simulated) of every operation; of an error only that there was one."""
    c = log["config"]
    kind = PlainAdapterManager if c.get("worker") == "plain" else AdapterManager
    manager = kind(c["max_loras"], c["max_cpu_loras"] or c["max_loras"])
    for i, entry in enumerate(log["log"]):
        yield f"operation {i} {entry['op']}", {**entry, "err": "err" in entry}, _operate(manager, entry["op"])


def _operate(manager: AdapterManager, op: list[Any]) -> Row:
    actions: Mapping[str, Callable[..., bool | None]] = {
        "apply": manager.apply, "add": manager.bring, "remove": manager.remove, "pin": manager.pin, "clear": manager.clear,
    }  # fmt: skip
    row: Row = {"op": op, "err": False}
    try:
        removed = actions[op[0]](*op[1:])
    except AdapterError:
        row["err"] = True
    else:
        # vLLM's `add_adapter` and `pin_adapter` return true whenever they do not raise.
        if op[0] in ("add", "pin", "remove"):
            row["ret"] = removed if op[0] == "remove" else True
    row["ev"] = events(manager)
    return row | {"slots": slots(manager), "cpu": list(manager.host.entries), "gpu": list(manager.gpu.entries)}


REPLAY = {"schedule": replay_schedule, "lora_manager": replay_manager}


def difference(where: str, log: Row, here: Row) -> str:
    """What differs between two rows, a line a key; empty if nothing does."""
    keys = [key for key in dict.fromkeys([*log, *here]) if log.get(key, []) != here.get(key, [])]
    lines = [
        f"  {key}\n    log  {json.dumps(log.get(key, []))}\n    here {json.dumps(here.get(key, []))}" for key in keys
    ]
    return "\n".join([where, *lines]) if lines else ""


def compare(log: Row) -> tuple[int, list[str]]:
    """Steps (or operations) compared, and the differences."""
    counted = len(log["steps"] if log["kind"] == "schedule" else log["log"])
    found = (difference(*triple) for triple in REPLAY[log["kind"]](log))
    return counted, [text for text in found if text]


def main(argv: list[str] | None = None) -> int:
    """Print the comparison of every file; 0 if all are equal, 1 if not, 2 for a file that is no such log."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.conformance", description=__doc__)
    flags.add_argument("files", nargs="+", type=Path, metavar="FILE.json.gz")
    total, different = 0, 0
    try:
        for file in flags.parse_args(argv).files:
            steps, differences = compare(read_log(file))
            print(f"{file.name}: {steps} steps, {len(differences)} differences")
            if differences:
                print(differences[0])
            total += steps
            different += len(differences)
    except (LogError, ScenarioError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError, IndexError, ValueError) as error:
        print(f"conformance: {file}: not of the schema {FORMAT}: {type(error).__name__} {error}", file=sys.stderr)
        return 2
    print(f"{total} steps, {different} differences")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
