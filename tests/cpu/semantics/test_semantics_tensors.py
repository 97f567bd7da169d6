"""Kinds of tensors that go through a region: rows 50, 53 and 54."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from rows import Checkpoint, Row, Table, attempt, batches, judge, state_of, train
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

TABLE = Table()


class Tagged(Tensor):
    """A subclass that goes through every function."""


@TABLE.row(50)
def subclass_by_torch_function(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(4, 4)
    kinds = []

    def loss_of(x: Tensor) -> Tensor:
        y = checkpoint(lambda t: torch.sin(layer(t)).exp(), x.as_subclass(Tagged), use_reentrant=False)
        kinds.append(type(y).__name__)
        return y.sum()

    return {**train(layer, loss_of, batches(3, 4)), "kinds": kinds}


@TABLE.row(50)
def wrapper_of_two_tensors(checkpoint: Checkpoint) -> dict[str, object]:
    a, b = batches(3, 4, count=2)
    pair = TwoTensor(a, b).requires_grad_()
    y = checkpoint(lambda t: torch.sin(t).exp() * t, pair, use_reentrant=False)
    attempt(y.sum().backward, {"pair": pair})
    return {"y": y.detach(), "gradient": pair.grad}


@TABLE.row(50)
def parameter_that_is_a_subclass(checkpoint: Checkpoint) -> dict[str, object]:
    a, b = batches(4, 4, count=2)
    weight = nn.Parameter(TwoTensor(a, b))
    x = torch.ones(3, 4)
    y = checkpoint(lambda t: torch.sin(t @ weight).exp(), x, use_reentrant=False)
    attempt(y.sum().backward, {"weight": weight})
    return {"y": y.detach(), "gradient": weight.grad}


@TABLE.row(53)
def bfloat16_model(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.2), nn.Linear(6, 4)).bfloat16()
    inputs = [x.bfloat16() for x in batches(3, 4)]
    return train(model, lambda x: checkpoint(model, x, use_reentrant=False).square().sum(), inputs)


@TABLE.row(53)
def cast_through_float8(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(4, 4)

    def region(x: Tensor) -> Tensor:
        return torch.sin(layer(x).to(torch.float8_e4m3fn).to(torch.float32)) * x

    return train(layer, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(3, 4))


@TABLE.row(53)
def complex_numbers(checkpoint: Checkpoint) -> dict[str, object]:
    """A spectral layer: FFT, complex weight, conjugates, and back."""
    layer = nn.ParameterDict({"w": nn.Parameter(torch.randn(3, dtype=torch.complex64))})

    def region(x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x) * layer["w"]
        return torch.fft.irfft(spectrum * spectrum.conj() + spectrum, n=4).tanh()

    return train(layer, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(3, 4))


@TABLE.row(53)
def sparse_operand(checkpoint: Checkpoint) -> dict[str, object]:
    """A graph convolution: the sparse adjacency is an argument."""
    layer = nn.Linear(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adjacency = torch.eye(3).to_sparse_coo()

    def region(graph: Tensor, x: Tensor) -> Tensor:
        return torch.sparse.mm(graph, torch.relu(layer(torch.sparse.mm(graph, x)))).sin()

    return train(layer, lambda x: checkpoint(region, adjacency, x, use_reentrant=False).sum(), batches(3, 4))


@TABLE.row(53)
def sparse_gradients_of_an_embedding(checkpoint: Checkpoint) -> dict[str, object]:
    table = nn.Embedding(10, 4, sparse=True)
    tokens = torch.tensor([[1, 2, 1], [9, 0, 2]])
    found: dict[str, object] = {}
    for step in range(3):
        table.weight.grad = None
        loss = checkpoint(lambda t: torch.sin(table(t)), tokens, use_reentrant=False).sum()
        attempt(loss.backward, table)
        assert table.weight.grad is not None
        found[f"gradient {step}"] = table.weight.grad.clone()
        with torch.no_grad():
            table.weight.sub_(table.weight.grad.to_dense(), alpha=0.1)
    return {**found, "weight": table.weight.detach()}


@TABLE.row(54)
def nan_and_infinity(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(4, 4)
    x = torch.tensor([[float("nan"), 1, -0.0, float("inf")], [1, 2, float("-inf"), 1e-45]])
    return train(layer, lambda t: checkpoint(lambda u: torch.sin(layer(u)).exp(), t, use_reentrant=False).sum(), [x, x])


@TABLE.row(54, recomputes=None)
def empty_batch(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.2), nn.Linear(6, 4))
    empty = torch.empty(0, 4)
    return train(model, lambda x: checkpoint(model, x, use_reentrant=False).sum(), [empty, torch.ones(2, 4), empty])


@TABLE.row(54)
def anomaly_mode(checkpoint: Checkpoint) -> dict[str, object]:
    """Under anomaly detection a sound step runs, and a NaN in the backward is found."""
    layer = nn.Linear(4, 4)

    def region(x: Tensor) -> Tensor:
        return torch.sin(layer(x)).exp()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            good = train(layer, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(3, 4))
            x = torch.zeros(3, requires_grad=True)
            y = checkpoint(lambda t: torch.sqrt(t) * t, x, use_reentrant=False)
            found: Any = "no error"
            try:
                y.sum().backward()
            except RuntimeError as error:
                found = "nan" in str(error)
    return {"good": good, "found": found, "gradient": x.grad, **state_of(layer)}


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)
