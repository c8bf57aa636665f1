"""The churn benchmark on the CPU: preemptions, adapter loads, and every scheduled row executed once."""

from __future__ import annotations

from benchmarks import churn


def test_every_row_is_accounted_for() -> None:
    watched, tables = churn.churn("tiny", "cpu", 40, every=50)
    facts = churn.report(watched, tables)
    watched.close()
    assert facts["requests_finished"] == 40
    assert facts["rows_computed"] == facts["rows_scheduled"] > 40 * 100
    assert watched.steps == len(tables.steps) == watched.live.steps_executed
    assert watched.table[-1][0] >= 50
    assert int(str(facts["preemptions"])) > 0 < watched.loads
    assert facts["steps_with_logits_not_finite"] == 0
