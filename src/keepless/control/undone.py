"""Steps of a user's model that are run to be looked at, and undone.

Inside the block no plan stands in the model; when it ends, gradients, buffers, streams of random numbers and a plan
that stood there are as they were. Parameters are never stepped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from keepless._compat import ambient_state
from keepless.capture import Inputs, flatten_inputs, planned_device
from keepless.control.applying import remove
from keepless.control.captured import Capture
from keepless.control.loss_state import loss_untouched
from keepless.control.parts.module_plans import settings_of
from keepless.control.parts.module_steps import recording, standing_alone, tensors_of, uncompiled, without_plan
from keepless.control.plan_book.recapturing import bind, capture_of
from keepless.control.runner import Runner
from keepless.control.signature import batch_signature, check_signature, model_signature
from keepless.control.takeover import is_allowed, turned_off
from keepless.errors import LossError, PlanError
from keepless.execute import PlannedForward, make_entry
from keepless.machine import Plan
from keepless.modules.kinds import autocast_now
from keepless.modules.leftovers import steps_before
from keepless.modules.untouched import untouched


@contextlib.contextmanager
def captured_run(
    model: torch.nn.Module, batch: Any, plan: Plan, loss_fn: Any, caller: str
) -> Iterator[tuple[Runner, Capture]]:
    """Runs of a model whose step the plan has captured.

    Arguments:
        caller: for messages.

    Raises:
        PlanError: the plan was made for another model or batch, or under another autocast.
    """
    inputs = Inputs.of(batch)
    with (
        turned_off(model, is_allowed(plan)),
        loss_untouched(loss_fn or getattr(getattr(plan.capture, "settings", None), "loss_fn", None), model),
        without_plan(model),
        untouched(model, planned_device(model), tensors_of(batch)) as before,
    ):
        try:
            capture = capture_of(plan, model) or bind(model, plan, flatten_inputs(inputs))
            if ambient_state(capture.binding.device.type) != capture.binding.ambient:
                raise PlanError(
                    "The plan was made under another autocast, default dtype or choice of kernels than stands around "
                    f"{caller}: call it under the same."
                )
            settings = capture.settings
            loss_fn = loss_fn or settings.loss_fn
            yield Runner(model, inputs, batch, loss_fn, settings, capture.binding.device, before), capture
        finally:
            remove(model)


@contextlib.contextmanager
def modules_run(model: torch.nn.Module, batch: Any, plan: Plan, loss_fn: Any, caller: str) -> Iterator[Runner]:
    """Runs of a model that is planned by its blocks or module calls; as `captured_run`.

    Raises:
        LossError: the plan was made with a loss function, and none is given.
        PlanError: as there.
    """
    model = uncompiled(model)
    settings = settings_of(plan)
    loss_fn = loss_fn or settings.loss_fn
    if loss_fn is None and not settings.own_loss:
        raise LossError("The plan was made with a loss function, which a file does not hold: give loss_fn=.")
    check_signature(plan.signature, model_signature(model), "model")
    check_signature(plan.signature, batch_signature(flatten_inputs(Inputs.of(batch))), "batch")
    if plan.signature.get("autocast", autocast_now(model)) != autocast_now(model):
        raise PlanError(
            f"The plan was made under another autocast than stands around {caller}: call it under the same."
        )
    device = planned_device(model)
    inputs, batch = standing_alone(batch)
    with (
        turned_off(model, is_allowed(plan)),
        loss_untouched(loss_fn, model),
        recording(),
        without_plan(model),
        untouched(model, device, tensors_of(inputs)) as before,
    ):
        run = Runner(model, inputs, batch, loss_fn, settings, device, before)
        run.steps_before = steps_before(plan.signature)
        yield run


@contextlib.contextmanager
def with_program(
    model: torch.nn.Module, capture: Capture, program: Any, mark: Callable[[int], None] | None = None
) -> Iterator[None]:
    """The model trains by a program; calls that mean another step are refused. `mark` as in `make_entry`."""
    entry = make_entry(model, capture.flat, capture.binding, program, mark)
    try:
        model.__dict__["forward"] = PlannedForward(model, [entry], _refuse)
        yield
    finally:
        remove(model)


def _refuse(
    planned: PlannedForward, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
) -> None:
    raise PlanError(
        f"The plan was made for another step than this one: {reason}. Give the model and a batch as they were "
        "planned for, or plan for these."
    )
