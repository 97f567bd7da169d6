"""Training steps of a model, with a plan or without: for `train` and `bench`, and for the meter's process."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from keepless import api
from keepless.capture import Inputs
from keepless.cli.models import Built, Recipe, build
from keepless.measure import StepMeter, standing_tensors
from keepless.modules.blocks import find_blocks

CHECKPOINT = "checkpoint"
"""The contender that has torch's checkpointing on every block."""


def loss_of(output: Any, batch: Any, loss_fn: Any) -> torch.Tensor:
    """The loss of an output: the user's own, the output's `.loss`, its first element, or the output itself."""
    if loss_fn is not None:
        found: torch.Tensor = loss_fn(output, batch)
        return found
    if isinstance(output, torch.Tensor):
        return output
    own = getattr(output, "loss", None)
    if own is not None:
        return own  # type: ignore[no-any-return]
    return output["loss"] if isinstance(output, Mapping) else output[0]  # type: ignore[no-any-return]


def train_step(built: Built, accumulate: int = 1) -> tuple[float, float]:
    """One step as a user writes it; its loss and its seconds.

    Arguments:
        accumulate: forwards and backwards whose gradients are added; the loss is their sum.
    """
    inputs = Inputs.of(built.batch)
    start = time.perf_counter()
    if built.optimizer is not None:
        built.optimizer.zero_grad()
    else:
        built.model.zero_grad()
    losses: list[torch.Tensor] = []
    for _ in range(accumulate):
        loss = loss_of(built.model(*inputs.args, **inputs.kwargs), built.batch, built.loss_fn)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    if built.optimizer is not None:
        built.optimizer.step()
    return sum(map(float, losses)), time.perf_counter() - start


def metered_step(built: Built, accumulate: int, *, is_metered: bool) -> tuple[float, float, int | None]:
    """One step; its loss, its seconds, and its highest bytes where they are measured: those of the model, its
    optimizer and the batch, and what the step allocates."""
    device = next(built.model.parameters()).device
    meter = StepMeter(device, is_alone=True)
    if is_metered:
        built.model.zero_grad()  # the step does so too: what it would free is not told
        inputs = Inputs.of(built.batch)
        given = [item for item in (*inputs.args, *inputs.kwargs.values()) if isinstance(item, torch.Tensor)]
        optimizers = [] if built.optimizer is None else [built.optimizer]
        meter.begin([*standing_tensors(built.model, optimizers), *given])
    loss, seconds = train_step(built, accumulate)
    return loss, seconds, meter.end() if meter.is_running else None


def checkpoint_blocks(model: torch.nn.Module) -> int:
    """Puts torch's checkpointing, non-reentrant, on every repeated block; how many there are."""
    paths = [path for path in find_blocks(model) if any(True for _ in model.get_submodule(path).children())]
    for path in paths:
        block = model.get_submodule(path)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return len(paths)


def metered(recipe: Mapping[str, Any], plan_path: str = "", contender: str = "") -> Callable[[], dict[str, Any]]:
    """The meter's target: builds the model, applies what is named, and returns the step.

    Arguments:
        plan_path: a plan to train by.
        contender: "checkpoint" for torch's.
    """
    built = build(Recipe(**recipe))
    if contender == CHECKPOINT:
        checkpoint_blocks(built.model)
    if plan_path:
        api.apply(built.model, api.load(plan_path), optimizer=built.optimizer)
    losses: list[str] = []

    def step() -> dict[str, Any]:
        losses.append(train_step(built)[0].hex())
        return {"losses": losses, "parameters": digest(built.model)}

    return step


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of all that a model has learned, and of its buffers."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
