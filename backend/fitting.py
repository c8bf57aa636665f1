"""From tables of measured steps and moves to curves, and how well they fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import pandas as pd

from backend.base import NO_SLOT, StepBatch
from backend.features import StepFeatures
from backend.predictor import FloatArray, Predictor
from backend.profile import LoadCurve
from backend.regression import Measured


def load_curve(loads: pd.DataFrame, kind: str) -> LoadCurve:
    """Through the mean of each size, never falling (isotonic regression), beside latency and bandwidth >= 0 that fit them best.

    Means, as reads have a tail, and a run is as long as all of them together.
    """
    from scipy.optimize import isotonic_regression, nnls

    means = loads[loads["kind"] == kind].groupby("nbytes")["elapsed_s"].mean()
    size, seconds = means.index.to_numpy(dtype=float), means.to_numpy()
    weight = 1.0 / seconds
    (latency, per_byte), _ = nnls(np.stack([weight, size * weight], 1) * [1.0, 1e-9], np.ones(len(size)))
    points = zip(size.tolist(), isotonic_regression(seconds).x.tolist(), strict=True)
    return LoadCurve(float(latency), 1e9 / max(float(per_byte), 1e-9), tuple(points))


COMPOSITION = ("query_lens", "context_lens", "slots", "ranks")
"""The columns of `composition`."""


def composition(batch: StepBatch, slot_ranks: Mapping[int, int]) -> dict[str, list[int]]:
    """What a table of measured steps keeps of a batch: a list each over its requests; `ranks` is 0 without an adapter."""
    return {
        "query_lens": list(batch.query_lens),
        "context_lens": list(batch.context_lens),
        "slots": list(batch.slots),
        "ranks": [slot_ranks[slot] if slot != NO_SLOT else 0 for slot in batch.slots],
    }


def features_of(steps: pd.DataFrame) -> list[StepFeatures]:
    """The features of a table of measured steps."""
    columns = (steps[name] for name in COMPOSITION)
    features = []
    fresh = steps["after_prompts"] if "after_prompts" in steps else [False] * len(steps)
    of_engine = steps["max_loras"] if "max_loras" in steps else [0] * len(steps)
    for query, context, slots, ranks, after, max_loras in zip(*columns, fresh, of_engine, strict=True):
        lengths = (tuple(map(int, query)), tuple(map(int, context)), tuple(map(int, slots)))
        slot_ranks = dict(zip(lengths[2], map(int, ranks), strict=True))
        batch = StepBatch(*lengths, (True,) * len(lengths[0]))
        features.append(StepFeatures.of(batch, slot_ranks, after_prompts=bool(after), max_loras=int(max_loras)))
    return features


def measured(steps: pd.DataFrame) -> Measured:
    """A table of measured steps as a fit takes it."""
    launch = steps["launch_s"].to_numpy() if "launch_s" in steps else np.zeros(len(steps))
    return Measured(
        tuple(features_of(steps)), steps["device_s"].to_numpy(), steps["host_s"].to_numpy(), np.asarray(launch, float)
    )


def with_features(steps: pd.DataFrame) -> pd.DataFrame:
    """A table of measured steps with a column for each feature."""
    return steps.assign(**pd.DataFrame([asdict(f) for f in features_of(steps)], index=steps.index))


def accuracy(predictor: Predictor, steps: pd.DataFrame) -> dict[str, float]:
    """Relative error of predicted elapsed seconds on `steps`: count, mean absolute (MAPE) and 95th percentile.

    `spread`: how far repeats of one step lie apart (p10 to p90 over the median; the median step), 0 without repeats.
    """
    return accuracy_of(np.array([sum(predictor.predict(f)[:2]) for f in features_of(steps)]), steps)


def accuracy_of(predicted: FloatArray, steps: pd.DataFrame) -> dict[str, float]:
    """`accuracy` of seconds that were predicted for `steps`."""
    error = np.abs(predicted / steps["elapsed_s"].to_numpy() - 1.0)
    spread = float(((steps["p90_s"] - steps["p10_s"]) / steps["elapsed_s"]).median())
    return {"steps": len(steps), "mape": float(error.mean()), "p95": float(np.quantile(error, 0.95)), "spread": spread}


def accuracy_by_regime(predictor: Predictor, steps: pd.DataFrame) -> dict[str, dict[str, float]]:
    """`accuracy` of each of the predictor's regimes that `steps` has any of."""
    regime = pd.Series([predictor.regime(f)[0] for f in features_of(steps)], index=steps.index)
    return {name: accuracy(predictor, steps[regime == name]) for name in predictor.regimes if (regime == name).any()}
