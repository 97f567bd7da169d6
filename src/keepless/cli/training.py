"""Training steps of a model under a plan: for `train`, and for the meter's process of `verify`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from keepless import api
from keepless.capture import Inputs
from keepless.cli.models import Built, Recipe, build


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


def train_step(built: Built) -> tuple[float, float]:
    """One step as a user writes it; its loss and its seconds."""
    inputs = Inputs.of(built.batch)
    start = time.perf_counter()
    if built.optimizer is not None:
        built.optimizer.zero_grad()
    else:
        built.model.zero_grad()
    loss = loss_of(built.model(*inputs.args, **inputs.kwargs), built.batch, built.loss_fn)
    loss.backward()  # type: ignore[no-untyped-call]
    if built.optimizer is not None:
        built.optimizer.step()
    value = float(loss.detach())
    return value, time.perf_counter() - start


def metered(recipe: Mapping[str, Any], plan_path: str) -> Callable[[], float]:
    """The meter's target: builds the model, applies the plan, and returns the step."""
    built = build(Recipe(**recipe))
    api.apply(built.model, api.load(plan_path), optimizer=built.optimizer)
    return lambda: train_step(built)[0]
