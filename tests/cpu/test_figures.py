"""README says what the committed results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


def test_readme_is_as_measured() -> None:
    """The table in README is the one that the rows give."""
    from benchmarks import common, figures

    rows = common.read_rows(common.RESULTS / "step.csv")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert figures.section(rows) in readme
    assert figures.updated(readme, rows) == readme


def test_readme_claims_hold_in_the_results() -> None:
    """Faster than checkpointing at its own peak, equal bits, no peak above its budget, on every model."""
    from benchmarks import common, figures

    found = {(row.model, row.contender, row.metric): row.value for row in common.read_rows(common.RESULTS / "step.csv")}
    for model in figures.TITLES:
        contenders = {c for m, c, _ in found if m == model and c.startswith("keep") and c != "keepless"}
        for contender in contenders:
            assert found[model, contender, "equal_losses"] == found[model, contender, "equal_state"] == 1
            assert found[model, contender, "peak"] <= found[model, contender, "budget"]
        mine, theirs = "keepless at checkpoint's peak", "checkpoint"
        assert found[model, mine, "peak"] <= found[model, theirs, "peak"]
        assert found[model, mine, "step_over_plain"] < found[model, theirs, "step_over_plain"]


def test_what_is_said_of_a_card_holds_in_its_results() -> None:
    """README's words on the one card that it was run on."""
    from benchmarks import common

    rows = common.read_rows(common.RESULTS / "gpu.csv")
    found = {(row.contender, row.metric): row.value for row in rows if row.model == "llama:fidelity"}
    plans = ("everything kept", "half way", "smallest")
    assert round(found["smallest", "peak"] / found["plain", "peak"], 2) == 0.41
    for plan in plans:
        assert abs(found[plan, "peak_prediction_error"]) < 0.001
        assert found[plan, "reserved"] == found[plan, "predicted_reserved"] <= found[plan, "budget"]
        assert abs(found[plan, "step_prediction_error"]) < 0.05
        assert found[plan, "equal_losses_to_plain"] == found[plan, "equal_state_to_plain"] == 1
    cells = [
        row.value
        for row in common.read_rows(common.RESULTS / "gpu_peers.csv")
        if row.metric.startswith("ours_over_best:")
    ]
    assert min(cells) >= 0.73
    assert round(max(cells), 2) <= 1.0


def test_what_is_said_of_peers_holds_in_the_results() -> None:
    """README's words on the best exact peers."""
    from benchmarks import common
    from benchmarks.peers import answers

    rows = common.read_rows(common.RESULTS / "peers.csv")
    ratios = [cell.ratio for cell in answers.cells(rows)]
    assert len(answers.models_of(rows)) == 11
    words = (
        r"it takes ([\d.]+) to ([\d.]+)\s+of the time .*? ([\d.]+) in the geometric mean; .*? was among them on (\w+) "
    )
    found = re.search(words, (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    said = [float(number) for number in found.groups()[:3]]
    assert said == [round(value, 2) for value in (min(ratios), max(ratios), answers.geometric_mean(ratios))]
    compiled = {row.model for row in rows if row.metric == "peak" and row.contender.startswith("aot_eager")}
    assert len(compiled) == {"eight": 8, "nine": 9, "ten": 10, "eleven": 11}[found[4]]


def test_rows_of_other_models_stay(tmp_path: Path) -> None:
    """A run of some models replaces their rows, and leaves the others as they are."""
    from benchmarks import common

    path = tmp_path / "rows.csv"
    for model, value in (("a", 1.0), ("b", 2.5), ("a", 3.0)):
        table = common.Table("cpu", 0)
        table.add(model, "plain", "peak", "bytes", value)
        table.write(path)
    assert {row.model: row.value for row in common.read_rows(path)} == {"a": 3.0, "b": 2.5}
