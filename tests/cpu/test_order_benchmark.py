"""The benchmark that compares the order of plans: what it counts, and that its rows are there."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


def test_agreement_counts_pairs_that_are_apart() -> None:
    """Pairs within the noise do not count; a swapped pair is not in order; the same order has rank correlation 1."""
    from benchmarks import order

    same = order.agreement([1.0, 1.1, 1.3], [2.0, 2.1, 2.2], 0.02)
    assert (same.pairs_apart, same.pairs_in_order) == (3, 3)
    assert same.spearman == pytest.approx(1)
    assert same.kendall == pytest.approx(1)
    swapped = order.agreement([1.0, 1.1, 1.3], [2.1, 2.0, 2.2], 0.02)
    assert (swapped.pairs_apart, swapped.pairs_in_order) == (3, 2)
    assert swapped.kendall == pytest.approx(1 / 3)
    near = order.agreement([1.0, 1.01, 1.3], [2.1, 2.0, 2.2], 0.02)
    assert (near.pairs_apart, near.pairs_in_order) == (2, 2)
    tied = order.agreement([1.0, 1.1, 1.3], [2.0, 2.0, 2.2], 0.02)
    assert (tied.pairs_apart, tied.pairs_in_order) == (3, 2)


def test_noise_is_the_largest_difference_of_two_series() -> None:
    """Of medians, so that one slow step does not count."""
    from benchmarks import order

    assert order.noise_of([([1.0, 1.0, 9.0], [1.0, 1.0, 1.0]), ([2.0, 2.0, 2.0], [2.1, 2.1, 2.0])]) == pytest.approx(
        0.05
    )


@pytest.mark.slow
def test_a_small_model_has_all_its_rows() -> None:
    """Plans of falling predicted seconds, each timed twice a round, the last one with everything kept."""
    from benchmarks import common, order

    table = common.Table("cpu", 0)
    order.run("tiny", table, plans=4, rounds=2, seed=0)
    count = int(table.find("tiny", order.WHOLE, "plans") or 0)
    assert count >= 3
    steps = [row for row in table.rows if row.metric == "step"]
    assert [row.n for row in steps] == [4] * count
    predicted = [table.find("tiny", row.contender, "predicted_step") or 0 for row in steps]
    assert predicted == sorted(predicted, reverse=True)
    assert table.find("tiny", steps[-1].contender, "replays") == 0
    assert (table.find("tiny", steps[0].contender, "replays") or 0) > 0
    assert table.find("tiny", order.WHOLE, "noise") is not None


def test_the_planners_benchmark_shows_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Without DAGs there is no table of DAGs that none of fits."""
    from benchmarks import planner
    from benchmarks.common import Table
    from rich.console import Console

    table = Table("cpu", 0)
    for metric, value in (("ops", 3), ("smallest_over_kept", 0.5), ("first", 0.1), ("solve", 0.2)):
        table.add("gpt2-4", "keepless", metric, "count", value)
    planner.show(Console(width=120), table, ["gpt2-4"])
    assert "DAGs" not in capsys.readouterr().out
    table.add("dag 100 0 0.9", "keepless", "fits", "count", 1)
    planner.show(Console(width=120), table, ["gpt2-4"])
    assert "1 of 6" in capsys.readouterr().out
