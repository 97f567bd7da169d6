"""Modules, generators and counters that a region reaches through other objects: rows 3, 7, 9 and 36.

One code object runs with many modules: a checkpoint that remembers by code alone mistakes one for another.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from rows import EQUAL_OR_REFUSED, WRONG, Checkpoint, Row, Table, batches, judge, torch_differs, train
from torch import Tensor, nn

TABLE = Table()


def normalised() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())


@TABLE.row(7, torch=WRONG)
def layer_as_a_default_argument(checkpoint: Checkpoint) -> dict[str, object]:
    """The usual way around late binding: one code object, other defaults."""
    layers = nn.ModuleList(normalised() for _ in range(3))

    def loss_of(x: Tensor) -> Tensor:
        for layer in layers:
            x = checkpoint(lambda t, layer=layer: layer(t), x, use_reentrant=False)
        return x.square().mean()

    return train(layers, loss_of, batches(4, 6))


@TABLE.row(7, torch=WRONG)
def layers_in_a_list_argument(checkpoint: Checkpoint) -> dict[str, object]:
    layers = nn.ModuleList(normalised() for _ in range(4))

    def run(group: list[nn.Module], x: Tensor) -> Tensor:
        for layer in group:
            x = layer(x)
        return x

    def loss_of(x: Tensor) -> Tensor:
        for start in (0, 2):
            x = checkpoint(run, [layers[start], layers[start + 1]], x, use_reentrant=False)
        return x.square().mean()

    return train(layers, loss_of, batches(4, 6))


@TABLE.row(7, torch=WRONG)
def layer_as_a_keyword(checkpoint: Checkpoint) -> dict[str, object]:
    layers = nn.ModuleList(normalised() for _ in range(3))

    def run(x: Tensor, *, layer: nn.Module) -> Tensor:
        return layer(x)

    def loss_of(x: Tensor) -> Tensor:
        for layer in layers:
            x = checkpoint(run, x, layer=layer, use_reentrant=False)
        return x.square().mean()

    return train(layers, loss_of, batches(4, 6))


@TABLE.row(7, torch=WRONG)
def layer_chosen_by_an_index(checkpoint: Checkpoint) -> dict[str, object]:
    layers = nn.ModuleList(normalised() for _ in range(3))

    def run(x: Tensor, index: int) -> Tensor:
        return layers[index](x)

    def loss_of(x: Tensor) -> Tensor:
        for index in range(3):
            x = checkpoint(run, x, index, use_reentrant=False)
        return x.square().mean()

    return train(layers, loss_of, batches(4, 6))


@TABLE.row(7, torch=WRONG)
def layer_on_a_plain_object(checkpoint: Checkpoint) -> dict[str, object]:
    layers = nn.ModuleList(normalised() for _ in range(3))

    def loss_of(x: Tensor) -> Tensor:
        for layer in layers:
            trainer = Namespace(model=layer)
            x = checkpoint(lambda t: trainer.model(t), x, use_reentrant=False)  # noqa: B023
        return x.square().mean()

    return train(layers, loss_of, batches(4, 6))


@TABLE.row(3, rule=EQUAL_OR_REFUSED, torch=WRONG)
def generator_made_anew_each_step(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)

    def loss_of(x: Tensor) -> Tensor:
        tools = Namespace(noise=torch.Generator().manual_seed(3))
        loss = checkpoint(
            lambda t: torch.sin(layer(t) * torch.rand(4, 6, generator=tools.noise)), x, use_reentrant=False
        ).sum()
        return loss * torch.rand((), generator=tools.noise)

    return train(layer, loss_of, batches(4, 6))


@TABLE.row(9, rule=EQUAL_OR_REFUSED, torch=WRONG)
def counter_on_a_plain_object(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    state = Namespace(calls=0)

    def region(x: Tensor) -> Tensor:
        state.calls += 1
        return torch.sin(layer(x) / state.calls)

    found = train(layer, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(4, 6))
    return {**found, "calls": state.calls}


@TABLE.row(9, rule=EQUAL_OR_REFUSED, torch=WRONG)
def counter_of_a_closure(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    calls = 0

    def region(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.sin(layer(x) / calls)

    found = train(layer, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(4, 6))
    return {**found, "calls": calls}


class Step:
    """A callable object that counts its calls."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.sin(self.layer(x) / self.calls)


@TABLE.row(9, rule=EQUAL_OR_REFUSED, torch=WRONG, recomputes=None)
def counter_of_a_callable_object(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    step = Step(layer)
    found = train(layer, lambda x: checkpoint(step, x, use_reentrant=False).sum(), batches(4, 6))
    return {**found, "calls": step.calls}


@TABLE.row(36, rule=EQUAL_OR_REFUSED, torch=WRONG)
def states_in_nested_containers(checkpoint: Checkpoint) -> dict[str, object]:
    layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
    record = Namespace(states=[])
    cache: dict[str, list[Tensor]] = {"seen": []}

    def region(layer: nn.Module, x: Tensor) -> Tensor:
        x = layer(x).tanh()
        cache["seen"].append(x.detach().clone())
        record.states.append(x.detach().mean())
        return x.sin()

    def loss_of(x: Tensor) -> Tensor:
        for layer in layers:
            x = checkpoint(region, layer, x, use_reentrant=False)
        return x.sum()

    return {**train(layers, loss_of, batches(3, 6)), "cache": cache, "record": record.states}


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)
