"""Chains of equal steps are run as often as the binomial optimum says, exactly, up to a thousand steps.

On these chains the machine's limit is a number of states: a step's backward reads the state that the step began with,
and its scratch is above all that the forward needs for a moment. So what a limit allows between two backward ops is
`slots` states beside the first one, and no order can need fewer runs than the schedule of Griewank and Walther.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_classics import steps
from test_solve_models import chain, gpt, unet

from keepless.cost import CostModel
from keepless.ir import Effect, Graph, Kind, Op, Phase, Value
from keepless.solve import SOLVERS
from keepless.solve.classics import binomial_cost
from keepless.solve.classics.alike import steps_are_alike
from keepless.solve.tables import Tables

STATE = 1000
SCRATCH = 10 * STATE


def equal_steps(num: int) -> tuple[Graph, CostModel]:
    """`num` steps from a given state, a loss, and their backward."""
    values = [
        Value(0, "x0", STATE, Kind.INPUT),
        *(Value(k + 1, f"x{k + 1}", STATE, Kind.ACTIVATION) for k in range(num)),
    ]
    ops = [Op(k, "step", (k,), (k + 1,), Phase.FORWARD) for k in range(num)]
    values.append(Value(num + 1, "g", STATE, Kind.GRAD))
    ops.append(Op(num, "loss", (num,), (num + 1,), Phase.LOSS, frozenset({Effect.OPAQUE})))
    for k in reversed(range(num)):
        made = len(values)
        values.append(Value(made, f"g{k}", STATE, Kind.GRAD))
        ops.append(Op(len(ops), "back", (k, made - 1), (made,), Phase.BACKWARD))
    scratch = tuple(SCRATCH if op.phase is Phase.BACKWARD else 0 for op in ops)
    graph = Graph(tuple(ops), tuple(values), frozenset({0}), frozenset({0, len(values) - 1}))
    return graph, CostModel((1e-3,) * len(ops), scratch)


def runs_again(name: str, num: int, slots: int) -> int:
    """Replays of a solver's order within the limit for so many states beside the first."""
    graph, cost = equal_steps(num)
    limit = STATE * (1 + slots) + 2 * STATE + SCRATCH  # two gradients at each backward op
    found = SOLVERS[name].solve(graph, cost, limit)
    assert found.peak <= limit
    return len(found.order) - len(graph.ops)


def optimum(num: int, slots: int) -> int:
    """Griewank and Walther count every forward run but those right before a backward; each step has its first run."""
    return binomial_cost(num, slots) - (num - 1)


@pytest.mark.parametrize(("num", "slots"), [(1, 1), (2, 1), (10, 2), (20, 3), (100, 1), (100, 9), (300, 4), (1000, 29)])
def test_revolve_is_the_optimum(num: int, slots: int) -> None:
    """Whatever the number of slots, the schedule's order has exactly so many replays."""
    assert runs_again("revolve", num, slots) == optimum(num, slots)


@pytest.mark.parametrize(("num", "slots"), [(1, 1), (2, 1), (10, 2), (20, 3), (100, 3), (300, 4)])
def test_the_default_planner_is_the_optimum(num: int, slots: int) -> None:
    """So does the default planner."""
    assert runs_again("keepless", num, slots) == optimum(num, slots)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["revolve", "keepless"])
@pytest.mark.parametrize(
    ("num", "slots"),
    [
        (60, 3),
        (500, 5),
        (1000, 1),
        (1000, 999),
        *(pytest.param(*one, marks=pytest.mark.exhaustive) for one in ((100, 1), (1000, 2), (1000, 7), (1000, 199))),
    ],
)
def test_up_to_a_thousand_steps(name: str, num: int, slots: int) -> None:
    """From one slot, half a million replays, to one per step, none."""
    assert runs_again(name, num, slots) == optimum(num, slots)


@pytest.mark.slow
def test_the_limit_is_that_of_the_states() -> None:
    """Below the smallest limit nothing fits, and with one slot fewer the optimum is another."""
    graph, cost = equal_steps(12)
    found = SOLVERS["keepless"].solve(graph, cost, STATE * (1 + 2) + SCRATCH)
    assert found.peak > STATE * (1 + 2) + SCRATCH
    assert runs_again("keepless", 12, 2) > runs_again("keepless", 12, 3) == optimum(12, 3)


def test_chains_of_equal_steps_are_recognised() -> None:
    """Ends may differ; one step of another time, size or backward ends it; networks are none."""
    for graph, cost in (equal_steps(30), steps(30), chain(30)):
        assert steps_are_alike(Tables(graph, cost))
    graph, cost = equal_steps(30)
    for op in (15, 45):
        slower = tuple(2 * s if at == op else s for at, s in enumerate(cost.seconds))
        assert not steps_are_alike(Tables(graph, replace(cost, seconds=slower)))
    wide = tuple(replace(v, nbytes=2 * v.nbytes) if v.id == 15 else v for v in graph.values)
    assert not steps_are_alike(Tables(replace(graph, values=wide), cost))
    skip = tuple(replace(op, inputs=(10, 15)) if op.id == 15 else op for op in graph.ops)
    assert not steps_are_alike(Tables(replace(graph, ops=skip), cost))
    for graph, cost in (gpt(2), unet(2), equal_steps(2)):
        assert not steps_are_alike(Tables(graph, cost))
