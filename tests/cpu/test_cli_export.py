"""A planned step's graph in a file: `keepless solve` sees the same step, without torch. A plan file for other tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keepless.control.reserve import with_reserve
from keepless.cost import read_graph
from keepless.machine import load_plan
from keepless.reporting.exports import every_n_layers, layers_of, names_of, saved_calls

Invoke = Callable[..., Any]
UNFUSED = Path(__file__).parents[2] / "docs" / "examples" / "unfused.plan"
HF = ("hf:config.json", "--seq-len", "32")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "budget"), [(("factories:tiny",), "4MiB"), (HF, "1200KiB")])
def test_a_step_is_exported_and_solved_from_its_file(invoke: Invoke, model: tuple[str, ...], budget: str) -> None:
    """The same graph and costs, so the same seconds, peak, baseline and smallest budget; the program is the plan's."""
    words = ("plan", *model, "--budget", budget, "--export", "graph.json", "-o", "step.plan", "--json")
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["graph_file"] == "graph.json"
    plan, file = load_plan("step.plan"), read_graph("graph.json")
    assert file.graph == plan.graph
    assert file.cost.seconds == plan.cost.seconds
    assert file.cost.scratch == plan.cost.scratch
    assert plan.num_replays > 0
    done = invoke("solve", "graph.json", "--budget", str(plan.budget.device), "-o", "program.txt", "--json")
    assert done.exit_code == 0, done.output
    solved = json.loads(done.stdout)
    assert solved["plan"]["seconds"] == plan.predicted_seconds
    assert solved["plan"]["peak"] == plan.predicted_peak
    assert solved["plan"]["num_replays"] == plan.num_replays
    assert solved["given"]["seconds"] == plan.baseline_seconds
    assert with_reserve(solved["given"]["peak"]) == plan.baseline_peak
    assert with_reserve(solved["smallest_peak"]) == plan.smallest_budget
    assert solved["bound_seconds"] == pytest.approx(plan.certificate.bound_seconds)
    checked = json.loads(invoke("check", "graph.json", "program.txt", "--json").stdout)
    assert checked["seconds"] == pytest.approx(plan.predicted_seconds)
    assert checked["peak"] == plan.predicted_peak


@pytest.mark.slow
def test_people_are_told_where_it_is(invoke: Invoke) -> None:
    """As a line of the report; a folder is refused."""
    done = invoke("plan", "factories:tiny", "--budget", "4MiB", "--export", "graph.json")
    assert done.exit_code == 0, done.output
    assert "graph    graph.json" in done.stdout
    Path("folder").mkdir()
    done = invoke("plan", "factories:tiny", "--budget", "4MiB", "--export", "folder")
    assert done.exit_code == 2, done.output
    assert "folder" in done.stderr
    assert "Traceback" not in done.output


def test_a_plan_file_is_shown_for_other_tools(invoke: Invoke) -> None:
    """As the exporters give it; as JSON, and for people."""
    plan = load_plan(UNFUSED)
    expected = {
        "names": names_of(plan).as_dict(),
        "every-n-layers": every_n_layers(plan).as_dict(),
        "selective": {"layers": {path: saved_calls(plan, path) for path in layers_of(plan)}},
    }
    said = {"names": "save       layers.0.up.addmm_0_0\n", "every-n-layers": "every_n_layers=1 of the 4 layers"}
    for kind, answer in expected.items():
        done = invoke("show", str(UNFUSED), "--export", kind, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout) == answer
        text = invoke("show", str(UNFUSED), "--export", kind, "--quiet").stdout
        assert said.get(kind, "aten.addmm.default") in text
    for words in (("--export", "nope"), ("--export", "names", "--values")):
        assert invoke("show", str(UNFUSED), *words).exit_code == 2
