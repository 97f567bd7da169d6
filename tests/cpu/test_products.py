"""The two products of a linear layer's backward: which comes first, what it saves, and that bits stay."""

from __future__ import annotations

from dataclasses import replace

import torch
from models import capture, run_step
from torch import nn

import keepless
from keepless.capture import Inputs
from keepless.cost import CostModel
from keepless.ir import Graph, Kind, Op, Phase
from keepless.machine import simulate
from keepless.passes import from_order

PRODUCTS = ("aten.mm.default", "aten.bmm.default")


class Net(nn.Module):
    """Linear layers with what is left of a tensor between them; its output is its loss."""

    def __init__(self, wide: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(32, wide), nn.GELU(), nn.Linear(wide, wide), nn.Dropout(0.2), nn.Linear(wide, 8)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def products(graph: Graph) -> list[Op]:
    """Of the backward, in order."""
    return [op for op in graph.ops if op.phase is Phase.BACKWARD and op.name in PRODUCTS]


def whose(graph: Graph) -> list[str]:
    """ "weight" for a product that makes a parameter's gradient."""
    made = [{graph.values[v].kind for v in op.outputs} for op in products(graph)]
    return ["weight" if Kind.GRAD in kinds else "input" for kinds in made]


def peak(graph: Graph) -> int:
    many = len(graph.ops)
    return simulate(graph, from_order(graph, list(range(many))), CostModel((0.0,) * many, (0,) * many)).peak


def test_the_weight_comes_first_where_the_input_goes_then() -> None:
    graph = capture(Net(), torch.randn(16, 32))[1].graph
    assert whose(graph) == ["weight", "input", "weight", "input", "weight"]


def test_an_input_that_stays_leaves_the_order_as_it_is() -> None:
    """The batch stays whatever comes first: nothing could be saved."""
    x = torch.randn(16, 32, requires_grad=True)
    graph = capture(Net(), x)[1].graph
    assert [graph.values[op.outputs[0]].shape for op in products(graph)[-2:]] == [(16, 32), (64, 32)]


class MadeWeight(nn.Module):
    """A weight that is made in the step, and is larger than what it is multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 256) / 16)
        self.inner = nn.Linear(32, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.inner(x).sin() @ self.weight.sin()).cos().mean()


def test_a_weight_that_goes_with_the_inputs_product_keeps_it_first() -> None:
    graph = capture(MadeWeight(), torch.randn(4, 32))[1].graph
    first, second = products(graph)[:2]
    nbytes = [sum(graph.values[v].nbytes for v in set(op.inputs)) for op in (first, second)]
    assert nbytes[0] > nbytes[1]


def test_the_plain_step_is_lower_than_in_autograds_order() -> None:
    """At its peak a layer's input stands no longer beside that input's gradient."""
    graph = capture(Net(256), torch.randn(2048, 32))[1].graph
    ops = list(graph.ops)
    for first, second in zip(products(graph)[:-1:2], products(graph)[1::2], strict=True):
        assert second.id == first.id + 1
        ops[first.id], ops[second.id] = replace(second, id=first.id), replace(first, id=second.id)
    assert peak(graph) < peak(replace(graph, ops=tuple(ops)))


def test_bits_are_eagers() -> None:
    x = torch.randn(512, 32)
    model = Net(256)
    plain = run_step(model, Inputs.of(x))
    smallest = keepless.plan(model, x, 1 << 40, engine="graph").smallest_budget
    plan = keepless.plan(model, x, smallest, engine="graph")
    assert plan.num_replays
    keepless.apply(model, plan)
    assert not run_step(model, Inputs.of(x)).differences(plain)
