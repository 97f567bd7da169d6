"""Around trial steps of a model that is planned by module calls: what is refused, and what the model is like then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from keepless import _compat
from keepless.capture import Inputs, standing_forward
from keepless.capture.checkpointed import checkpointed_places, refuse_checkpointing
from keepless.errors import CaptureError, ParameterError, PlanError
from keepless.execute import PlannedForward
from keepless.modules.lazy import LazyForward
from keepless.modules.planned import PlannedModules, RegionForward

PLANS = (PlannedForward, PlannedModules, LazyForward)
"""What stands in a planned model's place of its forward; the last where the plan is still to be made."""


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module that torch.compile wrapped; a module that it did not wrap, as it is."""
    inner = model.__dict__.get("_modules", {}).get("_orig_mod")
    return inner if isinstance(inner, torch.nn.Module) else model


def tensors_of(batch: Any) -> list[torch.Tensor]:
    """The tensors of a call."""
    inputs = Inputs.of(batch)
    leaves = _compat.tree_leaves((inputs.args, inputs.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def standing_alone(batch: Any) -> tuple[Inputs, Any]:
    """The call of a batch, and the batch: tensors that come from a graph of the caller's are cut off from it, so that
    a trial's backward ends there.
    """
    known: dict[int, torch.Tensor] = {}

    def alone(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.is_leaf or not leaf.requires_grad:
            return leaf
        return known.setdefault(id(leaf), leaf.detach().requires_grad_())

    inputs = Inputs.of(batch)
    args, kwargs = _compat.tree_map(alone, (inputs.args, inputs.kwargs))
    own = Inputs(*args, **kwargs)
    return own, own if batch is inputs else _compat.tree_map(alone, batch)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd records inside the block, whatever stands around it."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def check(model: torch.nn.Module) -> None:
    """Refuses a model that cannot be measured by running it.

    Raises:
        CaptureError: lazy parameters, no weights yet, several devices.
        ParameterError: nothing is trained.
        CheckpointingError: it checkpoints already.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(map(torch.nn.parameter.is_lazy, tensors)):
        raise CaptureError(
            "The model has lazy parameters, whose shapes are not known yet: call it once on a batch before planning."
        )
    if any(tensor.is_meta for tensor in tensors):
        raise CaptureError(
            "The eager engine measures by running the model, and this one is on the meta device: give it weights, or "
            "plan with the graph engine."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ParameterError("No parameter of the model requires a gradient: there is nothing to train.")
    refuse_checkpointing(checkpointed_places(model))
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise CaptureError(f"The model is on several devices ({', '.join(devices)}); a plan is for one.")


def check_alone(model: torch.nn.Module) -> None:
    """Refuses a model of which a part has a plan, its own or that of a model around both: two plans in one module
    would recompute each other's recomputes.

    Raises:
        PlanError: names the part.
    """
    for path, module in model.named_modules():
        standing = module.__dict__.get("forward")
        if isinstance(standing, PlannedModules) and path:
            raise PlanError(
                f"The module {path!r} inside this model has a plan of its own: call keepless.remove on it first, or "
                "plan it alone."
            )
        if isinstance(standing, RegionForward) and standing.planned is not planned_modules(model):
            raise PlanError(
                f"The module {path or type(module).__name__!r} runs by the plan of a model around it: call "
                "keepless.remove on that model first."
            )


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Compiled modules run the code that they were compiled from: their calls are seen only there."""
    with torch.compiler.set_stance("force_eager"):
        yield


def planned_modules(model: torch.nn.Module) -> PlannedModules | None:
    """The plan of module calls that stands in a model, if any."""
    found = standing_forward(uncompiled(model))
    return found if isinstance(found, PlannedModules) and not found.is_out else None


def standing_plan(model: torch.nn.Module) -> PlannedModules | PlannedForward | LazyForward | None:
    """The plan that stands in a model, if any, or waits in it for its first step."""
    found = planned_modules(model) or standing_forward(model)
    return found if isinstance(found, PLANS) and not found.is_out else None


@contextlib.contextmanager
def without_plan(model: torch.nn.Module) -> Iterator[None]:
    """The model runs its own code inside the block; a plan of any kind that stands in it is put back afterwards, in the
    place of one that was put in meanwhile.
    """
    homes = dict.fromkeys((model, uncompiled(model)))
    standing = [plan for home in homes if isinstance(plan := standing_forward(home), PLANS) and not plan.is_out]
    try:
        for plan in standing:
            plan.take_out()
        yield
    finally:
        for home in homes:
            if isinstance(plan := standing_forward(home), PLANS):
                plan.take_out()
        for plan in reversed(standing):
            plan.put_in()
