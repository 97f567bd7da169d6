"""Function transforms over a region: rows 39, 40 and 41. Saving nothing there is right; one warning is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from rows import REFUSES, Checkpoint, Row, Table, attempt, draws, judge, state_of, torch_differs, train
from torch import Tensor, nn

TABLE = Table()
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")


def stateless(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {k: p.detach() for k, p in model.named_parameters()}, torch.randn(3, 4, generator=generator)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Sigmoid())


@TABLE.row(39, torch=REFUSES, recomputes=None, warns=True)
def grad_of_a_functional_call(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()
    parameters, x = stateless(model)

    def loss_of(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    def run(weights: dict[str, Tensor]) -> Tensor:
        return checkpoint(loss_of, weights, x, use_reentrant=False)

    gradients, value = attempt(lambda: torch.func.grad_and_value(run)(parameters), model)
    return {"gradients": gradients, "value": value, "draws": draws()}


@TABLE.row(39, torch=REFUSES, recomputes=None, warns=True)
def vjp(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()
    _, x = stateless(model)

    def run() -> tuple[Any, ...]:
        y, pull = torch.func.vjp(lambda t: checkpoint(model, t, use_reentrant=False).exp(), x)
        return y, pull(torch.ones_like(y))

    return {"result": attempt(run, model)}


@TABLE.row(39, torch=REFUSES, recomputes=None, warns=True)
def per_sample_gradients(checkpoint: Checkpoint) -> dict[str, object]:
    """Gradients by sample: vmap over grad, as differential privacy takes them."""
    model = mlp()
    parameters, x = stateless(model)

    def loss_of(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        def region(t: Tensor) -> Tensor:
            return torch.func.functional_call(model, weights, (t,))

        return checkpoint(region, sample, use_reentrant=False).square().sum()

    run = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0))
    return {"gradients": attempt(lambda: run(parameters, x), model)}


@TABLE.row(39, torch=REFUSES, recomputes=None, warns=True)
def steps_beside_transforms(checkpoint: Checkpoint) -> dict[str, object]:
    """The same region is trained, transformed, and trained again."""
    model = mlp()
    _, x = stateless(model)

    def run(t: Tensor) -> Tensor:
        return checkpoint(model, t, use_reentrant=False).sum()

    first = train(model, run, [x, x])
    slope = attempt(lambda: torch.func.grad(run)(x), model)
    return {"first": first, "slope": slope, "second": train(model, run, [x, x])}


@TABLE.row(40, torch=REFUSES, recomputes=None, warns=True)
def vmap_with_the_backward_outside(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()
    _, x = stateless(model)

    def run() -> Tensor:
        y = torch.func.vmap(lambda t: checkpoint(model, t, use_reentrant=False))(x)
        y.square().sum().backward()
        return y

    return {"y": attempt(run, model), **state_of(model)}


@TABLE.row(40, recomputes=None, warns=True)
def vmap_without_gradient(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()
    _, x = stateless(model)
    with torch.no_grad():
        y = torch.func.vmap(lambda t: checkpoint(model, t, use_reentrant=False))(x)
    return {"y": y}


@TABLE.row(41, recomputes=None, warns=True)
def jvp(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()
    _, x = stateless(model)

    def run() -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda t: checkpoint(model, t, use_reentrant=False).exp(), (x,), (torch.ones_like(x),))

    return {"result": [t.detach() for t in attempt(run, model)]}


@TABLE.row(41, recomputes=None, warns=True)
def forward_mode_with_a_backward(checkpoint: Checkpoint) -> dict[str, object]:
    """A directional derivative by dual numbers, then a backward through both parts."""
    model = mlp()
    _, x = stateless(model)

    def run() -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            y = checkpoint(model, dual, use_reentrant=False)
            value, tangent = forward_ad.unpack_dual(y)
            assert tangent is not None
            (value.sum() + tangent.square().sum()).backward()
            return value.detach().clone(), tangent.detach().clone()

    value, tangent = attempt(run, model)
    return {"value": value, "tangent": tangent, **state_of(model)}


@TABLE.row(41, recomputes=None, warns=True)
def jacobians(checkpoint: Checkpoint) -> dict[str, object]:
    x = torch.linspace(0.1, 1.0, 4)

    def run(t: Tensor) -> Tensor:
        return checkpoint(lambda u: u.sin() * u.exp().sum(), t, use_reentrant=False)

    return {"forward": attempt(lambda: torch.func.jacfwd(run)(x), {"x": x})}


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)
