"""Plans that are made in the first training step, from its own batch."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from keepless.capture import Inputs
from keepless.control.applying import remove
from keepless.control.checks import check_module
from keepless.control.takeover import check_checkpointing
from keepless.modules.lazy import Begin, LazyForward

M = TypeVar("M", bound=torch.nn.Module)


def begin_lazily(model: M, begin: Begin, *, takeover: bool = False) -> M:
    """A model whose first training call has `begin(model, inputs)` put a plan in, and then runs by it.

    A plan that stands in the model already is taken out.

    Raises:
        ParameterError: it is no module.
        CheckpointingError: the model checkpoints already, without `takeover`.
    """
    check_module(model)
    check_checkpointing(model, takeover)
    remove(model)
    LazyForward(model, begin).put_in()
    return model


def batch_of(inputs: Inputs) -> Any:
    """A call as `Inputs.of` reads it: a tensor, a tuple or a dict where it is one of these, else the inputs."""
    if inputs.kwargs:
        return inputs if inputs.args else inputs.kwargs
    if len(inputs.args) != 1:
        return inputs.args
    return inputs.args[0] if isinstance(inputs.args[0], torch.Tensor) else inputs
