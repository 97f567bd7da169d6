"""Inputs and outputs of a region, and the model around it: rows 16, 21 to 25, 47 and 49."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from rows import Checkpoint, Row, Table, attempt, batches, judge, state_of, train
from torch import Tensor, nn

from keepless import checkpoint_sequential

TABLE = Table()


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@TABLE.row(16)
def detach_inside_and_a_detached_output(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(4, 4)
    facts = []

    def region(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = layer(x)
        return torch.sin(h) * h.detach(), h.exp().detach(), torch.arange(3)

    def loss_of(x: Tensor) -> Tensor:
        y, detached, indices = checkpoint(region, x, use_reentrant=False)
        facts.append((y.requires_grad, detached.requires_grad, detached.grad_fn is None, indices.requires_grad))
        return (y * detached).sum()

    return {**train(layer, loss_of, batches(3, 4)), "facts": facts}


@TABLE.row(21)
def views_and_one_tensor_twice(checkpoint: Checkpoint) -> dict[str, object]:
    base = leaf(4, 6)
    half = base[:, ::2]

    def region(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(a * b) + c.t().exp().t(), a[1:]

    y, view = checkpoint(region, half, half, base[:, 1::2], use_reentrant=False)
    attempt(((y**2).sum() + (view * 3).sum()).backward, {"base": base})
    return {"y": y, "view": view, "is_view": view._is_view(), "base": view._base is base, "gradient": base.grad}


@TABLE.row(21)
def output_is_a_view_of_an_activation(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(4, 8)

    def loss_of(x: Tensor) -> Tensor:
        left, right = checkpoint(lambda t: layer(t).tanh().unbind(0), x, use_reentrant=False)
        return (left * right).sum()

    return train(layer, loss_of, batches(2, 4))


@TABLE.row(22, recomputes=None)
def output_is_the_input(checkpoint: Checkpoint) -> dict[str, object]:
    x = leaf(4)
    h = x * 2
    y, same = checkpoint(lambda t: (t.sin().exp(), t), h, use_reentrant=False)
    attempt((y * same).sum().backward, {"x": x})
    (identity,) = checkpoint(lambda t: (t,), h, use_reentrant=False)
    return {"is": same is h, "alone": identity is h, "y": y, "gradient": x.grad}


@dataclass
class Output:
    hidden: Tensor
    note: str


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@TABLE.row(23)
def structures_go_in_and_out(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(4, 4)
    a, b, c = (leaf(3, 4, seed=i) for i in range(3))

    def region(inputs: dict[str, Any], flag: bool, scale: float, none: None) -> dict[str, Any]:
        h = layer(inputs["a"]) * inputs["more"][0].sin() + inputs["more"][1]["c"].exp() * scale
        assert flag
        assert none is None
        return OrderedDict(
            h=h.tanh(), parts=[h, (h.exp(), None)], count=3, out=Output(h.cos(), "n"), pair=Pair(h, None)
        )

    found = checkpoint(region, {"a": a, "more": (b, {"c": c})}, True, 0.5, None, use_reentrant=False)
    loss = found["h"].sum() + found["parts"][1][0].sum() + found["out"].hidden.sum() + found["pair"].first.sum()
    attempt(loss.backward, {"a": a, "b": b, "c": c})
    shape = (type(found).__name__, list(found), type(found["parts"]).__name__, type(found["pair"]).__name__)
    return {
        "shape": shape,
        "none": found["parts"][1][1] is None,
        "count": found["count"],
        "note": found["out"].note,
        "gradients": [a.grad, b.grad, c.grad],
        **state_of(layer),
    }


@TABLE.row(23)
def generators_and_sets_of_arguments(checkpoint: Checkpoint) -> dict[str, object]:
    """A list that the caller empties after the call: the region's own arguments must stay what they were."""
    x = leaf(3, 4)
    parts = [x.sin(), x.cos()]
    y = checkpoint(lambda items: torch.exp(items[0] * items[1]), list(parts), use_reentrant=False)
    parts.clear()
    attempt(y.sum().backward, {"x": x})
    return {"y": y, "gradient": x.grad}


@TABLE.row(24)
def tensors_as_keywords(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(4, 4)
    mask, bias = leaf(3, 4, seed=1), leaf(4, seed=2)

    def region(x: Tensor, *, mask: Tensor, extra: dict[str, Tensor], gain: float = 1.0) -> Tensor:
        return torch.tanh(layer(x) * mask * gain + extra["bias"])

    x = torch.ones(3, 4)
    y = checkpoint(region, x, use_reentrant=False, mask=mask, extra={"bias": bias}, gain=0.5)
    attempt(y.sum().backward, layer)
    return {"y": y, "gradients": [mask.grad, bias.grad], **state_of(layer)}


@TABLE.row(25)
def no_input_requires_grad(checkpoint: Checkpoint) -> dict[str, object]:
    block = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 2))
    tokens = [torch.arange(6).view(2, 3) + i for i in range(3)]
    return train(block, lambda t: checkpoint(block, t, use_reentrant=False).sum(), tokens)


@TABLE.row(25)
def mixed_inputs_and_frozen_parameters(checkpoint: Checkpoint) -> dict[str, object]:
    block = nn.ModuleDict({"frozen": nn.Linear(4, 4).requires_grad_(False), "tuned": nn.Linear(4, 4, bias=False)})
    facts = []

    def region(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return block["tuned"](block["frozen"](a).sin()).tanh() * b, block["frozen"](b)

    def loss_of(x: Tensor) -> Tensor:
        a = x.clone().requires_grad_()
        y, plain_part = checkpoint(region, a, x, use_reentrant=False)
        facts.append((y.requires_grad, plain_part.requires_grad))
        return y.sum()

    return {**train(block, loss_of, batches(3, 4)), "facts": facts}


@TABLE.row(25, recomputes=False)
def nothing_requires_grad(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(4, 4).requires_grad_(False)
    y = checkpoint(lambda t: torch.sin(layer(t)), torch.ones(2, 4), use_reentrant=False)
    return {"y": y, "requires": y.requires_grad}


class Stack(nn.Module):
    """Blocks, each in a region, as a user's model holds them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.1)) for _ in range(2))
        self.run = [checkpoint]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.run[0](block, x, use_reentrant=False)
        return x.square().mean()


@TABLE.row(47)
def copies_and_state_dict(checkpoint: Checkpoint) -> dict[str, object]:
    """After steps, a deepcopy and a saved and loaded state train on alike; names are unchanged."""
    model = Stack(checkpoint)
    train(model, model, batches(3, 4))
    held = model.run
    model.run = []
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.run = twin.run = held
    loaded = Stack(checkpoint)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    found = []
    for other in (model, twin, loaded):
        torch.manual_seed(1)
        found.append(train(other, other, batches(3, 4)))
    return {"names": list(model.state_dict()), "found": found, "keys": sorted(vars(model.blocks[0]))}


@TABLE.row(49)
def batches_of_many_sizes(checkpoint: Checkpoint) -> dict[str, object]:
    block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.GELU())
    sizes = [torch.ones(n, 4) * (n + 1) for n in (3, 1, 0, 5, 1)]
    return train(block, lambda x: checkpoint(block, x, use_reentrant=False).sum(), sizes)


@TABLE.row(49)
def branches_on_data(checkpoint: Checkpoint) -> dict[str, object]:
    block = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def region(x: Tensor) -> Tensor:
        h = block[0](x)
        while h.abs().max().item() < 2:
            h = h * 1.5
        h = torch.sin(block[1](h)) if h.sum() > 0 else torch.exp(-(block[1](h) ** 2))
        return h[h > 0]

    return train(block, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(3, 4, count=6))


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


def test_the_warning_without_use_reentrant_is_torchs(candidate: Checkpoint) -> None:
    """The words that filters for torch's own warning look for."""
    x = torch.ones(2, requires_grad=True)
    with pytest.warns(UserWarning, match="the use_reentrant parameter should be passed explicitly"):
        candidate(torch.sin, x)
    with pytest.warns(UserWarning, match="the use_reentrant parameter should be passed explicitly"):
        checkpoint_sequential([torch.sin, torch.exp], 2, x)
