"""The engine that plans steps between measured ones serves its traffic, and never runs dry."""

from __future__ import annotations

from sim.background import BackgroundEngine


def test_it_is_as_busy_as_an_engine_under_load() -> None:
    engine, running = BackgroundEngine(), []
    for number in range(1, 1501):
        engine.step()
        assert engine.replica.totals.steps == number, "one step at a time"
        running.append(len(engine.replica.scheduler.running))
    late = running[500:]
    assert min(late) >= 1
    assert 12 < sum(late) / len(late) < 24, "about eighteen"
    assert sum(use.activations for use in engine.replica.uses.values()) > 2 * engine.replica.config.max_loras, (
        "adapters come and go"
    )
