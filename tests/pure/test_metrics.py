"""A plan as metrics for loggers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from keepless.cost import CostModel
from keepless.integrations.metrics import memory_metrics, num_parameters
from keepless.ir import Budget, Certificate, Status
from keepless.ir.text import parse_graph, parse_program
from keepless.machine import Baseline, Plan, make_plan


@pytest.fixture
def plan() -> Plan:
    """Peak 28 bytes in a budget of 40; 7 s where everything kept takes 5.6 s; 16 numbers in two parameters."""
    graph = parse_graph(
        'value 0 "x" 4 input f\nvalue 1 "a" 8 activation f\nvalue 2 "b" 16 output f\nvalue 3 "t" 1 grad f\n'
        'value 4 "g" 4 grad f\nop 0 "f" forward in 0 out 1\nop 1 "g" forward in 1 out 2\nop 2 "loss" loss in 2 out 3\n'
        'op 3 "h" backward in 1 3 out 4\ninputs 0\npinned 4\n'
    )
    program = parse_program(
        "run 0 keep 1\nrun 1 keep 2\ndrop 1\nrun 2 keep 3\ndrop 2\nrun 0 replay 1 keep 1\ndrop 0\n"
        "run 3 keep 4\ndrop 1\ndrop 3\n"
    )
    table = {"a": ["torch.float32", [3, 4], True], "b": ["torch.float32", [4], False]}
    return make_plan(
        graph,
        program,
        CostModel((1.0, 2.0, 0.0, 3.0), (0, 0, 0, 2)),
        Budget({"device": 40}),
        Certificate("order", Status.FEASIBLE),
        baseline=Baseline(29, 5.6),
        signature={"parameters": table},
    )


def test_a_plan_as_metrics(plan: Plan) -> None:
    """GB are 10**9 bytes; the measured peak is there only where it is known, and then counts for the parameters."""
    assert num_parameters(plan) == 16
    assert memory_metrics(plan) == pytest.approx(
        {
            "memory/peak_predicted_gb": 28e-9,
            "memory/budget_gb": 40e-9,
            "memory/recompute_overhead_pct": 25.0,
            "memory/params_per_gb": 16 / 28e-9,
        }
    )
    measured = memory_metrics(plan, 32)
    assert measured["memory/peak_measured_gb"] == pytest.approx(32e-9)
    assert measured["memory/params_per_gb"] == pytest.approx(16 / 32e-9)
    assert memory_metrics(replace(plan, measured_peak=20))["memory/peak_measured_gb"] == pytest.approx(20e-9)


def test_a_plan_that_does_not_know_its_model(plan: Plan) -> None:
    """No parameters, no share of them."""
    assert "memory/params_per_gb" not in memory_metrics(replace(plan, signature={}))


def test_importing_imports_no_library() -> None:
    """The package of integrations and its shared part load without any of the tools that they are for."""
    code = (
        "import sys, keepless, keepless.integrations, keepless.integrations.metrics\n"
        "tools = {'torch', 'transformers', 'accelerate', 'peft', 'trl', 'lightning', 'timm', 'diffusers', 'wandb'}\n"
        "print(sorted(tools & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
