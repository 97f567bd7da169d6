"""Memory that runs out at any op of a backward with recomputation (row 30): nothing is left changed, steps go on.

An op that allocates fails, in turn each of the backward: in the first step of a region, which is watched, and later.
"""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import torch
from rows import Checkpoint, ambient, batches, bits, differences, draws, plain, seeds, state_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from keepless.eager import forget_regions, hooks

_MAKES_NOTHING = ("copy_", "detach", "view", "_unsafe_view", "t", "transpose", "expand", "alias", "select", "slice")


class Full(TorchDispatchMode):
    """The allocating op of this number fails; `None` only counts them."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.number = number
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") not in _MAKES_NOTHING:
            self.count += 1
            if self.count - 1 == self.number:
                raise torch.OutOfMemoryError(f"on purpose, at {func}")
        return func(*args, **(kwargs or {}))


class Busy(nn.Module):
    """Everything that a recompute moves and puts back: statistics, streams, attributes, lists, a bank, a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.noise = torch.Generator().manual_seed(3)
        self.bank = torch.ones(2, 6)
        self.seen: list[int] = []
        self.num_calls = 0
        self.scaled = [0]
        self.second.register_forward_hook(self._scale)

    def _scale(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.scaled[0] += 1
        return output * 2

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        self.seen.append(self.num_calls)
        h = nn.functional.dropout(self.norm(self.first(x)), 0.2) * random.uniform(0.5, 1.5)
        h = h * torch.rand(h.shape, generator=self.noise) * float(np.random.rand() + 0.5)
        self.bank[0] *= h.detach().mean(0).cos()
        return torch.tanh(self.second(h * self.bank[0].clone()) / self.num_calls)


def forward(checkpoint: Checkpoint, model: nn.ModuleList, x: Tensor) -> Tensor:
    """The regions run under autocast; their backward does not."""
    with torch.autocast("cpu", torch.bfloat16):
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
    return x.float().square().sum()


def python_state(model: nn.ModuleList) -> list[Any]:
    return [
        (block.num_calls, list(block.seen), list(block.scaled), block.bank.clone(), block.training) for block in model
    ]


def run(checkpoint: Checkpoint, lost: int, number: int | None, again: bool = False) -> tuple[Any, Full]:
    """Four steps; in step `lost` the backward is left out, or its allocating op `number` fails."""
    forget_regions()
    seeds()
    model = nn.ModuleList(Busy() for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    full = Full(number)
    found: list[Any] = []
    for step, x in enumerate(batches(4, 6, count=4)):
        optimizer.zero_grad()
        loss = forward(checkpoint, model, x)
        before = bits([python_state(model), state_of(model)["buffers"]])
        if step == lost and checkpoint is not plain:
            fails(full, loss, model, again)
        if step != lost:
            loss.backward()
            optimizer.step()
        elif again:
            found.append(bits(list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))))
        assert differences(before, bits([python_state(model), state_of(model)["buffers"]])) == []
        del loss
    streams = draws(*(block.noise for block in model))
    return [found, bits([state_of(model), python_state(model), streams])], full


def fails(full: Full, loss: Tensor, model: nn.ModuleList, again: bool) -> None:
    """A backward in which memory runs out; no state of the thread is left changed."""
    surroundings = ambient()
    try:
        with full:
            if again:
                torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            else:
                loss.backward()
        assert full.number is None or full.count <= full.number, "the fault was swallowed"
    except torch.OutOfMemoryError:
        assert full.count - 1 == full.number
    assert ambient() == surroundings
    assert getattr(hooks._local, "route", None) is None
    assert hooks._users == 0
    model.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["dropped", "run again"])
@pytest.mark.parametrize("lost", [0, 2], ids=["watched", "later"])
def test_memory_runs_out_at_any_op(candidate: Checkpoint, lost: int, again: bool) -> None:
    """The step is dropped, or its backward is run again with the graph kept: all is as in plain autograd."""
    expected, _ = run(plain, lost, None, again)
    got, counted = run(candidate, lost, None, again)
    assert differences(expected, got) == []
    assert counted.count > 40
    for number in range(counted.count):
        got, _ = run(candidate, lost, number, again)
        assert differences(expected, got) == [], f"allocating op {number} of {counted.count}"


def test_the_fault_reaches_every_part(candidate: Checkpoint) -> None:
    """The ops of the recompute are among those that fail: there are more than in plain autograd's backward."""
    parts = Namespace(plain=Full(None), candidate=Full(None))
    for name, checkpoint in (("plain", plain), ("candidate", candidate)):
        seeds()
        model = nn.ModuleList(Busy() for _ in range(2))
        loss = forward(checkpoint, model, torch.ones(4, 6))
        with getattr(parts, name):
            loss.backward()
    assert parts.candidate.count > parts.plain.count + 20
