"""The host's seconds of a running engine: a grid's shape, times what a live run's steps take of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from backend.features import StepFeatures
from backend.fitting import features_of
from backend.predictor import HOST_AFTER_PROMPTS, HOST_REQUESTS, HOST_STEP, FloatArray, Predictor, dot, host_terms
from backend.regression import WAITED_S, Measured

_HOST_STEPS = 10
"""Steps of a regime below which its host seconds are not fitted."""

Terms = tuple[float, ...]


def with_host_of(predictor: Predictor, measured: Measured) -> Predictor:
    """`predictor` with the host's seconds of `measured`, steps of a live run: the device's stay.

    A live run's compositions change with its host's speed, which goes in waves of seconds: fitting a coefficient each would take one
    for the other. So each regime keeps the shape that a grid gave, scaled to the run's sum of seconds, and what a step after prompts
    takes more (a grid repeats one step and does not show it) is the mean beyond that. Regimes of which `measured` has fewer than
    `_HOST_STEPS` steps, or launches that nobody timed, keep theirs.
    """
    placed = [predictor.regime(f)[0] for f in measured.steps]
    regimes = dict(predictor.regimes)
    for name, regime in predictor.regimes.items():
        part = measured.at([i for i, placed_at in enumerate(placed) if placed_at == name])
        if len(part.steps) < _HOST_STEPS or (regime.launch and not part.launch_s.all()):
            continue
        rest_s = part.host_s - part.launch_s if regime.launch else part.host_s
        regimes[name] = replace(regime, host=_scaled(regime.host, part.steps, rest_s))
        fast = part.at(np.flatnonzero(part.device_s <= WAITED_S).tolist())
        if regime.launch and fast.steps:
            launch = _scaled(regime.launch, fast.steps, fast.launch_s + fast.device_s, after=False)
            regimes[name] = replace(regimes[name], launch=launch)
    return replace(predictor, regimes=regimes)


def times(predictor: Predictor, factor: float) -> Predictor:
    """`predictor` on a host that takes `factor` times as long for everything."""

    def slower(terms: Terms) -> Terms:
        return tuple(factor * c for c in terms)

    regimes = {k: replace(r, host=slower(r.host), launch=slower(r.launch)) for k, r in predictor.regimes.items()}
    return replace(predictor, regimes=regimes)


def with_time_between(predictor: Predictor, runs: Sequence[pd.DataFrame]) -> Predictor:
    """`predictor` with what passes between two steps of a live engine: requests are taken in and answers handed out, for which
    nothing waits but the clock. Logs count it to no step (`between_s`); in a closed loop it is the host's.
    """
    from scipy.optimize import nnls

    steps = pd.concat([run[run["between_s"].notna()] for run in runs], ignore_index=True)
    features = features_of(steps)
    placed = np.array([predictor.regime(f)[0] for f in features])
    regimes = dict(predictor.regimes)
    for name, regime in predictor.regimes.items():
        chosen = np.flatnonzero(placed == name)
        if len(chosen) < _HOST_STEPS:
            continue
        columns = np.array([(1.0, features[i].requests) for i in chosen])
        (each_step, each_request), _ = nnls(columns, np.maximum(0.0, steps["between_s"].to_numpy()[chosen]))
        host = list(regime.host)
        host[HOST_STEP] += float(each_step)
        host[HOST_REQUESTS] += float(each_request)
        regimes[name] = replace(regime, host=tuple(host))
    return replace(predictor, regimes=regimes)


def _scaled(shape: Terms, steps: Sequence[StepFeatures], seconds: FloatArray, *, after: bool = True) -> Terms:
    """`shape` times one factor; with `after`, its seconds of a step after prompts anew, where there are such steps beside others."""
    follows = np.array([f.after_prompts for f in steps])
    split = after and bool(follows.any()) and not follows.all()
    terms = list(shape)
    if split:
        terms[HOST_AFTER_PROMPTS] = 0.0
    expected = np.array([dot(terms, host_terms(f)) for f in steps])
    plain = ~follows if split else np.ones(len(steps), dtype=bool)
    if expected[plain].sum() <= 0.0:
        return shape
    factor = float(seconds[plain].sum() / expected[plain].sum())
    terms = [factor * c for c in terms]
    if split:
        terms[HOST_AFTER_PROMPTS] = max(0.0, float((seconds - factor * expected)[follows].mean()))
    return tuple(terms)
