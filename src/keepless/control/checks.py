"""Arguments that are not what they should be, refused before any work."""

from __future__ import annotations

import torch

from keepless.control.elsewhere import refuse_elsewhere
from keepless.errors import ParameterError, PlanError
from keepless.machine import Plan


def check_module(model: object) -> None:
    """Refuses what is not a module.

    Raises:
        ParameterError: it is something else.
    """
    if not isinstance(model, torch.nn.Module):
        raise ParameterError(f"The model is a {type(model).__name__}, not a torch.nn.Module.")


def check_plan(plan: object) -> None:
    """Refuses what is not a plan that can run: a path to one, say, or one for a device that was not there.

    Raises:
        PlanError: it is something else.
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            f"The plan is a {type(plan).__name__}, not a keepless.Plan; keepless.load reads one from a file."
        )
    refuse_elsewhere(plan)


def check_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Refuses an optimizer that steps something else: its bytes would be counted as none.

    Raises:
        ParameterError: none of the model's trainable parameters is in it.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ParameterError(f"optimizer= is a {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    own = {id(p) for p in model.parameters() if p.requires_grad}
    if own and not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ParameterError(
            f"The {type(optimizer).__name__} steps none of the model's trainable parameters: make it from "
            "model.parameters() of this very model."
        )
