"""Tensors that the forward reads but that are no parameter, buffer or argument: where they live.

A captured step holds such a tensor for ever. That is right only as long as the model's code would read the same one,
so its home is found (an attribute of a module, a cell of a closure, a global) and each call asks it again.
A tensor without a home is refused: a target closed over by a lambda in a loop would silently train on old data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Getter = Callable[[], Any]


def find_home(model: torch.nn.Module, tensor: torch.Tensor) -> tuple[str, Getter] | None:
    """The name of a tensor's home and how to read it now; None where it is not found."""
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            label = f"{name}.{key}" if name else key
            if value is tensor:
                return label, _item_getter(module.__dict__, key)
            if isinstance(value, (list, tuple, dict)):
                for place, item in value.items() if isinstance(value, dict) else enumerate(value):
                    if item is tensor:
                        return f"{label}[{place!r}]", _nested_getter(module.__dict__, key, place)
        for function in functions_of(module):
            found = _in_function(function, tensor)
            if found is not None:
                return found
    return None


def functions_of(module: torch.nn.Module) -> Iterator[Any]:
    """The Python functions that a module's forward may call: its own forward, and functions among its attributes."""
    yield getattr(type(module), "forward", None)
    for value in module.__dict__.values():
        if callable(value) and not isinstance(value, torch.nn.Module):
            yield value


def _in_function(function: Any, tensor: torch.Tensor) -> tuple[str, Getter] | None:
    function = getattr(function, "__func__", getattr(function, "func", function))
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if content is tensor:
            return f"{name} of {function.__qualname__}", _cell_getter(cell)
    for name in code.co_names:
        if function.__globals__.get(name) is tensor:
            return name, _item_getter(function.__globals__, name)
    for index, default in enumerate(function.__defaults__ or ()):
        if default is tensor:
            return f"default {index} of {function.__qualname__}", _default_getter(function, index)
    return None


def _item_getter(table: dict[str, Any], key: str) -> Getter:
    return lambda: table.get(key)


def _nested_getter(table: dict[str, Any], key: str, place: Any) -> Getter:
    def read() -> Any:
        try:
            return table[key][place]
        except (KeyError, IndexError, TypeError):
            return None

    return read


def _cell_getter(cell: Any) -> Getter:
    def read() -> Any:
        try:
            return cell.cell_contents
        except ValueError:
            return None

    return read


def _default_getter(function: Any, index: int) -> Getter:
    def read() -> Any:
        defaults = function.__defaults__ or ()
        return defaults[index] if index < len(defaults) else None

    return read
