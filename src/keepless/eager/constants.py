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


def is_constant(item: Variable) -> bool:
    """Whether a variable held a plain value where its holder's own dictionary has it, or nothing at all."""
    own = item.holder if isinstance(item.holder, dict) else item.holder.__dict__
    is_plain = item.value is MISSING or item.value.__class__ in closures.PLAIN
    return is_plain and not item.is_set and item.home is own


def is_submodule(item: Variable) -> bool:
    """Whether a variable held a module."""
    return isinstance(item.value, torch.nn.Module)


class Constants:
    """Variables by holder, with what they held; holders and modules are referred to weakly."""

    def __init__(self, variables: Iterable[Variable]) -> None:
        self._groups: dict[int, tuple[Any, Any, dict[str, Any]]] = {}
        for item in variables:
            held = weakref.ref(item.value) if is_submodule(item) else item.value
            key = id(item.home)
            if key not in self._groups:
                holder = item.holder if isinstance(item.holder, dict) else weakref.ref(item.holder)
                self._groups[key] = (holder, world.home_name(item), {})
            self._groups[key][2][item.name] = held

    def changed(self) -> list[Variable]:
        """Those that hold something else now, each as it was."""
        found: list[Variable] = []
        for reference, home_name, values in self._groups.values():
            holder: Any = reference() if reference.__class__ is weakref.ref else reference
            if holder is None:
                continue
            now = (getattr(holder, home_name) if home_name else holder).get
            for name, value in values.items():
                if value.__class__ is weakref.ref:
                    value = value()
                    if value is None:
                        value = MISSING
                if now(name, MISSING) is not value:
                    found.append(Variable(holder, name, value, None, False))
        return found

    def without(self, variables: Iterable[Variable]) -> Constants:
        """The others."""
        gone = {(id(item.holder), item.name) for item in variables}
        made = Constants(())
        for key, (reference, home_name, values) in self._groups.items():
            holder = reference() if reference.__class__ is weakref.ref else reference
            left = {name: value for name, value in values.items() if (id(holder), name) not in gone}
            if left:
                made._groups[key] = (reference, home_name, left)
        return made
