"""What a traced forward does to Python's state is looked for, undone, and a reason to refuse the model.

A captured step would not have those effects: a draw from Python's random numbers would be repeated for ever, a counter
would stand still.
"""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from keepless.errors import CaptureError


@contextlib.contextmanager
def guard_side_effects(model: torch.nn.Module) -> Iterator[None]:
    """Undoes what the traced forward did to Python's state, and refuses the model if it did anything."""
    before = python_state(model)
    modes = [(module, module.training) for module in model.modules()]
    python_rng, numpy_rng = random.getstate(), np.random.get_state()
    torch_rng = torch.get_rng_state()
    try:
        yield
    finally:
        python_drawn = random.getstate() != python_rng
        numpy_drawn = _numpy_key(np.random.get_state()) != _numpy_key(numpy_rng)
        random.setstate(python_rng)
        np.random.set_state(numpy_rng)
        torch.set_rng_state(torch_rng)
        changed = restore_python_state(model, before)
        for module, training in modes:
            module.training = training
    if python_drawn or numpy_drawn:
        raise CaptureError(
            f"The forward draws from {'Python' if python_drawn else 'NumPy'}'s random numbers; a captured step would "
            "repeat one draw for ever. Draw with torch."
        )
    if changed:
        raise CaptureError(
            f"The forward changes {changed[0]} in Python; a captured step would not. Keep it in a buffer instead."
        )


def _numpy_key(state: Any) -> tuple[Any, ...]:
    return (state[0], state[1].tobytes(), *state[2:])


def python_state(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, dict[str, Any]]]:
    """Each module's attributes, its tables of hooks among them; lists and dicts by a shallow copy."""
    return [(name, m, {k: _snapshot(v) for k, v in m.__dict__.items()}) for name, m in model.named_modules()]


def _snapshot(value: Any) -> Any:
    return (value, value.copy()) if type(value) in (list, dict, set, OrderedDict) else (value, None)


def restore_python_state(
    model: torch.nn.Module, before: list[tuple[str, torch.nn.Module, dict[str, Any]]]
) -> list[str]:
    """Puts attributes back; returns the names of those that had changed."""
    changed: list[str] = []
    for name, module, attributes in before:
        now = module.__dict__
        for key in [key for key in now if key not in attributes]:
            changed.append(f"{name}.{key}".lstrip("."))
            del now[key]
        for key, (value, copy) in attributes.items():
            if now.get(key, _MISSING) is not value:
                changed.append(f"{name}.{key}".lstrip("."))
                now[key] = value
            if copy is not None and not _same_items(value, copy):
                changed.append(f"{name}.{key}".lstrip("."))
                _refill(value, copy)
    return [name for name in changed if name.rpartition(".")[2] not in _HARMLESS]


_MISSING = object()
_HARMLESS = ("_is_full_backward_hook", "_flat_weights", "_flat_weight_refs")
"""Caches of torch's own modules that swapping parameters refreshes."""


def _same_items(now: Any, copy: Any) -> bool:
    if len(now) != len(copy):
        return False
    if isinstance(now, dict):
        return all(key in now and now[key] is item for key, item in copy.items())
    if isinstance(now, set):
        return bool(now == copy)
    return all(a is b for a, b in zip(now, copy, strict=True))


def _refill(container: Any, items: Any) -> None:
    container.clear()
    container.extend(items) if isinstance(container, list) else container.update(items)
