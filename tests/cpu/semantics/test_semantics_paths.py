"""Recomputations that would go another way: rows 57 and 58."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

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
    judge,
    state_of,
    torch_differs,
    train,
)
from torch import Tensor, nn

TABLE = Table()

GAIN = 2.0


def leaf() -> Tensor:
    return torch.linspace(0.1, 1.0, 6, requires_grad=True)


@TABLE.row(57, rule=EQUAL_OR_REFUSED, torch=WRONG, recomputes=None)
def rebound_closure_variable(checkpoint: Checkpoint) -> dict[str, object]:
    x = leaf()
    scale = 2.0
    y = checkpoint(lambda t: torch.sin(t * scale), x, use_reentrant=False)
    scale = 3.0
    attempt(y.sum().backward, {"x": x})
    return {"y": y, "gradient": x.grad, "scale": scale}


@TABLE.row(57, rule=EQUAL_OR_REFUSED, torch=WRONG, recomputes=None)
def loop_variable(checkpoint: Checkpoint) -> dict[str, object]:
    """The classic mistake: every region's closure names the loop's variable."""
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def loss_of(x: Tensor) -> Tensor:
        for layer in layers:
            x = checkpoint(lambda t: torch.sin(layer(t)), x, use_reentrant=False)  # noqa: B023
        return x.sum()

    return train(layers, loss_of, batches(3, 4))


@TABLE.row(57, rule=EQUAL_OR_REFUSED, torch=WRONG, recomputes=None)
def rebound_tensor(checkpoint: Checkpoint) -> dict[str, object]:
    x = leaf()
    mask = torch.ones(6)
    y = checkpoint(lambda t: torch.exp(t * mask), x, use_reentrant=False)
    mask = torch.zeros(6)
    attempt(y.sum().backward, {"x": x})
    return {"y": y, "gradient": x.grad, "mask": mask}


@TABLE.row(57, rule=EQUAL_OR_REFUSED, torch=WRONG, recomputes=None)
def rebound_global(checkpoint: Checkpoint) -> dict[str, object]:
    global GAIN
    x = leaf()
    y = checkpoint(lambda t: torch.sin(t * GAIN), x, use_reentrant=False)
    GAIN = 3.0
    try:
        attempt(y.sum().backward, {"x": x})
    finally:
        GAIN = 2.0
    return {"y": y, "gradient": x.grad}


@TABLE.row(58, rule=EQUAL_OR_REFUSED, torch=REFUSES)
def other_number_of_tensors(checkpoint: Checkpoint) -> dict[str, object]:
    x = leaf()
    runs: list[int] = []

    def region(t: Tensor) -> Tensor:
        runs.append(1)
        return torch.sin(t.exp()) if len(runs) == 1 else t.exp()

    y = checkpoint(region, x, use_reentrant=False)
    attempt(y.sum().backward, {"x": x})
    return {"y": y, "gradient": x.grad}


@TABLE.row(58, rule=EQUAL_OR_REFUSED, torch=REFUSES)
def other_dtype(checkpoint: Checkpoint) -> dict[str, object]:
    x = leaf()
    runs: list[int] = []

    def region(t: Tensor) -> Tensor:
        runs.append(1)
        return torch.sin(t.to(torch.float64 if len(runs) == 1 else torch.float32)).exp()

    y = checkpoint(region, x, use_reentrant=False)
    attempt(y.sum().backward, {"x": x})
    return {"y": y, "gradient": x.grad}


@TABLE.row(58, rule=EQUAL_OR_REFUSED, torch=REFUSES)
def other_values_under_a_bitwise_check(checkpoint: Checkpoint) -> dict[str, object]:
    """Same shapes, one bit different: the bitwise check must see it before a gradient is touched."""
    x = leaf()
    runs: list[int] = []

    def region(t: Tensor) -> Tensor:
        runs.append(1)
        return torch.sin(t * (2.0 if len(runs) == 1 else 2.0000002)).exp()

    def run() -> Tensor:
        y = checkpoint(region, x, use_reentrant=False, determinism_check="bitwise")
        y.sum().backward()
        return y

    y = attempt(run, {"x": x})
    return {"y": y, "gradient": x.grad}


@TABLE.row(58, torch=REFUSES)
def same_values_under_a_bitwise_check(checkpoint: Checkpoint) -> dict[str, object]:
    """The bitwise check lets a sound region pass, dropout included."""
    block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.GELU())

    def loss_of(x: Tensor) -> Tensor:
        return attempt(
            lambda: checkpoint(block, x, use_reentrant=False, determinism_check="bitwise").square().sum(), block
        )

    return train(block, loss_of, batches(3, 4))


class Counted(nn.Module):
    """Counts its calls in a buffer, and scales by it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("num", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.linear(x))
        with torch.no_grad():
            self.num += 1
        return h * self.num.clone()


def other_layer_later(checkpoint: Checkpoint, table: Callable[[Any], Any], **needs: bool) -> dict[str, object]:
    """Four steps; from the third on another layer with the same shapes runs, and writes its buffer."""
    layers = nn.ModuleList(Counted() for _ in range(2))
    pool = Namespace(table=table(list(layers)), step=0)

    def region(x: Tensor) -> Tensor:
        inside = pool.table
        while isinstance(inside, dict):
            inside = inside["in"]
        return inside[pool.step // 2](x)

    found = []
    for x in batches(4, 6, count=4):
        x.requires_grad_(**needs)
        loss = attempt(lambda t=x: checkpoint(region, t, use_reentrant=False).sum(), layers)
        attempt(loss.backward, layers)
        found.append(state_of(layers))
        pool.step += 1
    return {"found": found}


@TABLE.row(58, rule=EQUAL_OR_REFUSED, torch=WRONG)
def another_layer_of_the_same_shape_later(checkpoint: Checkpoint) -> dict[str, object]:
    """No parameter is saved: nothing but the buffer tells that it is another layer."""
    return other_layer_later(checkpoint, lambda layers: {"in": {"in": {"in": layers}}}, requires_grad=False)


@TABLE.row(58, rule=EQUAL_OR_REFUSED, torch=WRONG)
def another_layer_out_of_reach_later(checkpoint: Checkpoint) -> dict[str, object]:
    """The layer lies too deep to be found; its weight is saved."""
    return other_layer_later(checkpoint, lambda layers: {"in": {"in": {"in": {"in": {"in": layers}}}}})


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)
