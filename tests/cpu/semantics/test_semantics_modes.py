"""Modes around and inside a region: rows 13, 14, 15, 42, 51 and 52."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rows import REFUSES, WRONG, Checkpoint, Row, Table, attempt, batches, judge, state_of, torch_differs, train
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

TABLE = Table()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))


@TABLE.row(13)
def autocast_with_an_island(checkpoint: Checkpoint) -> dict[str, object]:
    """bf16 around the region, off inside it; the backward runs without autocast."""
    model = mlp()

    def region(x: Tensor) -> Tensor:
        h = model(x)
        with torch.autocast("cpu", enabled=False):
            h = torch.softmax(h.float(), -1)
        return model(h)

    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(region, x, use_reentrant=False).float().square().mean()

    return train(model, loss_of, batches(4, 8))


@TABLE.row(13)
def backward_under_another_autocast(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()
    with torch.autocast("cpu", torch.bfloat16):
        bf16 = checkpoint(model, torch.ones(4, 8), use_reentrant=False).float().sum()
    none = checkpoint(model, torch.ones(4, 8), use_reentrant=False).sum()
    with torch.autocast("cpu", torch.float16):
        attempt(lambda: (bf16 + none).backward(), model)
    return {"loss": bf16 + none, **state_of(model)}


@TABLE.row(13)
def autocast_inside(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()

    def region(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    return train(model, lambda x: checkpoint(region, x, use_reentrant=False).float().sum(), batches(4, 8))


@TABLE.row(14)
def weight_cached_by_autocast_outside(checkpoint: Checkpoint) -> dict[str, object]:
    """The region finds a weight that was cast before it; the recomputation comes after the cache is gone."""
    layer = nn.Linear(8, 8)

    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = layer(x).tanh()
            x = checkpoint(lambda t: layer(layer(t).sin()), x, use_reentrant=False)
            return layer(x).float().square().mean()

    return train(layer, loss_of, batches(4, 8))


@TABLE.row(14)
def weight_shared_by_regions_under_autocast(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(8, 8)

    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                x = checkpoint(lambda t: torch.tanh(layer(t)), x, use_reentrant=False)
        return x.float().sum()

    return train(layer, loss_of, batches(4, 8))


@TABLE.row(14)
def backward_inside_autocast(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(lambda t: layer(layer(t).sin()), torch.ones(4, 8), use_reentrant=False)
        attempt(y.float().square().mean().backward, layer)
        z = layer(y.detach())
    return {"y": y, "z": z, **state_of(layer)}


@TABLE.row(14)
def autocast_without_cache(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(8, 8)

    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return checkpoint(lambda t: layer(layer(t).sin()), x, use_reentrant=False).float().sum()

    return train(layer, loss_of, batches(4, 8))


@TABLE.row(15)
def grad_modes_inside(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Linear(8, 8)

    def region(x: Tensor) -> tuple[Tensor, Tensor]:
        h = model(x)
        with torch.no_grad():
            target = model(h).sigmoid()
            with torch.enable_grad():
                h = torch.tanh(h * target)
        return h * target, target

    def loss_of(x: Tensor) -> Tensor:
        h, target = checkpoint(region, x, use_reentrant=False)
        assert not target.requires_grad
        return (h * target).sum()

    return train(model, loss_of, batches(4, 8))


@TABLE.row(15, recomputes=None)
def enable_grad_under_no_grad(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Linear(8, 8)

    def region(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return model(model(x).tanh()).sin()

    with torch.no_grad():
        y = checkpoint(region, torch.ones(4, 8), use_reentrant=False)
    attempt(y.sum().backward, model)
    return {"y": y, **state_of(model)}


@TABLE.row(15)
def no_grad_for_a_teacher(checkpoint: Checkpoint) -> dict[str, object]:
    student, teacher = mlp(), mlp()

    def region(x: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        return (student(x) - target).square().sum()

    return train(student, lambda x: checkpoint(region, x, use_reentrant=False), batches(4, 8))


@TABLE.row(42, recomputes=False)
def without_gradients(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()
    x = torch.ones(4, 8, requires_grad=True)
    with torch.no_grad():
        quiet = checkpoint(model, x, use_reentrant=False)
    with torch.inference_mode():
        inference = checkpoint(model, x, use_reentrant=False)
        is_inference = inference.is_inference()
    return {"quiet": quiet, "inference": inference.clone(), "is": is_inference, "next": torch.rand(2)}


@TABLE.row(42)
def evaluation_between_steps(checkpoint: Checkpoint) -> dict[str, object]:
    model = mlp()

    def loss_of(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = checkpoint(model, x, use_reentrant=False).std()
        return checkpoint(model, x, use_reentrant=False).sum() * scale

    return train(model, loss_of, batches(4, 8))


class Swap(TorchFunctionMode):
    """Runs another function for `torch.sin`, and a scaled one for `torch.nn.functional.linear`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.sin:
            return torch.tanh(*args, **(kwargs or {})) * self.scale
        result = func(*args, **(kwargs or {}))
        return result * self.scale if func is nn.functional.linear else result


@TABLE.row(51, torch=WRONG)
def function_mode_around_the_forward(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Linear(8, 8)

    def loss_of(x: Tensor) -> Tensor:
        with Swap(3.0):
            y = checkpoint(lambda t: torch.sin(model(torch.sin(t))).exp(), x, use_reentrant=False)
        return y.sum()

    return train(model, loss_of, batches(4, 8))


@TABLE.row(51, torch=WRONG)
def function_modes_nested(checkpoint: Checkpoint) -> dict[str, object]:
    """Two modes around, a third inside; the backward runs under a fourth."""
    model = nn.Linear(8, 8)

    def region(x: Tensor) -> Tensor:
        x = torch.sin(model(x))
        with Swap(0.5):
            return model(x).exp()

    with Swap(2.0), Swap(3.0):
        y = checkpoint(region, torch.ones(4, 8), use_reentrant=False)
    loss = y.sum()
    with Swap(7.0):
        attempt(loss.backward, model)
    return {"y": y, **state_of(model)}


@TABLE.row(51)
def default_device_around_the_forward(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Linear(8, 8)

    def loss_of(x: Tensor) -> Tensor:
        with torch.device("cpu"):
            return checkpoint(lambda t: torch.exp(model(t) * torch.ones(8)), x, use_reentrant=False).sum()

    return train(model, loss_of, batches(4, 8))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


@TABLE.row(52, torch=REFUSES)
def default_dtype_around_the_forward(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Linear(8, 8)

    def loss_of(x: Tensor) -> Tensor:
        with default_dtype(torch.float64):
            return checkpoint(lambda t: (model(t) * torch.full((8,), 0.1)).exp(), x, use_reentrant=False).sum()

    return train(model, loss_of, batches(4, 8))


@TABLE.row(52, torch=REFUSES)
def default_dtype_around_the_backward(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Linear(8, 8)
    y = checkpoint(lambda t: (model(t) * torch.full((8,), 0.1)).exp(), torch.ones(4, 8), use_reentrant=False).sum()
    with default_dtype(torch.float64):
        attempt(y.backward, model)
    return {"y": y, **state_of(model)}


@TABLE.row(52, torch=REFUSES)
def attention_kernel_chosen_around_the_forward(checkpoint: Checkpoint) -> dict[str, object]:
    project = nn.Linear(8, 24)

    def region(x: Tensor) -> Tensor:
        q, k, v = project(x).view(2, 5, 2, 12).transpose(1, 2).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)

    def loss_of(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            y = checkpoint(region, x, use_reentrant=False)
        return y.square().sum()

    return train(project, loss_of, batches(2, 5, 8))


@TABLE.row(52)
def attention_kernel_chosen_inside(checkpoint: Checkpoint) -> dict[str, object]:
    project = nn.Linear(8, 24)

    def region(x: Tensor) -> Tensor:
        q, k, v = project(x).view(2, 5, 2, 12).transpose(1, 2).chunk(3, -1)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.2)

    return train(project, lambda x: checkpoint(region, x, use_reentrant=False).square().sum(), batches(2, 5, 8))


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)
