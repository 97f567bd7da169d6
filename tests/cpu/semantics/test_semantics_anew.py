"""State that a loop makes anew for each step and a region changes in place: rows 9, 20 and 36.

A bank, a cache or an average is another tensor in each step, under the same name.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from rows import (
    EQUAL_OR_REFUSED,
    RAISES,
    REFUSES,
    WRONG,
    Checkpoint,
    Row,
    Table,
    attempt,
    batches,
    judge,
    state_of,
    torch_differs,
    train,
)
from torch import Tensor, nn

TABLE = Table()


class Bank(nn.Module):
    """Adds to its bank in place, and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.bank: Any = None
        self.row: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        bank = self.bank if isinstance(self.bank, Tensor) else self.bank["values"][0]
        with torch.no_grad():
            bank[1] += h.detach().mean(0)
        return torch.sin(h * (bank[1] + 1))


def twice(checkpoint: Checkpoint, region: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """The region of the region."""
    h = checkpoint(region, x.requires_grad_(), *args, use_reentrant=False)
    return checkpoint(region, h, *args, use_reentrant=False)


def steps(
    checkpoint: Checkpoint, layer: Any, region: Callable[..., Any], begin: Callable[[], Any], *args: Any
) -> dict[str, object]:
    """Four steps of two calls each; `begin()` makes the step's state, which is part of the outcome."""
    seen = []

    def loss_of(x: Tensor) -> Tensor:
        state = begin()
        y = attempt(lambda: twice(checkpoint, region, x, *args), layer)
        seen.append(state)
        return y.square().sum()

    return {**train(layer, loss_of, batches(4, 6, count=4)), "seen": seen}


def zeros() -> Tensor:
    return torch.zeros(3, 6)


@TABLE.row(36, torch=WRONG)
def bank_of_a_module(checkpoint: Checkpoint) -> dict[str, object]:
    layer = Bank()

    def begin() -> Tensor:
        layer.bank = zeros()
        return layer.bank

    return steps(checkpoint, layer, layer, begin)


@TABLE.row(36, torch=WRONG)
def bank_made_anew_in_some_steps(checkpoint: Checkpoint) -> dict[str, object]:
    """Every other step goes on with the bank of the one before."""
    layer = Bank()
    step = Namespace(number=0)

    def begin() -> Tensor:
        if step.number % 2 == 0:
            layer.bank = zeros()
        step.number += 1
        return layer.bank

    return steps(checkpoint, layer, layer, begin)


@TABLE.row(36, torch=WRONG)
def bank_of_another_shape(checkpoint: Checkpoint) -> dict[str, object]:
    layer = Bank()
    sizes = iter((3, 5, 2, 4))

    def begin() -> Tensor:
        layer.bank = torch.zeros(next(sizes), 6)
        return layer.bank

    return steps(checkpoint, layer, layer, begin)


@TABLE.row(36, torch=WRONG)
def bank_in_containers_of_a_module(checkpoint: Checkpoint) -> dict[str, object]:
    layer = Bank()

    def begin() -> Tensor:
        layer.bank = {"values": [zeros()]}
        return layer.bank["values"][0]

    return steps(checkpoint, layer, layer, begin)


@TABLE.row(36, torch=WRONG)
def bank_with_a_view_beside_it(checkpoint: Checkpoint) -> dict[str, object]:
    """The region reads a row of the bank, then writes another row through the bank."""
    layer = Bank()

    def begin() -> Tensor:
        layer.bank = zeros()
        layer.row = layer.bank[0]
        return layer.bank

    return steps(checkpoint, layer, lambda x: layer(x + layer.row), begin)


class Memory:
    """A plain object with a bank."""

    def __init__(self) -> None:
        self.values = torch.ones(3, 6)


@TABLE.row(36, torch=WRONG)
def bank_of_a_new_object_on_a_module(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    holder = Namespace(memory=None)

    def region(x: Tensor) -> Tensor:
        h = layer(x)
        holder.memory.values.mul_(h.detach().mean(0).cos())
        return torch.sin(h * holder.memory.values[0].clone())

    def begin() -> Tensor:
        holder.memory = Memory()
        return holder.memory.values

    return steps(checkpoint, layer, region, begin)


@TABLE.row(36, torch=WRONG)
def bank_of_a_new_argument(checkpoint: Checkpoint) -> dict[str, object]:
    """A cache object is made for each step and given to the region."""
    layer = nn.Linear(6, 6)

    def region(x: Tensor, memory: Memory) -> Tensor:
        h = layer(x)
        memory.values.mul_(h.detach().mean(0).cos())
        return torch.sin(h * memory.values[0].clone())

    seen = []

    def loss_of(x: Tensor) -> Tensor:
        memory = Memory()
        y = attempt(lambda: twice(checkpoint, region, x, memory), layer)
        seen.append(memory.values)
        return y.square().sum()

    return {**train(layer, loss_of, batches(4, 6, count=4)), "seen": seen}


@TABLE.row(36, torch=WRONG)
def bank_in_a_closure(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    seen = []

    def loss_of(x: Tensor) -> Tensor:
        bank = torch.ones(3, 6)

        def region(t: Tensor) -> Tensor:
            h = layer(t)
            bank.mul_(h.detach().mean(0).cos())
            return torch.sin(h * bank[0].clone())

        y = attempt(lambda: twice(checkpoint, region, x), layer)
        seen.append(bank)
        return y.square().sum()

    return {**train(layer, loss_of, batches(4, 6, count=4)), "seen": seen}


@TABLE.row(36, torch=WRONG)
def banks_in_a_list_of_a_closure(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    seen = []

    def loss_of(x: Tensor) -> Tensor:
        banks = [torch.ones(6), torch.ones(6)]

        def region(t: Tensor, index: int) -> Tensor:
            h = layer(t)
            banks[index].mul_(h.detach().mean(0).cos())
            return torch.sin(h * banks[index].clone())

        h = attempt(lambda: checkpoint(region, x.requires_grad_(), 0, use_reentrant=False), layer)
        y = attempt(lambda: checkpoint(region, h, 1, use_reentrant=False), layer)
        seen.append(banks)
        return y.square().sum()

    return {**train(layer, loss_of, batches(4, 6, count=4)), "seen": seen}


SHARED: Any = None


@TABLE.row(36, torch=WRONG)
def bank_in_a_global(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)

    def region(x: Tensor) -> Tensor:
        h = layer(x)
        SHARED.mul_(h.detach().mean(0).cos())
        return torch.sin(h * SHARED[0].clone())

    def begin() -> Tensor:
        global SHARED
        SHARED = torch.ones(3, 6)
        return SHARED

    return steps(checkpoint, layer, region, begin)


class Attention(nn.Module):
    """Attends to the keys and values of all calls so far, which it writes into a cache of fixed length."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.keys: Any = None
        self.values: Any = None
        self.length = 0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        end = self.length + x.shape[1]
        self.keys[:, self.length : end] = k.detach()
        self.values[:, self.length : end] = v.detach()
        self.length = end
        past = nn.functional.scaled_dot_product_attention(q, self.keys[:, :end].clone(), self.values[:, :end].clone())
        return past + nn.functional.scaled_dot_product_attention(q, k, v)


@TABLE.row(36, torch=REFUSES)
def cache_of_fixed_length(checkpoint: Checkpoint) -> dict[str, object]:
    layer = Attention()
    seen = []

    def loss_of(x: Tensor) -> Tensor:
        layer.keys, layer.values, layer.length = torch.zeros(2, 6, 8), torch.zeros(2, 6, 8), 0
        y = attempt(lambda: twice(checkpoint, layer, x), layer)
        seen.append((layer.keys, layer.values, layer.length))
        return y.square().sum()

    return {**train(layer, loss_of, batches(2, 3, 8, count=4)), "seen": seen}


@TABLE.row(20, rule=RAISES, torch=WRONG)
def new_tensor_in_a_list_changed_in_a_later_step(checkpoint: Checkpoint) -> dict[str, object]:
    """The third step writes over its mask, which a list of the module holds, before its backward."""
    layer = nn.Linear(6, 6)
    holder = Namespace(masks=[])
    for step, x in enumerate(batches(4, 6)):
        holder.masks = [torch.ones(4, 6)]
        loss = checkpoint(lambda t: torch.exp(layer(t) * holder.masks[0]), x, use_reentrant=False).sum()
        if step == 2:
            holder.masks[0][0] = 0
        attempt(loss.backward, layer)
    return state_of(layer)


@TABLE.row(20, rule=RAISES, torch=WRONG)
def new_tensor_in_a_list_of_a_closure_changed_later(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    for step, x in enumerate(batches(4, 6)):
        masks = [torch.ones(4, 6)]
        loss = checkpoint(lambda t: torch.exp(layer(t) * masks[0]), x, use_reentrant=False).sum()  # noqa: B023
        if step == 2:
            masks[0][0] = 0
        attempt(loss.backward, layer)
    return state_of(layer)


@TABLE.row(36, torch=WRONG)
def bank_under_a_computed_name(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)

    def region(x: Tensor) -> Tensor:
        h = layer(x)
        bank = getattr(layer, "ba" + "nk")
        bank.mul_(h.detach().mean(0).cos())
        return torch.sin(h * bank[0].clone())

    def begin() -> Tensor:
        layer.bank = torch.ones(3, 6)
        return layer.bank

    return steps(checkpoint, layer, region, begin)


@TABLE.row(36, torch=WRONG)
def bank_given_by_a_partial(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    seen = []

    def region(memory: Memory, x: Tensor, scale: Tensor) -> Tensor:
        h = layer(x)
        memory.values.mul_(h.detach().mean(0).cos())
        return torch.sin(h * memory.values[0].clone() * scale)

    def loss_of(x: Tensor) -> Tensor:
        memory = Memory()
        part = functools.partial(region, memory, scale=torch.full((6,), 0.5))
        y = attempt(lambda: twice(checkpoint, part, x), layer)
        seen.append(memory.values)
        return y.square().sum()

    return {**train(layer, loss_of, batches(4, 6, count=4)), "seen": seen}


@TABLE.row(20, rule=RAISES, torch=WRONG)
def new_tensor_of_a_partial_changed_in_a_later_step(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)

    def region(x: Tensor, mask: Tensor) -> Tensor:
        return torch.exp(layer(x) * mask)

    for step, x in enumerate(batches(4, 6)):
        mask = torch.ones(4, 6)
        loss = checkpoint(functools.partial(region, mask=mask), x, use_reentrant=False).sum()
        if step == 2:
            mask[0] = 0
        attempt(loss.backward, layer)
    return state_of(layer)


@TABLE.row(36, rule=EQUAL_OR_REFUSED, torch=REFUSES)
def bank_given_and_named(checkpoint: Checkpoint) -> dict[str, object]:
    """The region writes its argument, which it has read as an attribute."""
    layer = Bank()

    def region(x: Tensor, bank: Tensor) -> Tensor:
        row = layer.bank[0].clone()
        bank.mul_(x.detach().mean(0).cos())
        return torch.sin(layer.linear(x) * row)

    def loss_of(x: Tensor) -> Tensor:
        layer.bank = torch.ones(3, 6)
        return attempt(lambda: checkpoint(region, x, layer.bank, use_reentrant=False), layer).square().sum()

    return train(layer, loss_of, batches(4, 6, count=1))


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)
