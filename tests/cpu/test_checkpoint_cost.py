"""The benchmark of checkpointed regions gives rows for every body and contender."""

from __future__ import annotations

from benchmarks import checkpoint
from benchmarks.common import Table


def test_rows_of_every_contender() -> None:
    table = Table("cpu", 0)
    for name in checkpoint.bodies():
        checkpoint.measure(table, name, rounds=1, calls=2)
    metrics = {(row.model, row.contender, row.metric) for row in table.rows}
    assert {contender for _, contender, _ in metrics} == {"plain", "torch", "keepless"}
    assert len(metrics) == 4 * len(checkpoint.bodies())
    assert all(row.value > 0 for row in table.rows if row.metric == "seconds_per_call")
