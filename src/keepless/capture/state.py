"""A model's tensors and its forward, as a capture sees them."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from keepless import _compat
from keepless.errors import CaptureError

_state = threading.local()


def forward_of(model: torch.nn.Module) -> Callable[..., Any]:
    """The model's own forward, beneath a plan that may be applied."""
    planned = model.__dict__.get("forward")
    return getattr(planned, "original", None) or model.forward


def planned_device(model: torch.nn.Module) -> torch.device:
    """The device that a plan is made for; a model on the meta device, which has no weights yet, is planned for cpu."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


@contextlib.contextmanager
def watched(model: torch.nn.Module) -> Iterator[list[tuple[str, str, Any]]]:
    """Gathers the plain attributes that the model's code reads, and refuses code that seeds generators."""
    names = {id(module): name for name, module in model.named_modules()}
    seen: dict[tuple[str, str], Any] = {}
    found: list[tuple[str, str, Any]] = []

    def read(module: torch.nn.Module, name: str, value: Any) -> None:
        path = names.get(id(module))
        if (
            path is not None
            and not getattr(_state, "is_looking", False)
            and name not in _OWN_ATTRIBUTES
            and not isinstance(value, (torch.nn.Module, types.MethodType))
        ):
            seen.setdefault((path, name), value)

    def seed(name: str) -> None:
        raise CaptureError(
            f"The forward calls torch.{name}, so that a captured step would draw other random numbers. Seed outside."
        )

    with _compat.watch_attributes(read), _compat.watch_seeding(seed):
        yield found
    found.extend((path, name, value) for (path, name), value in seen.items())


_OWN_ATTRIBUTES = frozenset({*torch.nn.Module().__dict__, "forward", "__dict__", "_flat_weights", "_flat_weight_refs"})
"""Attributes that torch reads itself; guards look after them by other means."""


class Holder(torch.nn.Module):
    """So that a functional call runs the forward itself, without the root's hooks."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = _seen_state(self.model)
        output = forward_of(self.model)(*args, **kwargs)
        for (name, old), (_, new) in zip(before, _seen_state(self.model), strict=True):
            if old is not new:
                raise CaptureError(
                    f"The forward assigns a new tensor to {name}; a captured step would not. Write into it in place, "
                    "with copy_()."
                )
        return output


def named_state(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by the paths of their modules: wrappers may show them by other names."""
    module = torch.nn.Module
    return [*module.named_parameters(model), *module.named_buffers(model)]


def _seen_state(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """`named_state` in a forward that is watched: a module's `__hash__` may read attributes, as torchmetrics' do."""
    _state.is_looking = True
    try:
        return named_state(model)
    finally:
        _state.is_looking = False


def places_of_state(model: torch.nn.Module) -> list[tuple[str, int]]:
    """Every place in which a parameter or buffer stands, and which of `named_state` it is.

    Each module counts once, by its first path. torch's own way to swap tied tensors goes through a module that has two
    paths twice, and torch 2.11 then puts back what it had put in.
    """
    number = {id(tensor): index for index, (_, tensor) in enumerate(named_state(model))}
    return [
        (f"{path}.{key}".lstrip("."), number[id(tensor)])
        for path, module in model.named_modules()
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
        if tensor is not None
    ]
