"""How well a profile is known, in lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from backend.base import NO_SLOT, StepBatch
from backend.features import StepFeatures
from backend.heat import drive

if TYPE_CHECKING:
    from backend.predictor import Predictor
    from backend.profile import Profile

PROMPT_TOKENS = 2048
"""Of the prompts whose heat is told."""


def quality(profile: Profile) -> Iterator[str]:
    """The error on held-out steps, how far repeats of a step lie apart, and what heat does to steps."""
    facts = profile.accuracy
    yield f"held-out steps: {facts['steps']}, MAPE {facts['mape']:.2%}, p95 {facts['p95']:.2%}"
    if facts["spread"]:
        yield f"repeats of one step: p10 to p90 {facts['spread']:.2%} apart (median)"
    by_regime = profile.meta.get("accuracy_by_regime")
    for name, part in by_regime.items() if isinstance(by_regime, dict) else ():
        yield f"  {name}: {part['steps']}, MAPE {part['mape']:.2%}, p95 {part['p95']:.2%}"
    if profile.predictor.heat.tau_s:
        longer = behind_prompts(profile.predictor)
        parts = ", ".join(f"{name} {share:.1%}" for name, share in longer.items())
        explains = profile.meta.get("heat_explains", 0.0)
        yield (
            f"heat: behind prompts of {PROMPT_TOKENS} tokens steps take longer ({parts}; time constant"
            f" {profile.predictor.heat.tau_s:g} s): {explains:.0%} of the variance among repeats, which the figures above are without"
        )


def behind_prompts(predictor: Predictor) -> dict[str, float]:
    """By what share of itself a step of each regime takes longer behind such prompts than on a rested GPU."""
    prompt = StepFeatures.of(StepBatch((PROMPT_TOKENS,), (0,), (NO_SLOT,), (True,)), {})
    heat = predictor.heat.above(drive(PROMPT_TOKENS, predictor.predict_lasting(prompt)[0]))
    return {name: regime.heat * heat for name, regime in predictor.regimes.items()}
