"""What a traced forward does to Python's state is looked for, undone, and a reason to refuse the model.

A captured step would not have those effects: a draw from Python's random numbers would be repeated for ever, a counter
would stand still.
"""

from __future__ import annotations

import contextlib
import random
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
        changed = restore_python_state(before)
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


@dataclass(frozen=True)
class PythonState:
    """What a model's attributes are, and what stands in the containers and objects that they hold.

    Arguments:
        holders: name, modules and plain objects, their attributes.
        contents: name, lists, dicts, sets and deques, a shallow copy of each.
        own: ids of the modules, and of the containers that stand in their attributes.
    """

    holders: list[tuple[str, Any, dict[str, Any]]]
    contents: list[tuple[str, Any, Any]]
    own: frozenset[int]


CONTAINERS = (list, dict, set, OrderedDict, deque, defaultdict)
"""Whose content a forward may change, and which are put back."""
HOSTS = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})
"""Packages whose objects have a model, and are no state of it: a trainer leads to the loader, and that to all data."""
_FOREIGN = frozenset(("torch", "numpy", "keepless", *HOSTS, *sys.stdlib_module_names))
_MOST_ITEMS = 4096
"""Longer containers that stand in others are left out, and so are objects beyond so many."""


def python_state(model: torch.nn.Module) -> PythonState:
    """What a forward may change in Python: see `PythonState`."""
    modules = list(model.named_modules())
    holders = [(name, module, dict(module.__dict__)) for name, module in modules]
    contents: list[tuple[str, Any, Any]] = []
    own = {id(module) for _, module in modules}
    seen = set(own)
    waiting = deque((f"{name}.{key}", value, True) for name, _, held in holders for key, value in held.items())
    while waiting:
        name, value, is_own = waiting.popleft()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, torch.Tensor)):
            continue
        is_container = type(value) in CONTAINERS
        if not is_own and len(seen) > _MOST_ITEMS + len(modules):
            break
        if is_container and (is_own or len(value) <= _MOST_ITEMS):
            seen.add(id(value))
            if is_own:
                own.add(id(value))
            contents.append((name, value, value.copy()))
        elif _is_plain(value):
            seen.add(id(value))
            holders.append((name, value, dict(vars(value))))
            waiting.extend((f"{name}.{key}", item, False) for key, item in vars(value).items())
        if (is_container or type(value) is tuple) and len(value) <= _MOST_ITEMS:
            waiting.extend((name, item, False) for item in (value.values() if isinstance(value, dict) else value))
    return PythonState(holders, contents, frozenset(own))


def _is_plain(value: Any) -> bool:
    """Whether a value is an object of the user's with attributes of its own."""
    if isinstance(value, (type, types.ModuleType, types.FunctionType, types.MethodType, torch.nn.Module)):
        return False
    return type(value).__module__.partition(".")[0] not in _FOREIGN and hasattr(value, "__dict__")


def restore_python_state(before: PythonState) -> list[str]:
    """Puts attributes and contents back; returns the names of those that had changed and count.

    Deeper than a module's own attributes and containers only tensors count: a model may log there what it likes.
    """
    changed: list[str] = []

    def note(name: str, holder: Any, values: Iterable[Any]) -> None:
        if id(holder) in before.own or any(_holds_tensors(value) for value in values):
            changed.append(name.lstrip("."))

    for name, container, copy in before.contents:
        if not _same_items(container, copy):
            note(name, container, container.values() if isinstance(container, dict) else container)
            _refill(container, copy)
    for name, holder, attributes in before.holders:
        now = holder.__dict__
        for key in [key for key in now if key not in attributes]:
            note(f"{name}.{key}", holder, (now[key],))
            del now[key]
        for key, value in attributes.items():
            if now.get(key, _MISSING) is not value:
                note(f"{name}.{key}", holder, (now.get(key),))
                now[key] = value
    return [name for name in changed if name.rpartition(".")[2] not in _HARMLESS]


_MISSING = object()
_HARMLESS = ("_is_full_backward_hook", "_flat_weights", "_flat_weight_refs")
"""Caches of torch's own modules that swapping parameters refreshes."""


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if isinstance(value, torch.Tensor) or not depth:
        return isinstance(value, torch.Tensor)
    if type(value) in CONTAINERS or type(value) is tuple:
        return any(_holds_tensors(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
    return _is_plain(value) and any(_holds_tensors(item, depth - 1) for item in vars(value).values())


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
    container.extend(items) if isinstance(container, (list, deque)) else container.update(items)
