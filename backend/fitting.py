"""From tables of measured steps and moves to curves, and how well they fit."""

from __future__ import annotations

import numpy as np
import pandas as pd

from backend.features import StepFeatures
from backend.predictor import Predictor
from backend.profile import LoadCurve


def load_curve(loads: pd.DataFrame, kind: str) -> LoadCurve:
    """Latency and bandwidth through the medians of each rank, both >= 0."""
    from scipy.optimize import nnls

    medians = loads[loads["kind"] == kind].groupby("nbytes")["elapsed_s"].median()
    size = medians.index.to_numpy(dtype=float)
    weight = 1.0 / medians.to_numpy()
    (latency, per_byte), _ = nnls(np.stack([weight, size * weight], 1) * [1.0, 1e-9], np.ones(len(size)))
    return LoadCurve(float(latency), 1e9 / max(float(per_byte), 1e-9))


def features_of(steps: pd.DataFrame) -> list[StepFeatures]:
    """The features back from a table of measured steps."""
    names = list(StepFeatures.__slots__)
    return [
        StepFeatures(**dict(zip(names, row, strict=True))) for row in steps[names].itertuples(index=False, name=None)
    ]


def accuracy(predictor: Predictor, steps: pd.DataFrame) -> dict[str, float]:
    """Relative error of predicted elapsed seconds on `steps`: count, mean absolute (MAPE) and 95th percentile."""
    predicted = np.array([sum(predictor.predict(f)[:2]) for f in features_of(steps)])
    error = np.abs(predicted / steps["elapsed_s"].to_numpy() - 1.0)
    return {"steps": len(steps), "mape": float(error.mean()), "p95": float(np.quantile(error, 0.95))}


def accuracy_by_regime(predictor: Predictor, steps: pd.DataFrame) -> dict[str, dict[str, float]]:
    """`accuracy` of each of the predictor's regimes that `steps` has any of."""
    regime = pd.Series([predictor.regime(f)[0] for f in features_of(steps)], index=steps.index)
    return {name: accuracy(predictor, steps[regime == name]) for name in predictor.regimes if (regime == name).any()}
