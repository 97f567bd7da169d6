"""The demo at a tiny size: the same promises, and what happens when one is broken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keepless.demo import __main__ as entry
from keepless.demo import run as demo_run
from keepless.demo.contenders import BUDGET, CHECKPOINT, KEPT, PLAIN
from keepless.demo.contest import Outcome
from keepless.demo.display import table, verdict
from keepless.demo.task import Task, batches, build_model, english, hash_parameters
from keepless.machine import load_plan

TINY = Task(layers=2, width=32, heads=2, sequence=64, batch=16)


def test_the_task_is_the_same_every_time() -> None:
    """Text, batches and weights are English bytes and do not change from call to call; each step has its own batch."""
    assert len(english()) > 100_000
    first, second = batches(TINY, 2), batches(TINY, 2)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0]["input_ids"], first[1]["input_ids"])
    assert first[0]["input_ids"].shape == (16, 64)
    assert int(first[0]["input_ids"].max()) < 128
    assert hash_parameters(build_model(TINY)) == hash_parameters(build_model(TINY))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, dict[str, object], Outcome]:
    """The demo, once, at a tiny size."""
    out = tmp_path_factory.mktemp("demo")
    kept: list[Outcome] = []
    original = demo_run.contest

    def remembering(*args: object, **kwargs: object) -> Outcome:
        kept.append(original(*args, **kwargs))  # type: ignore[arg-type]
        return kept[0]

    patch = pytest.MonkeyPatch()
    lines: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch.setattr(demo_run, "contest", remembering)
    patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
    try:
        code = demo_run.run(out, task=TINY, share=0.6, rounds=1, as_json=True)
    finally:
        patch.undo()
        torch.set_num_threads(threads)
    return code, out, json.loads(lines[-1]), kept[0]


@pytest.mark.slow
def test_every_promise_holds(ran: tuple[int, Path, dict[str, object], Outcome]) -> None:
    """All contenders give plain eager's bits, and the budget is the peak."""
    code, _, answer, outcome = ran
    assert outcome.broken == ()
    assert code == 0
    rows = {row.name: row for row in outcome.rows}
    assert all(row.equal for row in rows.values())
    assert len({row.parameters for row in rows.values()}) == 1
    assert rows[BUDGET].peak <= rows[BUDGET].budget < rows[KEPT].peak
    assert rows[CHECKPOINT].peak < rows[PLAIN].peak
    assert rows[BUDGET].replays > 0
    assert answer["broken_promises"] == []
    assert str(answer["verdict"]).startswith("Every promise held")


@pytest.mark.slow
def test_plan_picture_and_report_are_left_behind(ran: tuple[int, Path, dict[str, object], Outcome]) -> None:
    """The plan file loads, knows what was measured, and picture and report are there."""
    _, out, answer, outcome = ran
    plan = load_plan(out / "step.plan")
    assert plan.measured_peak == outcome.row(BUDGET).peak
    assert Path(str(answer["picture"])).stat().st_size > 5000
    page = Path(str(answer["report"])).read_text()
    assert page.startswith("<!doctype html>")
    assert "GPT-2 in" in page


@pytest.mark.slow
def test_the_table_has_a_row_per_contender(ran: tuple[int, Path, dict[str, object], Outcome]) -> None:
    """The table names every contender and the reference."""
    outcome = ran[3]
    assert table(outcome).row_count == len(outcome.rows) >= 4


@pytest.mark.slow
def test_a_broken_promise_ends_with_1(
    ran: tuple[int, Path, dict[str, object], Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A broken promise is said in red words, and the exit code is 1."""
    broken = replace(ran[3], broken=("the peak is above the budget",))
    monkeypatch.setattr(demo_run, "contest", lambda *_, **__: broken)
    monkeypatch.setattr(demo_run, "write_report", lambda outcome, path, tell: path)
    assert demo_run.run(tmp_path, task=TINY) == 1
    assert "BROKEN: the peak is above the budget" in capsys.readouterr().out
    assert "BROKEN" in verdict(broken)


def test_the_demo_says_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without transformers the demo names the extra and ends with 2."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert entry.main([]) == 2
    assert "keepless[demo]" in capsys.readouterr().err
