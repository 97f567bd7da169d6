"""Autograd's own doors over a region: rows 26 to 29, 34, 37, 38, 43 and 56."""

from __future__ import annotations

from typing import Any

import torch
from rows import (
    EQUAL_OR_REFUSED,
    REFUSES,
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

TABLE = Table()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 4), nn.Sigmoid())


@TABLE.row(26)
def gradient_penalty(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()

    def loss_of(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.mean() + (slope.norm(dim=1) - 1).square().mean()

    return train(model, loss_of, batches(3, 4))


@TABLE.row(26)
def third_derivative_and_hessian(checkpoint: Checkpoint) -> dict[str, object]:
    x = torch.linspace(0.1, 1, 4, requires_grad=True)

    def value(t: Tensor) -> Tensor:
        return checkpoint(lambda u: (u.sin() * u.exp()).sum(), t, use_reentrant=False)

    (one,) = torch.autograd.grad(value(x), x, create_graph=True)
    (two,) = torch.autograd.grad(one.sum(), x, create_graph=True)
    (three,) = torch.autograd.grad(two.sum(), x)
    hessian = torch.autograd.functional.hessian(value, x.detach())
    return {"one": one, "two": two, "three": three, "hessian": hessian}


@TABLE.row(27)
def saved_tensors_read_outside_a_backward(checkpoint: Checkpoint) -> dict[str, object]:
    x = torch.linspace(0.1, 1, 4, requires_grad=True)
    y = checkpoint(lambda t: torch.exp(t * t), x, use_reentrant=False)
    node: Any = y.grad_fn
    read = [node._saved_result.clone() for _ in range(2)]
    y.sum().backward()
    return {"read": read, "grad": x.grad}


@TABLE.row(27)
def two_backwards_with_retain(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()
    loss = checkpoint(model, torch.ones(3, 4), use_reentrant=False).sum()
    attempt(lambda: loss.backward(retain_graph=True), model)
    first = state_of(model)
    attempt(loss.backward, model)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    try:
        loss.backward()
        third = "no error"
    except RuntimeError:
        third = "RuntimeError"
    same = all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True) if p.grad is not None)
    return {"first": first, "second": before, "third": third, "same": same, "draws": draws()}


@TABLE.row(27)
def retain_across_two_losses(checkpoint: Checkpoint) -> dict[str, object]:
    """Two losses share a trunk of two regions."""
    trunk, left, right = mlp(), nn.Linear(4, 1), nn.Linear(4, 1)
    model = nn.ModuleList([trunk, left, right])
    h = checkpoint(trunk, checkpoint(trunk, torch.ones(3, 4), use_reentrant=False), use_reentrant=False)
    attempt(lambda: left(h).sum().backward(retain_graph=True), model)
    attempt(right(h).exp().sum().backward, model)
    return {**state_of(model), "draws": draws()}


@TABLE.row(28)
def subset_of_inputs(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()
    a, b = torch.ones(3, 4, requires_grad=True), torch.full((3, 4), 2.0, requires_grad=True)

    def region(u: Tensor, v: Tensor) -> Tensor:
        return model(u * v).exp()

    y = checkpoint(region, a, b, use_reentrant=False)
    (only,) = torch.autograd.grad(y.sum(), b, retain_graph=True)
    weights = torch.autograd.grad(y.sum(), [model[0].weight], retain_graph=True)
    untouched = all(p.grad is None for p in model.parameters())
    attempt(lambda: y.sum().backward(inputs=[a, model[3].bias]), model)
    return {"only": only, "weights": weights, "untouched": untouched, "a": a.grad, "b": b.grad, **state_of(model)}


@TABLE.row(28)
def unused_input_of_grad(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()
    a, b = torch.ones(3, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    y = checkpoint(lambda u, v: model(u), a, b, use_reentrant=False)
    return {"gradients": torch.autograd.grad(y.sum(), [a, b], allow_unused=True)}


@TABLE.row(29)
def outputs_backward_one_by_one(checkpoint: Checkpoint) -> dict[str, object]:
    left, right = mlp(), mlp()
    model = nn.ModuleList([left, right])

    def region(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return left(x).sin(), right(x).exp(), left(x).cos()

    first, second, _ = checkpoint(region, torch.ones(3, 4), use_reentrant=False)
    attempt(first.sum().backward, model)
    one = state_of(model)
    attempt(second.sum().backward, model)
    return {"one": one, "two": state_of(model), "draws": draws()}


@TABLE.row(29, rule=EQUAL_OR_REFUSED)
def step_between_the_backwards_of_two_outputs(checkpoint: Checkpoint) -> dict[str, object]:
    """The first branch's parameters are stepped before the second branch's backward, which plain does not mind."""
    left, right = mlp(), mlp()
    model = nn.ModuleList([left, right])
    first, second = checkpoint(lambda t: (left(t).sin(), right(t).exp()), torch.ones(3, 4), use_reentrant=False)
    attempt(first.sum().backward, model)
    torch.optim.SGD(left.parameters(), lr=0.1).step()
    attempt(second.sum().backward, model)
    return {**state_of(model), "draws": draws()}


@TABLE.row(29)
def unused_outputs_leave_none(checkpoint: Checkpoint) -> dict[str, object]:
    used, unused = mlp(), mlp()
    model = nn.ModuleList([used, unused])

    def loss_of(x: Tensor) -> Tensor:
        return checkpoint(lambda t: (used(t).sin(), unused(t).exp()), x, use_reentrant=False)[0].sum()

    return train(model, loss_of, batches(3, 4))


@TABLE.row(34)
def parameters_shared_across_regions(checkpoint: Checkpoint) -> dict[str, object]:
    """A tied embedding and head, and one block in three regions (as in ALBERT)."""
    table, block = nn.Embedding(10, 4), mlp()
    model = nn.ModuleList([table, block])

    def head(x: Tensor) -> Tensor:
        return nn.functional.linear(x, table.weight).log_softmax(-1)

    def loss_of(tokens: Tensor) -> Tensor:
        x = checkpoint(table, tokens, use_reentrant=False)
        for _ in range(3):
            x = checkpoint(block, x, use_reentrant=False)
        return -checkpoint(head, x, use_reentrant=False).flatten(0, 1)[torch.arange(6), tokens.flatten()].mean()

    return train(model, loss_of, [torch.arange(6).view(2, 3) + i for i in range(3)])


class Cubed(torch.autograd.Function):
    """Saves its input, and reads `saved_tensors` as often as `reads` says; may keep a tensor on `ctx`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reads: int, stash: bool) -> Tensor:
        ctx.save_for_backward(x, x.square())
        ctx.reads = reads
        ctx.stash = x.exp() if stash else None
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        for _ in range(ctx.reads):
            x, square = ctx.saved_tensors
        result = gradient * 3 * square + 0 * x
        return (result if ctx.stash is None else result + 0.001 * ctx.stash), None, None


def custom(checkpoint: Checkpoint, reads: int, stash: bool) -> dict[str, object]:
    layer = nn.Linear(4, 4)

    def region(x: Tensor) -> Tensor:
        return torch.sin(Cubed.apply(layer(x), reads, stash))

    return train(layer, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(3, 4))


@TABLE.row(37)
def custom_function(checkpoint: Checkpoint) -> dict[str, object]:
    return custom(checkpoint, reads=1, stash=False)


@TABLE.row(37)
def custom_function_with_a_stash(checkpoint: Checkpoint) -> dict[str, object]:
    return custom(checkpoint, reads=1, stash=True)


@TABLE.row(38, torch=REFUSES)
def saved_tensors_read_twice(checkpoint: Checkpoint) -> dict[str, object]:
    return custom(checkpoint, reads=2, stash=False)


@TABLE.row(43)
def gradient_accumulation(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(2):
        for x in batches(3, 4, count=4):
            loss = checkpoint(model, x + step, use_reentrant=False).square().mean() / 4
            attempt(loss.backward, model)
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=step == 0)
    return {"losses": losses, **state_of(model), "draws": draws()}


@TABLE.row(56)
def saved_tensor_hooks_outside(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()

    def loss_of(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
            return checkpoint(model, x, use_reentrant=False).exp().sum()

    return train(model, loss_of, batches(3, 4))


@TABLE.row(56, recomputes=None)
def saved_on_cpu_inside(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()

    def region(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x).exp()

    return train(model, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(3, 4))


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)
