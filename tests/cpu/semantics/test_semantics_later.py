"""What a region does only in a later call, or with tensors that its first call did not have: rows 3, 4, 9, 20, 31, 57.

A checkpoint that learns from the first call must see these too, or refuse.
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from rows import (
    EQUAL_OR_REFUSED,
    RAISES,
    RIGHT,
    WRONG,
    Checkpoint,
    Row,
    Table,
    attempt,
    batches,
    draws,
    judge,
    state_of,
    torch_differs,
    train,
)
from torch import Tensor, nn

from keepless.eager import checkpoint_counters, forget_regions, reset_checkpoint_counters

TABLE = Table()


@TABLE.row(9, rule=EQUAL_OR_REFUSED, torch=WRONG)
def buffer_updated_from_the_second_step(checkpoint: Checkpoint) -> dict[str, object]:
    """The average starts after a warm-up, as EMA and observers are often enabled later."""
    layer = nn.Linear(6, 6)
    layer.register_buffer("mean", torch.ones(6))
    step = Namespace(number=0)

    def region(x: Tensor) -> Tensor:
        h = layer(x)
        if step.number > 0:
            with torch.no_grad():
                layer.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return torch.sin(h * layer.mean.clone())

    def loss_of(x: Tensor) -> Tensor:
        return attempt(lambda: checkpoint(region, x, use_reentrant=False).sum(), layer)

    found = []
    for x in batches(4, 6, count=4):
        found.append(train(layer, loss_of, [x]))
        step.number += 1
    return {"found": found}


@TABLE.row(3, rule=EQUAL_OR_REFUSED, torch=WRONG)
def generator_first_used_in_a_later_step(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    tools = Namespace(step=0, noise=torch.Generator().manual_seed(3))

    def region(x: Tensor) -> Tensor:
        h = layer(x)
        if tools.step > 0:
            h = h * torch.rand(h.shape, generator=tools.noise)
        return torch.sin(h)

    found = []
    for x in batches(4, 6, count=3):
        found.append(train(layer, lambda t: checkpoint(region, t, use_reentrant=False).sum(), [x], tools.noise))
        tools.step += 1
    return {"found": found}


def jittered(x: Tensor, tools: Namespace) -> Tensor:
    """A helper that draws from Python's stream, from a later step on."""
    return x * random.uniform(0.5, 1.5) if tools.step > 0 else x


@TABLE.row(4, rule=EQUAL_OR_REFUSED, torch=WRONG)
def python_random_in_a_helper_later(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    tools = Namespace(step=0)
    found = []
    for x in batches(4, 6, count=3):
        found.append(
            train(
                layer,
                lambda t: checkpoint(lambda u: torch.sin(layer(jittered(u, tools))), t, use_reentrant=False).sum(),
                [x],
            )
        )
        tools.step += 1
    return {"found": found}


def third_step(
    checkpoint: Checkpoint, region: Callable[..., Any], layer: nn.Module, change: Callable[[], Any], *args: Any
) -> dict[str, object]:
    """Two good steps of a region, then one in which `change()` comes between forward and backward."""
    for x in batches(4, 6, count=2):
        checkpoint(region, x, *args, use_reentrant=False).sum().backward()
    loss = checkpoint(region, torch.ones(4, 6), *args, use_reentrant=False).sum()
    change()
    attempt(loss.backward, layer)
    return {**state_of(layer), "draws": draws()}


@TABLE.row(20, rule=RAISES, torch=WRONG)
def parameter_changed_in_the_third_step(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    return third_step(checkpoint, model, model, lambda: model[2].weight.detach().mul_(2))


@TABLE.row(20, rule=RAISES, torch=WRONG)
def buffer_changed_in_the_third_step(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    layer.register_buffer("scale", torch.full((6,), 2.0))
    return third_step(checkpoint, lambda x: torch.tanh(layer(x) * layer.scale), layer, lambda: layer.scale.add_(1))


@TABLE.row(20, rule=RAISES, torch=WRONG)
def new_captured_tensor_changed_in_a_later_step(checkpoint: Checkpoint) -> dict[str, object]:
    """Each step makes its own mask; the third one is written over before its backward."""
    layer = nn.Linear(6, 6)
    for step, x in enumerate(batches(4, 6)):
        mask = torch.ones(4, 6)
        loss = checkpoint(lambda t: torch.exp(layer(t) * mask), x, use_reentrant=False).sum()  # noqa: B023
        if step == 2:
            mask[0] = 0
        attempt(loss.backward, layer)
    return state_of(layer)


@TABLE.row(20, rule=RAISES, torch=WRONG)
def new_tensor_on_an_object_changed_in_a_later_step(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    batch = Namespace(mask=None)

    def region(x: Tensor) -> Tensor:
        return torch.exp(layer(x) * batch.mask)

    for step, x in enumerate(batches(4, 6)):
        batch.mask = torch.ones(4, 6)
        loss = checkpoint(region, x, use_reentrant=False).sum()
        if step == 2:
            batch.mask[0] = 0
        attempt(loss.backward, layer)
    return state_of(layer)


@TABLE.row(57, rule=EQUAL_OR_REFUSED, torch=WRONG, recomputes=None)
def attribute_of_an_object_rebound(checkpoint: Checkpoint) -> dict[str, object]:
    """The loop puts the next batch's mask on an object before the backward of this one."""
    layer = nn.Linear(6, 6)
    batch = Namespace(mask=torch.ones(4, 6))

    def change() -> None:
        batch.mask = torch.zeros(4, 6)

    return third_step(checkpoint, lambda x: torch.exp(layer(x) * batch.mask), layer, change)


@TABLE.row(31, rule=EQUAL_OR_REFUSED, torch=RIGHT)
def hook_that_replaces_from_the_second_step(checkpoint: Checkpoint) -> dict[str, object]:
    """Steering that is switched on later: the hook only looked in the first call."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    switch = Namespace(on=False)
    model[1].register_forward_hook(lambda m, args, out: out * 3 if switch.on else None)
    found = []
    for x in batches(4, 6):
        found.append(train(model, lambda t: checkpoint(model, t, use_reentrant=False).sum(), [x]))
        switch.on = True
    return {"found": found}


@TABLE.row(31, rule=EQUAL_OR_REFUSED, torch=WRONG)
def hook_that_draws_while_it_observes(checkpoint: Checkpoint) -> dict[str, object]:
    """A hook that samples which activations to log moves the stream: dropout after it must have the same mask."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 6))
    seen: list[float] = []

    def sample(module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.rand(()) < 0.7:
            seen.append(float(output.detach().sum()))

    model[1].register_forward_hook(sample)
    return {**train(model, lambda t: checkpoint(model, t, use_reentrant=False).sum(), batches(4, 6)), "seen": seen}


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)


def test_a_layer_in_many_places_is_watched_once_for_each_kind_of_input(candidate: Checkpoint) -> None:
    """The first of three calls has an input without gradient, and saves otherwise: two watched calls, and no more."""
    layer = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    forget_regions()
    reset_checkpoint_counters()
    for x in batches(4, 6, count=5):
        for _ in range(3):
            x = candidate(layer, x, use_reentrant=False)
        x.sum().backward()
    counters = checkpoint_counters()
    assert (counters.regions, counters.watched, counters.recomputes) == (15, 2, 15)
