"""The fidelity benchmark: which runs it makes, what a row says, and that the page says what the rows say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_any_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


def row(**changes: Any) -> Any:
    from benchmarks.fidelity_figures import Measured

    made = Measured(
        "bert",
        "graph",
        "mid",
        "sgd",
        "off",
        "fp32",
        "done",
        budget=2000,
        predicted=1010,
        measured=1000,
        steps=3,
        landed_predicted=1001,
        landed_measured=1000,
        rounds=1,
        predicted_seconds=0.8,
        measured_seconds=1.0,
        landed_predicted_seconds=1.25,
        landed_measured_seconds=1.0,
        device="a machine",
        date="2026-01-01T00:00+00:00",
    )
    return replace(made, **changes)


def test_the_models_are_those_of_the_tests() -> None:
    """Every one of them, and no other."""
    from benchmarks import sized

    assert set(sized.MODELS) == set(test_any_model.MODELS)


def test_the_covering_set_is_small_and_covers() -> None:
    """At most 150 runs; every pair that is needed meets; the whole matrix has them all."""
    from benchmarks import fidelity, pairwise

    runs = fidelity.combinations(full=False, seed=0)
    assert len(runs) <= 150
    met = set().union(*map(pairwise.covered_by, runs))
    assert pairwise.pairs_of(fidelity.FACTORS, fidelity.is_needed) <= met
    every = {tuple(run.values()) for run in fidelity.combinations(full=True, seed=0)}
    assert {tuple(run.values()) for run in runs} <= every


def test_rows_survive_their_file(tmp_path: Path) -> None:
    """Numbers and words, in any status."""
    from benchmarks import fidelity, fidelity_figures

    rows = [row(), row(model="vit", status="refused", reason='"no", it said\nin two lines')]
    fidelity.write(tmp_path / "fidelity.csv", rows)
    assert fidelity_figures.read(tmp_path / "fidelity.csv") == rows
    assert fidelity_figures.read(tmp_path / "none.csv") == []


def test_the_table_counts_what_there_is() -> None:
    """Steps above the budget, the largest and the median errors, misses with their bytes."""
    from benchmarks import fidelity_figures

    rows = [
        row(),
        row(model="vit", predicted=950, steps_above=1),
        row(model="t5", status="refused", reason="no"),
        row(model="gnn", predicted=1000),
    ]
    table = fidelity_figures.table(rows)
    assert "| all | 3 | 94.4% | 5.00%, 1.00% | 0.10%, 0.10% | 20.0%, 20.0% | 25.0%, 25.0% |" in table
    misses = fidelity_figures.misses(rows)
    assert misses[0].startswith("- ABOVE THE BUDGET: vit")
    assert any("-50 bytes of 1000" in line for line in misses)
    assert "1 combinations are refused" in fidelity_figures.section(rows)


def test_the_page_says_what_the_rows_say() -> None:
    """As committed."""
    from benchmarks import fidelity_figures

    page = fidelity_figures.PAGE.read_text(encoding="utf-8")
    assert fidelity_figures.updated(page, fidelity_figures.read()) == page


def test_a_refused_combination_has_a_row_with_the_reason() -> None:
    """The graph engine and a model that looks at its data."""
    from benchmarks import fidelity

    run = dict(zip(fidelity.FACTORS, ("print", "graph", "mid", "sgd", "off", "fp32"), strict=True))
    found = fidelity.measured(run, 0)
    assert found.status == "refused"
    assert "checkpoint_nets.py" in found.reason
    assert found.key == tuple(run.values())


@pytest.mark.slow
def test_a_run_is_measured_before_and_after_landing() -> None:
    """In processes of its own; the steps are within the budget, and the prediction is near."""
    from benchmarks import fidelity

    run = dict(zip(fidelity.FACTORS, ("dict", "graph", "mid", "adamw foreach", "on", "bf16"), strict=True))
    found = fidelity.measured(run, 0)
    assert found.status == "done", found.reason
    assert found.steps == fidelity.METERED_STEPS
    assert found.steps_above == found.landed_steps_above == 0
    assert abs(found.error) <= 0.01
    assert abs(found.landed_error) <= 0.005
    assert found.predicted_seconds > 0
    assert found.measured_seconds > 0


def test_what_plain_cannot_train_is_refused_not_failed() -> None:
    """The GNN adds halves into floats under autocast, whoever runs it."""
    from benchmarks import fidelity

    levels = {"engine": "blocks", "budget_level": "mid", "optimizer": "sgd", "accumulation": "off"}
    assert fidelity.plain_fails({"model": "GNN", **levels, "dtype": "bf16"})
    assert not fidelity.plain_fails({"model": "GNN", **levels, "dtype": "fp32"})
    made = fidelity.measured({"model": "GNN", **levels, "dtype": "bf16"}, seed=0)
    assert made.status == "refused"
    assert made.reason.startswith("plain eager fails, too: RuntimeError")
