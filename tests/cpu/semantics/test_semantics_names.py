"""What a region's code names is what it was in the forward: globals, attributes, submodules, functions as arguments."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Checkpoint = Callable[..., Any]
Case = Callable[[Checkpoint, nn.ModuleList, Tensor], Tensor]

CURRENT: Any = None
LAYERS: Any = None


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3))


def global_module_in_a_loop(checkpoint: Checkpoint, layers: nn.ModuleList, x: Tensor) -> Tensor:
    global CURRENT
    for layer in layers:
        CURRENT = layer
        x = checkpoint(lambda t: CURRENT(t), x, use_reentrant=False)  # noqa: B023
    return x


def global_function_in_a_loop(checkpoint: Checkpoint, layers: nn.ModuleList, x: Tensor) -> Tensor:
    global CURRENT
    for layer, activation in zip(layers, (torch.tanh, torch.sigmoid, torch.sin), strict=True):
        CURRENT = activation
        x = checkpoint(lambda t, layer=layer: CURRENT(layer(t)), x, use_reentrant=False)  # noqa: B023
    return x


def _by_index(x: Tensor, index: int) -> Tensor:
    return LAYERS[index](x)


def global_layers_by_index(checkpoint: Checkpoint, layers: nn.ModuleList, x: Tensor) -> Tensor:
    global LAYERS
    LAYERS = layers
    for index in range(len(layers)):
        x = checkpoint(_by_index, x, index, use_reentrant=False)
    return x


def _apply(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def bound_methods_as_arguments(checkpoint: Checkpoint, layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = checkpoint(_apply, layer.forward, x, use_reentrant=False)
    return x


def late_bound_functions_as_arguments(checkpoint: Checkpoint, layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = checkpoint(_apply, lambda t: layer(t), x, use_reentrant=False)  # noqa: B023
    return x


class Holder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.current(x) * self.weight)


def submodule_and_attributes_bound_anew(checkpoint: Checkpoint, layers: nn.ModuleList, x: Tensor) -> Tensor:
    holder = Holder()
    for number, layer in enumerate(layers):
        holder.current = layer
        holder.activation = (torch.tanh, torch.sigmoid, torch.sin)[number]
        holder.weight = layer[0].weight.sum(0) * (number + 1.0)
        x = checkpoint(holder, x, use_reentrant=False)
    return x


def module_on_an_object(checkpoint: Checkpoint, layers: nn.ModuleList, x: Tensor) -> Tensor:
    tools = SimpleNamespace(layer=None)
    for layer in layers:
        tools.layer = layer
        x = checkpoint(lambda t: tools.layer(t), x, use_reentrant=False)
    return x


CASES = (
    global_module_in_a_loop,
    global_function_in_a_loop,
    global_layers_by_index,
    bound_methods_as_arguments,
    late_bound_functions_as_arguments,
    submodule_and_attributes_bound_anew,
    module_on_an_object,
)


def _steps(case: Case, checkpoint: Checkpoint, number: int, wants_gradient: bool) -> list[Tensor]:
    torch.manual_seed(0)
    layers = nn.ModuleList(block() for _ in range(number))
    found = []
    for _ in range(3):
        x = torch.randn(6, 4, requires_grad=wants_gradient)
        layers.zero_grad()
        loss = case(checkpoint, layers, x).pow(2).sum()
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in layers.parameters() if p.grad is not None), torch.rand(2)]
    return found + [buffer.clone() for buffer in layers.buffers()]


@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_names_mean_what_they_meant(case: Case, wants_gradient: bool, candidate: Checkpoint) -> None:
    expected = _steps(case, lambda f, *args, use_reentrant: f(*args), 3, wants_gradient)
    got = _steps(case, candidate, 3, wants_gradient)
    assert [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True] * len(expected)


def test_layers_of_a_large_model_by_index(candidate: Checkpoint) -> None:
    """Above 64 modules: the statistics of layers that the watched call did not reach are updated once, too."""

    class Net(nn.Module):
        def __init__(self, run: Checkpoint) -> None:
            super().__init__()
            self.layers = nn.ModuleList(block() for _ in range(20))
            self.run = run

        def one(self, x: Tensor, index: int) -> Tensor:
            return self.layers[index](x)

        def forward(self, x: Tensor) -> Tensor:
            for index in range(20):
                x = self.run(self.one, x, index, use_reentrant=False)
            return x

    found = []
    for run in (lambda f, *args, use_reentrant: f(*args), candidate):
        torch.manual_seed(0)
        net = Net(run)
        for _ in range(2):
            net(torch.randn(6, 4, requires_grad=True)).pow(2).sum().backward()
        found.append([*(p.grad for p in net.parameters()), *net.buffers(), torch.rand(2)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
