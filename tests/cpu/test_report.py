"""keepless.report on a model: what is measured, what is traced, and that nothing of the caller's changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import keepless
from keepless.control.fits.grid import FitsGrid, GridCell


class Net(torch.nn.Module):
    """Four blocks with dropout, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(128, 32)
            )
            for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return (x**2).mean()


class Step:
    """A model, its batch and optimizer, and a plan of it."""

    def __init__(self, budget: int, **options: Any) -> None:
        torch.manual_seed(0)
        self.model, self.batch = Net(), torch.randn(256, 32)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.plan = keepless.plan(self.model, self.batch, budget, optimizer=self.optimizer, **options)


@pytest.fixture(scope="module")
def step() -> Step:
    return Step(1_700_000)


def test_a_report_is_measured_and_has_its_curve(step: Step, tmp_path: Path) -> None:
    """Measured bytes meet the prediction, bits are equal, the curve is of this step, and the model is as it was."""
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    random = torch.get_rng_state()
    cell = GridCell(8, 16, "kept", True, 1000, True, 2000)
    grid = FitsGrid(5000, (8,), (16,), {(8, 16): cell})
    heard: list[str] = []
    report = keepless.report(
        step.model,
        step.batch,
        step.plan,
        path=tmp_path / "a.html",
        optimizer=step.optimizer,
        repeats=1,
        curve=True,
        points=2,
        fits=grid,
        progress=lambda stage, done, total: heard.append(stage),
    )
    assert step.plan.num_replays > 0
    assert report.bits is not None
    assert report.bits.equal
    assert report.timeline.measured is not None
    peak = next(row for row in report.accuracy if row.name == "peak of the step")
    assert peak.error is not None
    assert abs(peak.error) < 0.005
    assert report.curve is not None
    assert report.curve.chosen[0] == step.plan.budget.limits["device"]
    assert report.curve.points[0].budget <= step.plan.smallest_budget * 1.001
    assert report.grids[0].cells[0].smallest_budget == 1000
    assert report.missing == {}
    assert {"measured", "solve"} <= set(heard)
    page = (tmp_path / "a.html").read_text()
    assert report.verdict.line.split(" | ")[1] in page
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert not step.optimizer.state
    assert torch.equal(torch.get_rng_state(), random)
    assert "forward" not in vars(step.model)


def test_a_plan_alone_is_reported(step: Step, tmp_path: Path) -> None:
    """Without a model nothing is run; data that was written is the report again."""
    report = keepless.report(None, None, step.plan, path=tmp_path / "a.json", title="a step")
    assert keepless.ReportData.from_json((tmp_path / "a.json").read_text()) == report
    assert report.title == "a step"
    assert report.timeline.measured is None
    assert set(report.missing) >= {"curve", "fits"}


def test_what_cannot_be_reported_is_refused_before_any_work(step: Step, tmp_path: Path) -> None:
    """A file of another kind, a curve without a model, and what is no plan are typed errors; nothing is written."""
    with pytest.raises(keepless.ReportError, match=r"\.txt"):
        keepless.report(step.model, step.batch, step.plan, path=tmp_path / "a.txt")
    with pytest.raises(keepless.KeeplessError, match="give the model"):
        keepless.report(None, None, step.plan, path=tmp_path / "a.html", curve=True)
    with pytest.raises(keepless.KeeplessError, match="plan= is a str"):
        keepless.report(None, None, "step.plan", path=tmp_path / "a.html")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_plan_of_module_calls_has_no_curve_and_says_so(tmp_path: Path) -> None:
    """Phases are measured; the curve is of captured steps, which the report says in its place."""
    eager = Step(1_900_000, engine="eager")
    report = keepless.report(eager.model, eager.batch, eager.plan, path=None, curve=True, repeats=1)
    assert report.curve is None
    assert "engine is eager" in report.missing["curve"]
    assert report.timeline.measured is not None
    assert {report.timeline.places[place].op for place in report.timeline.measured.places} <= {
        "the whole forward",
        "the whole loss",
        "the whole backward",
    }
    assert [part.engine for part in report.parts] == ["eager"]


@pytest.mark.slow
def test_the_command_makes_everything(invoke: Callable[..., Any]) -> None:
    """One command plans, measures, traces the curve, looks for what fits, and writes the page; its JSON is the data."""
    words = ("report", "factories:tiny", "-b", "4MiB", "--measure", "--repeats", "1", "--curve", "--points", "2")
    done = invoke(*words, "-o", "report.html")
    assert done.exit_code == 0, done.output
    assert "fits: yes | budget 4.00 MiB" in done.stdout
    assert "Predicted and measured" in done.stdout
    assert Path("report.html").stat().st_size < 2_000_000
    far = ("report", "factories:tiny", "--device", "rtx4090", "-b", "1GiB", "--curve", "--points", "2", "--json")
    answer = json.loads(invoke(*far).stdout)
    assert answer["curve"]["points"]
    assert any("ANALYTIC" in note for note in answer["notes"])
    assert invoke(*far, "--measure").exit_code == 2
    done = invoke(*words[:4], "--json", "-o", "report.json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(Path("report.json").read_text())
    assert keepless.ReportData.from_json(done.stdout).curve is None
    for bad in (("report", "factories:tiny"), (*words[:4], "--batch", "1,2"), ("report", "report.json", "-b", "4MiB")):
        assert invoke(*bad).exit_code == 2
