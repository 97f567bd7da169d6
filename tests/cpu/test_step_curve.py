"""The curve of a model's step: plans from it train bit-equal and within their budgets; the command and its JSON."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import zoo

import keepless
from keepless.control import StepCurve, planning
from keepless.errors import BudgetError, InfeasibleBudget, ParameterError, SolverError

TINY = {"layers": 2, "width": 32, "heads": 2, "length": 32, "batch": 4, "vocab": 64}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def subject() -> tuple[zoo.Workload, StepCurve]:
    """A small GPT-2 with dropout, and its curve."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workload = zoo.gpt2(**TINY)
    optimizer = torch.optim.AdamW(workload.model.parameters())
    curve = keepless.curve(
        workload.model, workload.batch(0)[0], optimizer=optimizer, release_outputs=True, points=6, cache=False
    )
    torch.set_num_threads(threads)
    return workload, curve


def test_points_and_ends(subject: tuple[zoo.Workload, StepCurve]) -> None:
    """Budgets rise and seconds fall; the ends are the smallest budget and everything kept; the text shows them."""
    _, curve = subject
    budgets, seconds = [p.budget for p in curve.points], [p.seconds for p in curve.points]
    assert budgets == sorted(set(budgets))
    assert len(budgets) >= 4
    assert seconds == sorted(seconds, reverse=True)
    assert budgets[0] <= curve.smallest_budget < curve.baseline_peak == budgets[-1]
    assert curve.smallest_bound <= curve.points[0].peak
    assert curve.points[-1].overhead == pytest.approx(0)
    assert curve.knee in curve.points
    assert all(point.bound_seconds <= point.seconds * (1 + 1e-9) for point in curve.points)
    text = str(curve)
    assert "everything kept" in text
    assert "The floor is" in text
    assert len(text.splitlines()) > len(budgets) + 4


def test_plans_from_the_curve_train_bit_equal(subject: tuple[zoo.Workload, StepCurve]) -> None:
    """At every budget of the curve the planned step leaves the same bits as the plain one, without planning again."""
    workload, curve = subject
    inputs = keepless.Inputs(**workload.batch(0)[0])
    plain = models.run_step(copy.deepcopy(workload.model), inputs)
    middle = (curve.points[1].budget + curve.points[2].budget) // 2
    for budget in (*(point.budget for point in curve.points), middle):
        plan = curve.plan(budget)
        assert plan.predicted_peak <= budget == plan.budget.limits["device"]
        assert plan.smallest_budget <= budget
        keepless.apply(workload.model, plan)
        try:
            assert models.run_step(workload.model, inputs).differences(plain) == []
            counters = workload.model.__dict__["forward"].counters
            assert (counters.steps, counters.unplanned_calls) == (1, 0)
        finally:
            keepless.remove(workload.model)
    assert curve.plan(curve.points[0].budget).num_replays > 0
    assert curve.plan("1TiB").num_replays == 0


def test_a_plan_from_the_curve_is_measured_within_its_budget(subject: tuple[zoo.Workload, StepCurve]) -> None:
    """`verify` measures the peak of the knee's plan and finds the same bits."""
    workload, curve = subject
    plan = curve.plan(curve.knee.budget)
    result = keepless.verify(workload.model, workload.batch(0)[0], plan)
    assert result.equal
    assert result.measured_peak <= curve.knee.budget


def test_nothing_is_captured_measured_or_solved_again(
    subject: tuple[zoo.Workload, StepCurve], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of the curve calls neither capture nor measurement nor solver, and neither does its refusal."""
    _, curve = subject

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("planned again")

    for name in ("trace_step", "measure_costs", "solve", "smallest"):
        monkeypatch.setattr(planning, name, refuse)
    monkeypatch.setattr("keepless.solve.planner.Planner.firsts", refuse)
    monkeypatch.setattr("keepless.solve.planner.Planner.lower", refuse)
    assert curve.plan(curve.smallest_budget).predicted_peak <= curve.smallest_budget
    with pytest.raises(InfeasibleBudget, match="The floor is") as caught:
        curve.plan(curve.points[0].peak - 1)
    assert caught.value.smallest_budget == curve.smallest_budget
    assert caught.value.bound == curve.smallest_bound
    for bad in ("eight", True, -1, 1.5, "64KiB"):
        with pytest.raises((BudgetError, InfeasibleBudget)):
            curve.plan(bad)  # type: ignore[arg-type]


def test_it_agrees_with_plan(subject: tuple[zoo.Workload, StepCurve]) -> None:
    """`keepless.plan` has the same smallest budget and bound, and accepts the curve's smallest budget."""
    workload, curve = subject
    optimizer = torch.optim.AdamW(workload.model.parameters())
    options: dict[str, Any] = {"optimizer": optimizer, "release_outputs": True, "cache": False}
    plan = keepless.plan(workload.model, workload.batch(0)[0], curve.smallest_budget, **options)
    mine = curve.plan(curve.smallest_budget)
    assert plan.smallest_bound == mine.smallest_bound == curve.smallest_bound
    assert plan.predicted_peak <= curve.smallest_budget
    assert plan.baseline_peak == mine.baseline_peak == curve.baseline_peak
    assert plan.signature == mine.signature


def test_a_saved_plan_of_the_curve_is_an_ordinary_plan(subject: tuple[zoo.Workload, StepCurve], tmp_path: Path) -> None:
    """It is saved, loaded and trained by, and other batch shapes are planned for its budget."""
    workload, curve = subject
    path = tmp_path / "step.plan"
    curve.plan(curve.knee.budget).save(path)
    loaded = keepless.load(path)
    assert loaded.predicted_peak <= loaded.budget.limits["device"] == curve.knee.budget
    inputs = keepless.Inputs(**workload.batch(0)[0])
    plain = models.run_step(copy.deepcopy(workload.model), inputs)
    half = keepless.Inputs(**{name: tensor[:2] for name, tensor in workload.batch(0)[0].items()})
    other = models.run_step(copy.deepcopy(workload.model), half)
    keepless.apply(workload.model, curve.plan(curve.knee.budget))
    try:
        assert models.run_step(workload.model, half).differences(other) == []
    finally:
        keepless.remove(workload.model)
    keepless.apply(workload.model, loaded)
    try:
        assert models.run_step(workload.model, inputs).differences(plain) == []
    finally:
        keepless.remove(workload.model)


def test_the_picture_is_written(subject: tuple[zoo.Workload, StepCurve], tmp_path: Path) -> None:
    """With a budget's line, as png and svg; an unknown format is an error and leaves no file."""
    _, curve = subject
    curve.draw(tmp_path / "curve.png", budget=curve.knee.budget)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    curve.draw(tmp_path / "curve.svg", title="Any title")
    assert "<svg" in (tmp_path / "curve.svg").read_text()
    with pytest.raises(ValueError, match="bananas"):
        curve.draw(tmp_path / "curve.bananas")
    assert not (tmp_path / "curve.bananas").exists()


def test_models_without_weights_have_curves() -> None:
    """A model on the meta device has the bytes of the same model on the CPU."""
    batch = torch.randn(16, 8)
    here = keepless.curve(models.mlp(), batch, points=3)
    with torch.device("meta"):
        model = models.mlp()
    there = keepless.curve(model, batch.to("meta"), points=3)
    assert there.smallest_budget == here.smallest_budget
    assert there.baseline_peak == here.baseline_peak
    assert there.plan("1GiB").num_replays == 0


def test_a_loss_outside_of_the_model() -> None:
    """A model without a loss takes `loss_fn`; nothing of the model changes; progress counts the points."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = torch.randn(64, 8)
    state = torch.get_rng_state()
    told: list[tuple[str, int, int]] = []
    curve = keepless.curve(
        model,
        batch,
        loss_fn=lambda output, _: output.square().mean(),
        points=4,
        cache=False,
        progress=lambda *stage: told.append(stage),
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["capture", "measure", "solve"]
    solved = [done for stage, done, _ in told if stage == "solve"]
    assert solved == sorted(solved)
    assert told[-1] == ("solve", 4, 4)
    assert curve.plan("1GiB").num_replays == 0


def test_bad_arguments_are_refused() -> None:
    """What cannot be is a typed error before anything is captured."""
    model, batch = models.mlp(), torch.randn(4, 8)
    for points in (1, True, "12", 10**9):
        with pytest.raises(SolverError, match="points"):
            keepless.curve(model, batch, points=points)  # type: ignore[arg-type]
    with pytest.raises(SolverError, match="no solver 'magic'"):
        keepless.curve(model, batch, strategies=["magic"])
    with pytest.raises(ParameterError, match=r"not a torch\.nn\.Module"):
        keepless.curve(3, batch)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="not a torch"):
        keepless.curve(model, batch, optimizer="adamw")  # type: ignore[arg-type]


def test_the_command(invoke: Any) -> None:
    """A table for people; JSON for programs; a picture, and a plan that `show` reads."""
    done = invoke("curve", "factories:tiny", "--points", "5")
    assert done.exit_code == 0, done.output
    assert "smallest" in done.stdout
    assert "everything kept" in done.stdout
    assert "every_k(1)" in done.stdout
    assert "curve: solve" in done.stderr
    done = invoke(
        "curve",
        "factories:tiny",
        "--points",
        "5",
        "--save-at",
        "4MiB",
        "-o",
        "step.plan",
        "--picture",
        "c.png",
        "--json",
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert [row["budget"] for row in facts["points"]] == sorted(row["budget"] for row in facts["points"])
    assert facts["plan"]["budget"] == 4 << 20
    assert facts["plan"]["fits"] is True
    assert facts["plan_file"] == "step.plan"
    assert Path("c.png").stat().st_size > 10_000
    shown = json.loads(invoke("show", "step.plan", "--json").stdout)
    assert shown["predicted_peak"] == facts["plan"]["predicted_peak"]
    asked = invoke("curve", "factories:tiny", "--points", "2", "--strategy", "keep_all", "--json")
    assert {row["name"] for row in json.loads(asked.stdout)["strategies"]} == {"keep_all"}


def test_the_command_plans_a_config_without_weights(invoke: Any) -> None:
    """--device meta gives the curve of a config file."""
    done = invoke("curve", "hf:config.json", "--device", "meta", "--seq-len", "16", "--points", "3", "--json")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["points"]) >= 2


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--save-at", "eight"], 2),
        (["--save-at", "100KiB"], 3),
        (["-o", "step.plan"], 2),
        (["--points", "1"], 2),
        (["--points", "few"], 2),
        (["--strategy", "magic"], 2),
        (["--picture", "c.bananas"], 2),
    ],
)
def test_bad_use_of_the_command(invoke: Any, words: list[str], code: int) -> None:
    """Wrong words and budgets below the floor end with their exit codes, without a traceback and without files."""
    done = invoke("curve", "factories:tiny", *(words if "--points" in words else ["--points", "2", *words]))
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    assert not Path("step.plan").exists()
    assert not Path("c.bananas").exists()
