"""Names that a region, or the loop around it, binds anew, at once or from a later step on: rows 9 and 57."""

from __future__ import annotations

import collections
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rows import (
    EQUAL_OR_REFUSED,
    REFUSES,
    WRONG,
    Checkpoint,
    Row,
    Table,
    attempt,
    batches,
    bits,
    differences,
    judge,
    plain,
    torch_differs,
    train,
)
from torch import Tensor, nn

import keepless
from keepless.errors import RecomputeError

TABLE = Table()


def from_step(checkpoint: Checkpoint, number: int, change: Callable[[nn.Module, Tensor], None]) -> dict[str, object]:
    """Five steps of a region that begins with `change(layer, h)` in step `number`."""
    layer = nn.Linear(6, 6)
    layer.register_buffer("mean", torch.ones(6))
    step = Namespace(number=0)

    def region(x: Tensor) -> Tensor:
        h = layer(x)
        if step.number >= number:
            with torch.no_grad():
                change(layer, h)
        return torch.sin(h * layer.mean.clone())

    found = []
    for x in batches(4, 6, count=5):
        found.append(
            train(layer, lambda t: attempt(lambda: checkpoint(region, t, use_reentrant=False).sum(), layer), [x])
        )
        step.number += 1
    return {"found": found}


@TABLE.row(9, torch=WRONG)
def buffer_bound_anew_from_the_third_step(checkpoint: Checkpoint) -> dict[str, object]:
    def change(layer: Any, h: Tensor) -> None:
        layer.mean = 0.9 * layer.mean + 0.1 * h.mean(0)

    return from_step(checkpoint, 3, change)


@TABLE.row(9, torch=WRONG)
def buffer_bound_anew_after_changes_in_place(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    layer.register_buffer("mean", torch.ones(6))
    step = Namespace(number=0)

    def region(x: Tensor) -> Tensor:
        h = layer(x)
        with torch.no_grad():
            if step.number < 2:
                layer.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
            else:
                layer.mean = 0.9 * layer.mean + 0.1 * h.mean(0)
        return torch.sin(h * layer.mean.clone())

    found = []
    for x in batches(4, 6, count=5):
        found.append(
            train(layer, lambda t: attempt(lambda: checkpoint(region, t, use_reentrant=False).sum(), layer), [x])
        )
        step.number += 1
    return {"found": found}


@TABLE.row(9, rule=EQUAL_OR_REFUSED, torch=WRONG)
def attribute_first_set_in_a_later_step(checkpoint: Checkpoint) -> dict[str, object]:
    def change(layer: Any, h: Tensor) -> None:
        if not hasattr(layer, "first"):
            layer.first = h.mean(0)
        else:
            layer.mean.copy_(layer.mean * layer.first)

    return from_step(checkpoint, 3, change)


@TABLE.row(9, torch=REFUSES)
def attribute_made_in_a_later_step(checkpoint: Checkpoint) -> dict[str, object]:
    """The step that makes it must be recomputed without it."""
    layer = nn.Linear(6, 6)
    step = Namespace(number=0)

    def region(x: Tensor) -> Tensor:
        h = layer(x)
        if step.number >= 2:
            if hasattr(layer, "first"):
                h = h * layer.first
            else:
                layer.first = h.detach().mean(0)
                h = h * 2
        return torch.sin(h)

    found = []
    for x in batches(4, 6, count=5):
        found.append(train(layer, lambda t: checkpoint(region, t, use_reentrant=False).sum(), [x]))
        step.number += 1
    return {"found": found, "first": layer.first}


def registered_later(checkpoint: Checkpoint, register: Callable[[nn.Module, Tensor], None]) -> dict[str, object]:
    """Five steps; the third registers `first` on the layer, later ones read it."""
    layer = nn.Linear(6, 6)
    step = Namespace(number=0)

    def region(x: Tensor) -> Tensor:
        h = layer(x)
        if step.number >= 2:
            if hasattr(layer, "first"):
                h = h * layer.first
            else:
                register(layer, h.detach().mean(0))
                h = h * (layer.first * 2)
        return torch.sin(h)

    found = []
    for x in batches(4, 6, count=5):
        found.append(train(layer, lambda t: checkpoint(region, t, use_reentrant=False).sum(), [x]))
        step.number += 1
    return {"found": found}


@TABLE.row(9, torch=WRONG)
def buffer_registered_in_a_later_step(checkpoint: Checkpoint) -> dict[str, object]:
    return registered_later(checkpoint, lambda layer, value: layer.register_buffer("first", value))


@TABLE.row(9, torch=WRONG)
def attribute_of_a_computed_name_in_a_later_step(checkpoint: Checkpoint) -> dict[str, object]:
    return registered_later(checkpoint, lambda layer, value: setattr(layer, "fi" + "rst", value))


@TABLE.row(9, torch=WRONG)
def average_begins_where_regions_are_forgotten(checkpoint: Checkpoint) -> dict[str, object]:
    """The remedy of the error: the step that begins is watched, and none is refused."""
    layer = nn.Linear(6, 6)
    layer.register_buffer("mean", torch.ones(6))
    step = Namespace(number=0)

    def region(x: Tensor) -> Tensor:
        h = layer(x)
        if step.number >= 2:
            layer.mean.mul_(h.detach().mean(0).cos())
        return torch.sin(h * layer.mean.clone())

    found = []
    for x in batches(4, 6, count=5):
        if step.number == 2:
            keepless.forget_regions()
        found.append(train(layer, lambda t: checkpoint(region, t, use_reentrant=False).sum(), [x]))
        step.number += 1
    return {"found": found}


@TABLE.row(36, torch=WRONG)
def queues_and_counters(checkpoint: Checkpoint) -> dict[str, object]:
    """A queue of the last states, of which the oldest falls out, and counts by name; both are read."""
    layer = nn.Linear(6, 6)
    tools = Namespace(last=collections.deque(maxlen=2), num=collections.Counter(), by=collections.defaultdict(list))

    def region(x: Tensor) -> Tensor:
        h = layer(x)
        tools.last.append(h.detach().mean(0).cos())
        tools.num["calls"] += 1
        tools.by["first"].append(tools.num["calls"])
        return torch.sin(h * sum(tools.last) / len(tools.by["first"]))

    found = train(layer, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(4, 6, count=4))
    return {**found, "last": list(tools.last), "num": dict(tools.num), "by": dict(tools.by)}


class Switching(nn.Module):
    """Sets attributes for the time of its forward, and not in a `finally`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("scale", torch.ones(6))
        self.power = 1

    def forward(self, x: Tensor) -> Tensor:
        scale, power = self.scale, self.power
        self.scale, self.power = scale * 2, power + 1
        h = torch.sin(self.linear(x) * self.scale) ** self.power
        self.scale, self.power = scale, power
        return h + 1


@TABLE.row(9, torch=WRONG)
def attributes_set_for_the_time_of_the_forward(checkpoint: Checkpoint) -> dict[str, object]:
    """The recompute ends at its last saved tensor, before they are set again."""
    layer = Switching()
    found = train(layer, lambda x: checkpoint(layer, x, use_reentrant=False).sum(), batches(4, 6, count=4))
    return {**found, "power": layer.power}


@TABLE.row(57, torch=WRONG)
def cell_bound_for_the_time_of_the_forward(checkpoint: Checkpoint) -> dict[str, object]:
    """The recompute ends before the variable of the enclosing function is bound again."""
    layer = nn.Linear(6, 6)
    scale = 1.0

    def region(x: Tensor) -> Tensor:
        nonlocal scale
        before, scale = scale, scale * 2
        h = torch.sin(layer(x) * scale)
        scale = before
        return h + 1

    found = train(layer, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(4, 6, count=4))
    return {**found, "scale": scale}


@TABLE.row(57, torch=WRONG)
def buffer_rebound_before_the_backward(checkpoint: Checkpoint) -> dict[str, object]:
    """Plain autograd saved the buffer that the forward read; in the first step, and in later ones."""
    layer = nn.Linear(6, 6)
    layer.register_buffer("scale", torch.ones(6))

    def loss_of(x: Tensor) -> Tensor:
        loss = checkpoint(lambda t: torch.sin(layer(t) * layer.scale), x, use_reentrant=False).sum()
        layer.scale = layer.scale * 0.5
        return loss

    return train(layer, loss_of, batches(4, 6, count=4))


@TABLE.row(57, torch=WRONG)
def written_buffer_rebound_before_the_backward(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    layer.register_buffer("mean", torch.ones(6))

    def region(t: Tensor) -> Tensor:
        h = layer(t)
        layer.mean.mul_(h.detach().mean(0).cos())
        return torch.sin(h * layer.mean.clone())

    def loss_of(x: Tensor) -> Tensor:
        loss = checkpoint(region, x, use_reentrant=False).sum()
        layer.mean = layer.mean * 0.5
        return loss

    return train(layer, loss_of, batches(4, 6, count=4))


@TABLE.row(57, torch=WRONG)
def submodule_replaced_before_the_backward(checkpoint: Checkpoint) -> dict[str, object]:
    """Nobody but the region's own call holds the old one any more."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.gate: nn.Module = nn.LeakyReLU(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.gate(self.linear(x))) ** 2

    net = Net()

    def loss_of(x: Tensor) -> Tensor:
        loss = checkpoint(net, x, use_reentrant=False).sum() + checkpoint(net, x, use_reentrant=False).sum()
        net.gate = nn.LeakyReLU(0.2)
        loss = loss + checkpoint(net, x, use_reentrant=False).sum()
        net.gate = nn.LeakyReLU(0.3)
        return loss + checkpoint(net, x, use_reentrant=False).sum()

    return train(net, loss_of, batches(4, 6, count=4))


@TABLE.row(57, torch=REFUSES)
def constant_changed_before_the_backward(checkpoint: Checkpoint) -> dict[str, object]:
    """A number, a string and a tuple, in the first step and in later ones."""
    layer = nn.Linear(6, 6)
    tools = Namespace(scale=1.5, kind="sin", shape=(6,))

    def region(x: Tensor) -> Tensor:
        h = layer(x) * tools.scale
        h = nn.functional.layer_norm(h.reshape(-1, *tools.shape), tools.shape)
        return h.sin() if tools.kind == "sin" else h.cos()

    def loss_of(x: Tensor) -> Tensor:
        loss = checkpoint(region, x, use_reentrant=False).square().sum()
        tools.scale, tools.kind, tools.shape = tools.scale + 1, "cos" if tools.kind == "sin" else "sin", (3,)
        loss = loss + checkpoint(region, x, use_reentrant=False).square().sum()
        tools.shape = (6,)
        return loss

    return train(layer, loss_of, batches(4, 6, count=5))


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)


def test_a_loop_goes_on_after_a_refused_step(candidate: Checkpoint) -> None:
    """The error names what was changed and what to do; with the state put back the step runs right, as do all after."""
    layers = [nn.Linear(6, 6), nn.Linear(6, 6)]
    layers[1].load_state_dict(layers[0].state_dict())
    found = []
    for layer, checkpoint in zip(layers, (plain, candidate), strict=True):
        layer.register_buffer("mean", torch.ones(6))
        step = Namespace(number=0)

        def region(x: Tensor, layer: Any = layer, step: Any = step) -> Tensor:
            h = layer(x)
            if step.number >= 2:
                layer.mean.mul_(h.detach().mean(0).cos())
            return torch.sin(h * layer.mean.clone())

        for x in batches(4, 6, count=5):
            before = layer.mean.clone()
            if checkpoint is candidate and step.number == 2:
                with pytest.raises(RecomputeError, match=r"Linear\.mean of shape \[6\] in place.*forget_regions"):
                    checkpoint(region, x, use_reentrant=False)
                layer.mean.copy_(before)
            found.append(train(layer, lambda t, f=region, c=checkpoint: c(f, t, use_reentrant=False).sum(), [x]))
            step.number += 1
    for one, other in zip(found[:5], found[5:], strict=True):
        for name in ("losses", "steps", "buffers"):
            assert differences(bits(one[name]), bits(other[name])) == []
