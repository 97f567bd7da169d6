"""A loss function's own state while it is planned: planning calls the loss, and what it changes is put back."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch

from keepless.modules.untouched import untouched

_DEEPEST = 4
"""Functions in functions that are looked into."""


@contextlib.contextmanager
def loss_untouched(loss_fn: Any, model: torch.nn.Module) -> Iterator[None]:
    """Modules that a loss function can reach by name (a criterion, a teacher) are as they were when the block ends."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with contextlib.ExitStack() as stack:
        for module in modules_of(loss_fn, model):
            stack.enter_context(untouched(module, device, ()))
        yield


def modules_of(loss_fn: Any, model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that a function's closure, defaults, globals, arguments or owner hold, those of the model apart; none
    that is part of another."""
    own = {id(module) for module in model.modules()}
    found: dict[int, torch.nn.Module] = {}
    seen: set[int] = set()
    left = [(loss_fn, 0)]
    while left:
        value, depth = left.pop()
        if value is None or id(value) in seen or depth > _DEEPEST:
            continue
        seen.add(id(value))
        if isinstance(value, torch.nn.Module):
            if id(value) not in own and not any(id(part) in own for part in value.modules()):
                found[id(value)] = value
        else:
            left += [(held, depth + 1) for held in _held_by(value)]
    inner = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return [module for key, module in found.items() if key not in inner]


def _held_by(value: Any) -> list[Any]:
    """What a function, method or partial leads to."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if not isinstance(value, types.FunctionType):
        return []
    found = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    for cell in value.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty yet
            found.append(cell.cell_contents)
    return [*found, *(value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__)]


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*inner)
