"""What is known of a model's servers (`published.Known`), from a tenth of its clean runs and from published micro-measurements.

Each round simulates the training runs with what is known so far. A run's mean ITL is then linear in the costs: the mean, over the
tokens that were decoded, of what their steps had, times what each costs. So are the steps of closed batches. Costs of the least
relative error go into the next round, until runs and costs agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from joblib import Parallel, delayed

from backend.errors import BackendError
from backend.from_runs import COSTS, Steps, closed_batches, first_use_s, load_s, multipliers, skipped_s
from sim.front_end import READ_EVERY_S, FloatArray, FrontEnd, merged_tokens, passage, sets_seen
from sim.published import Again, Known, made_again, seen_by_clients
from sim.published_load import ends_per_token

FIRST_GUESS = {
    "base_s": 0.012, "row_s": 1.9e-5, "request_s": 5e-6, "key_s": 6e-8, "lora_s": 5e-4, "adapter_s": 4e-4,
    "wide_adapter_s": 3.4e-4, "rank_s": 1e-4, "prompt_row_s": 3e-5, "idle_slot_s": 1e-5, "slot_tile_s": 1e-5,
    "eager_s": 0.005, "skipped_s": 0.0,
}  # fmt: skip
"""Where the search begins: orders of magnitude of a GPU of 2 to 3 TB/s."""

FRONT_GUESS = FrontEnd(0.0, 0.3, 0.0, 0.007, 1e-5, 2e-7)
ROUNDS = 3
STEP = 0.6
"""How far each round goes towards the costs that it finds."""

BATCHES_WEIGHT = 3.0
"""Closed batches, all together, count as so many runs."""

FREE = tuple(name for name in COSTS if name != "skipped_s")


@dataclass(frozen=True, slots=True)
class Summary:
    """One simulated run: `has`, what a decoded token's step had, by `FREE`; `other_s` of it that is not fitted; `single`: share of
    tokens that reached the client in a chunk of their own; sets and names that the metrics had on the mean; median TTFT and batch.
    """

    has: FloatArray
    other_s: float
    single: float
    itl_s: float
    sets: float
    names: float
    ttft_ms: float
    batch: float


def known_of(
    rows: pd.DataFrame, model: str, folder: Path, lengths: pd.DataFrame, *, jobs: int = -1, rounds: int = ROUNDS
) -> Known:
    """Fit to the training rows of one model. Raises `BackendError` for too few."""
    if len(rows) < len(COSTS) // 2:
        raise BackendError(f"{len(rows)} runs of {model} are too few for {len(COSTS)} costs")
    served = rows[rows["completed_over_offered"] > 0.95]
    costs = {**FIRST_GUESS, "skipped_s": skipped_s(folder)}
    front = replace(FRONT_GUESS, first_use_s=first_use_s(folder, model))
    known = Known(costs, front, ends_per_token(served, lengths, model), load_s(folder, model), tuple(rows["run_id"]))
    batches = closed_batches(folder, model)
    runs = rows.to_dict("records")
    for _ in range(rounds):
        seen = Parallel(n_jobs=jobs)(delayed(summary)(run, known, lengths, 1) for run in runs)
        found = _costs(runs, seen, batches, known)
        moved = {name: (1 - STEP) * known.costs[name] + STEP * value for name, value in found.items()}
        known = replace(known, costs={**known.costs, **moved}, front_end=_reading(runs, seen, known.front_end))
    seen = Parallel(n_jobs=jobs)(delayed(summary)(run, known, lengths, 2) for run in runs)
    return replace(known, front_end=_passing(runs, seen, known.front_end), spread=_spread(runs, seen, batches, known))


def summary(run: Mapping[Any, Any], known: Known, lengths: pd.DataFrame, passes: int) -> Summary:
    """Simulate a run and keep what the fit needs."""
    again = made_again(run, known, lengths, float(run["window_s"]), 0, passes=passes)
    steps, seen = again.tables.steps, sets_seen(again.tables.requests, again.tables.steps)
    decoded = steps["decode_requests"].to_numpy(float)
    has = multipliers(_steps(run, steps), int(run["max_loras"]), int(run["max_lora_rank"]))
    other = steps["load_s"].to_numpy() + steps["skipped"].to_numpy() * known.costs["skipped_s"]
    clients = seen_by_clients(again, known.front_end)
    asked = again.load.requests
    way = passage(asked.arrival_s, asked.adapter, known.front_end, seen, float(run["window_s"]))
    return Summary(
        (has * decoded[:, None]).sum(axis=0) / decoded.sum(),
        float((other * decoded).sum() / decoded.sum()),
        1.0 - merged_tokens(way, steps) / decoded.sum(),
        _itl_s(again),
        float(seen.sets.mean()),
        float(seen.names.mean()),
        clients["ttft_median_ms"],
        _batch(again),
    )


def _itl_s(again: Again) -> float:
    """Mean ITL of the finished at the engine's door."""
    done = again.tables.requests[again.tables.requests["status"] == "finished"]
    return float((done["finish_s"] - done["first_token_s"]).sum() / (done["tokens_emitted"] - 1).sum())


def _steps(run: Mapping[Any, Any], steps: pd.DataFrame) -> Steps:
    """A table of steps as costs see it; keys from the blocks in use, of which each request leaves half a one empty."""
    size = int(float(str(run["block_size"])))
    decodes = steps["decode_requests"].to_numpy(float)
    requests = decodes + steps["prefill_requests"].to_numpy(float)
    held = steps["used_blocks"].to_numpy(float) * size
    keys = np.maximum(0.0, held - steps["prefill_tokens"].to_numpy(float) - requests * size / 2)
    tokens = steps["tokens"].to_numpy(float)
    return Steps(tokens, requests, decodes, keys, steps["distinct_adapters"].to_numpy(float))


def _batch(again: Again) -> float:
    """Median number of requests in the step of a first token."""
    steps = again.tables.steps
    first = again.tables.requests["first_token_s"].dropna().to_numpy()
    step = np.minimum(np.searchsorted(steps["end_s"], first), len(steps) - 1)
    return float(np.median((steps["decode_requests"] + steps["prefill_requests"]).to_numpy()[step]))


@dataclass(frozen=True, slots=True)
class _Linear:
    """Mean ITL of the runs as a sum over costs: `has` times costs, plus `other_s`, is `took_s`."""

    has: FloatArray
    other_s: FloatArray
    took_s: FloatArray

    @classmethod
    def of(cls, runs: Sequence[Mapping[Any, Any]], seen: Sequence[Summary], known: Known) -> _Linear:
        took = np.array([run["itl_mean_ms"] / 1e3 * one.single for run, one in zip(runs, seen, strict=True)])
        other = np.array([one.other_s for one in seen])
        # What a sum over the table leaves out, such as keys that were guessed from blocks, is the same factor next round.
        priced = np.array([float(one.has @ [known.costs[name] for name in FREE]) + one.other_s for one in seen])
        factor = np.array([one.itl_s for one in seen]) / priced
        return cls(np.stack([one.has for one in seen]) * factor[:, None], other * factor, took)

    def costs(self, batches: Sequence[Any], kept: npt.NDArray[np.bool_]) -> FloatArray:
        """Costs of the least relative error over the runs `kept` and the closed batches, in the order of `FREE`."""
        from scipy.optimize import nnls

        alone = np.stack([multipliers(steps, slots, rank)[0] for steps, slots, rank, _ in batches])
        took = np.array([seconds for *_, seconds in batches])
        weight = np.concatenate([1 / self.took_s[kept], np.sqrt(BATCHES_WEIGHT / len(batches)) / took])
        matrix = np.concatenate([self.has[kept], alone]) * weight[:, None]
        rest = np.maximum(self.took_s[kept] - self.other_s[kept], 0.0)
        scale = np.maximum(matrix.max(axis=0), 1e-30)
        found, _ = nnls(matrix / scale, np.concatenate([rest, took]) * weight, maxiter=1000)
        return np.asarray(found / scale)


def _costs(
    runs: Sequence[Mapping[Any, Any]], seen: Sequence[Summary], batches: Sequence[Any], known: Known
) -> dict[str, float]:
    found = _Linear.of(runs, seen, known).costs(batches, np.ones(len(runs), dtype=bool))
    return dict(zip(FREE, found.tolist(), strict=True))


def _spread(runs: Sequence[Mapping[Any, Any]], seen: Sequence[Summary], batches: Sequence[Any], known: Known) -> float:
    """How far each run's mean ITL lies from what the other runs and the closed batches say of it."""
    linear = _Linear.of(runs, seen, known)
    apart = []
    for i in range(len(runs)):
        costs = linear.costs(batches, np.arange(len(runs)) != i)
        apart.append(np.log((linear.has[i] @ costs + linear.other_s[i]) / linear.took_s[i]))
    return float(np.sqrt(np.mean(np.square(apart))))


def _reading(runs: Sequence[Mapping[Any, Any]], seen: Sequence[Summary], front: FrontEnd) -> FrontEnd:
    """What reading the metrics takes, from how often the clients of calm runs got them."""
    from scipy.optimize import nnls

    took = np.array([run["window_s"] / run["samples"] - READ_EVERY_S for run in runs])
    means = np.array([[1.0, one.sets, one.names] for one in seen])
    weight = 1.0 / np.maximum(took, 0.01)
    scale = means.max(axis=0)
    found, _ = nnls(means / scale * weight[:, None], took * weight)
    whole, per_set, per_name = (found / scale).tolist()
    return replace(front, read_s=whole, read_set_s=per_set, read_name_s=per_name)


def _passing(runs: Sequence[Mapping[Any, Any]], seen: Sequence[Summary], front: FrontEnd) -> FrontEnd:
    """A request's and a token's share, from median TTFT where nothing queued."""
    from scipy.optimize import nnls

    calm = [(run, one) for run, one in zip(runs, seen, strict=True) if run["srv_waiting_mean"] < 1]
    measured = np.array([run["ttft_median_ms"] for run, _ in calm])
    missing = np.maximum(measured - [one.ttft_ms for _, one in calm], 0.0)
    columns = np.array([[1.0, one.batch] for _, one in calm])
    scale = columns.max(axis=0)
    found, _ = nnls(columns / scale / measured[:, None], missing / measured)
    request_s, token_s = (found / scale / 1e3).tolist()
    return replace(front, request_s=request_s, token_s=token_s)
