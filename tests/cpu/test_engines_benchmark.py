"""The benchmark of both engines: what it measures on a tiny model, and that the docs say what its rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_both_engines_on_a_tiny_model() -> None:
    """Equal bits, peaks within budgets, and the same budget for both."""
    pytest.importorskip("transformers")
    from benchmarks import common, engines

    table = common.Table("cpu", 0)
    assert engines.run("tiny", table, 1, 0)

    def value(contender: str, metric: str) -> float:
        found = table.find("tiny", contender, metric)
        assert found is not None
        return found

    for budget in engines.BUDGETS:
        graph, blocks = (f"{engine}, {budget}" for engine in engines.ENGINES)
        assert value(graph, "budget") == value(blocks, "budget") >= value(blocks, "peak")
        assert value(blocks, "peak_over_graph") == value(blocks, "peak") / value(graph, "peak")
        assert value(blocks, "captured_calls") >= value(blocks, "traces") > 1 == value(graph, "traces")
    assert value("graph, kept", "replays") == value("blocks, kept", "replays") == 0
    assert engines.section(table.rows).count("| tiny |") == 3


def test_docs_are_as_measured() -> None:
    """The table in the docs is the one that the rows give; bits are plain eager's, and no peak is above its budget."""
    from benchmarks import common, engines

    rows = common.read_rows(common.RESULTS / "engines.csv")
    assert engines.section(rows) in (ROOT / "docs" / "module-plans.md").read_text(encoding="utf-8")
    found = {(row.model, row.contender, row.metric): row.value for row in rows}
    for model, contender, metric in found:
        if metric == "peak":
            assert found[model, contender, "equal_to_plain"] == 1
            assert found[model, contender, metric] <= found.get((model, contender, "budget"), float("inf"))
