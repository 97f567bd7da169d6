"""Attributes and globals that a region reads and that stay as they are: numbers, strings, None, modules.

Most of what a region's code names is such. Asking whether one is still the same costs a look-up, where a `Variable` of
each for each call would cost more than the rest of the call.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from keepless.eager import closures, world
from keepless.eager.world import MISSING, Variable

_reference = weakref.ref


def is_constant(item: Variable) -> bool:
    """Whether a variable held a plain value, or some in a tuple, in its holder's own dictionary, or nothing at all."""
    own = item.holder if isinstance(item.holder, dict) else item.holder.__dict__
    return not item.is_set and item.home is own and (item.value is MISSING or _is_plain(item.value))


def _is_plain(value: Any) -> bool:
    plain = closures.PLAIN
    return value.__class__ in plain or (value.__class__ is tuple and all(part.__class__ in plain for part in value))


def is_submodule(item: Variable) -> bool:
    """Whether a variable held a module."""
    return isinstance(item.value, torch.nn.Module)


class Constants:
    """Variables by holder, with what they held; holders and modules are referred to weakly."""

    def __init__(self, variables: Iterable[Variable]) -> None:
        self._groups: dict[int, tuple[Any, Any, dict[str, Any]]] = {}
        for item in variables:
            held = _reference(item.value) if is_submodule(item) else item.value
            key = id(item.home)
            if key not in self._groups:
                holder = item.holder if isinstance(item.holder, dict) else _reference(item.holder)
                self._groups[key] = (holder, world.home_name(item), {})
            self._groups[key][2][item.name] = held

    def __bool__(self) -> bool:
        return bool(self._groups)

    def changed(self) -> list[Variable]:
        """Those that hold something else now, each as it was."""
        found: list[Variable] = []
        for reference, home_name, values in self._groups.values():
            holder: Any = reference() if reference.__class__ is _reference else reference
            if holder is None:
                continue
            now = getattr(holder, home_name) if home_name else holder
            for name, held in values.items():
                value = now.get(name, MISSING)
                if value is not held and (held.__class__ is not _reference or value is not held()):
                    before = held() if held.__class__ is _reference else held
                    found.append(Variable(holder, name, before, None, False))
        return found

    def modules(self) -> list[Any]:
        """The modules, so that they live while somebody may want them back."""
        return [held() for group in self._groups.values() for held in group[2].values() if held.__class__ is _reference]

    def without(self, variables: Iterable[Variable]) -> Constants:
        """The others."""
        gone = {(id(item.holder), item.name) for item in variables}
        made = Constants(())
        for key, (reference, home_name, values) in self._groups.items():
            holder = reference() if reference.__class__ is _reference else reference
            left = {name: value for name, value in values.items() if (id(holder), name) not in gone}
            if left:
                made._groups[key] = (reference, home_name, left)
        return made
