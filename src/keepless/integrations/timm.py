"""timm: `model.set_grad_checkpointing()` with `keepless.checkpoint` in the place of torch's.

timm recomputes by torch's checkpoint, under which BatchNorm counts each batch twice. ::

    keepless.integrations.timm.set_grad_checkpointing(model)

`keepless.fit` needs none of this: it plans a timm model as any other.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import torch

from keepless.eager import checkpoint
from keepless.errors import IntegrationError

_enabled: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class _Instead:
    """A module's names, some of them replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def set_grad_checkpointing(model: torch.nn.Module, enable: bool = True) -> None:
    """`model.set_grad_checkpointing(enable)`; what it turns on recomputes by `keepless.checkpoint`.

    timm has one checkpoint function for all its models: while one model is on that was turned on here, those that were
    turned on elsewhere in this process are recomputed by Keepless, too (the same bits, and buffers that are right).

    Raises:
        IntegrationError: the model has no such switch, or timm is older than 1.0.16, where each model has its own.
    """
    switch = getattr(model, "set_grad_checkpointing", None)
    if not callable(switch):
        raise IntegrationError(
            f"{type(model).__name__} has no set_grad_checkpointing: give timm's model itself, or plan it with "
            "keepless.fit, which takes any."
        )
    shared: Any = importlib.import_module("timm.models._manipulate")
    if not hasattr(shared, "checkpoint"):
        raise IntegrationError("This timm has no checkpoint function of its own: 1.0.16 or newer is needed.")
    switch(enable)
    if enable:
        _enabled.add(model)
        weakref.finalize(model, _settle, shared)
    else:
        _enabled.discard(model)
    _settle(shared)


def _settle(shared: Any) -> None:
    """timm's function calls Keepless' as long as a model is on."""
    if not list(_enabled):  # its length counts a model that is going right now
        shared.torch = torch
    elif shared.torch is torch:
        functions = _Instead(torch.utils.checkpoint, checkpoint=checkpoint)
        shared.torch = _Instead(torch, utils=_Instead(torch.utils, checkpoint=functions))
