"""Kinds of steps: what steps of one plan have in common.

A plan of module calls asks at each call which kind of step begins. `KindReader` remembers how the model is built and
looks each time whether it still is, by identity: a walk through a model of a hundred modules takes 0.3 ms, this a
twentieth.
"""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

import torch

from keepless._compat import tree_flatten

Key = tuple[Any, ...]
"""What steps of one plan have in common; see `step_key`."""

STRUCTURE, CONSTANT = 2000, 200
"""Characters of a call's structure, and of what is no tensor in it, that tell kinds of steps apart."""
LEAVES = 5
"""Place in a key of the first of the call's leaves."""

_FLAT = frozenset({torch.Tensor, torch.nn.Parameter, bool, int, float, str, type(None)})
"""Arguments of these types are leaves."""
_MOST_STRUCTURES = 64
_WALKS = ("modules", "named_modules", "parameters", "named_parameters", "_named_members")


def step_key(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
    """The kind of step that a call begins: what the model is like, whether gradients stand, and the call."""
    leaves, spec = tree_flatten((args, kwargs))
    stand = any(p.grad is not None for p in model.parameters())
    return (*model_key(model), autocast_now(model), stand, str(spec)[:STRUCTURE], *map(_leaf_key, leaves))


def model_key(model: torch.nn.Module) -> Key:
    """Modes of the modules, dtypes of the parameters and which of them are trained."""
    modules = list(model.modules())
    rows = {id(p): (p.dtype, p.requires_grad) for m in modules for p in m._parameters.values() if p is not None}
    return tuple(module.training for module in modules), tuple(rows.values())


def autocast_now(model: torch.nn.Module) -> str:
    """The dtype that autocast gives ops on the model's device; empty where it is off."""
    return _autocast_on(next((p.device.type for p in model.parameters()), "cpu"))


def without_constants(key: Key) -> Key:
    """A key in which what is no tensor stands for all others of its place."""
    return (*key[:LEAVES], *("constant" if isinstance(leaf, str) else leaf for leaf in key[LEAVES:]))


def _autocast_on(kind: str) -> str:
    return str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""


def _leaf_key(leaf: Any) -> Any:
    """A number may say how often a loop runs. A float does so rarely, and often changes with each step."""
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), str(leaf.dtype), leaf.requires_grad
    return "float" if isinstance(leaf, float) else repr(leaf)[:CONSTANT]


class _Build:
    """A model's modules and parameters when they were walked through. It has no reference to the model itself.

    Attributes:
        tables: the modules' own tables of modules and of parameters; `content` is what stands in them, in order.
        modules, params: the same, each once, the modules without the model.
        training, dtypes, trained: of these; `rows` is the same as `model_key` gives it.
    """

    __slots__ = ("content", "dtypes", "modules", "params", "rows", "tables", "trained", "training")

    def __init__(self, model: torch.nn.Module) -> None:
        found = list(model.modules())
        placed = [p for module in found for p in module._parameters.values()]
        self.modules = found[1:]
        self.tables: list[dict[str, Any]] = [m._modules for m in found]
        self.tables += [m._parameters for m in found]
        self.content = _content(self.tables)
        self.params = list({id(p): p for p in placed if p is not None}.values())
        self.training = [module.training for module in found]
        self.dtypes = [p.dtype for p in self.params]
        self.trained = [p.requires_grad for p in self.params]
        self.rows = tuple(self.training), tuple(zip(self.dtypes, self.trained, strict=True))

    def stands(self, model: torch.nn.Module) -> bool:
        """Whether the model is built so now, with the same modes, dtypes and trained parameters."""
        return (
            _are(_content(self.tables), self.content)
            and [model.training, *[module.training for module in self.modules]] == self.training
            and [p.dtype for p in self.params] == self.dtypes
            and [p.requires_grad for p in self.params] == self.trained
        )


def _content(tables: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable([table.values() for table in tables]))


def _are(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


class KindReader:
    """`step_key` of one model, quickly. Several threads may ask."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._build: _Build | None = None
        self._structures: dict[tuple[int, tuple[str, ...]], str] = {}
        own = torch.nn.Module
        own_ways = all(getattr(type(model), name, None) is getattr(own, name) for name in _WALKS)
        self._walks = own_ways and model.__dict__.keys().isdisjoint(_WALKS)

    def __call__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
        """The same as `step_key`."""
        if not self._walks:  # the model tells in its own way what it is made of
            return step_key(model, args, kwargs)
        build = self._build
        if build is None or not build.stands(model):
            build = self._build = _Build(model)
        params = build.params
        structure, leaves = self._flat(args, kwargs)
        return (
            *build.rows,
            _autocast_on(params[0].device.type if params else "cpu"),
            any(p.grad is not None for p in params),
            structure,
            *map(_leaf_key, leaves),
        )

    def _flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
        """The call's structure, and its leaves. Where all arguments are leaves, their number and names are enough."""
        leaves: Any = (*args, *kwargs.values())
        if not _FLAT.issuperset(map(type, leaves)):
            leaves, spec = tree_flatten((args, kwargs))
            return str(spec)[:STRUCTURE], leaves
        form = len(args), tuple(kwargs)
        structure = self._structures.get(form)
        if structure is None:
            found, spec = tree_flatten((args, kwargs))
            structure = str(spec)[:STRUCTURE]
            if not _are(list(found), list(leaves)):  # another release of torch has another order
                return structure, found
            if len(self._structures) < _MOST_STRUCTURES:
                self._structures[form] = structure
        return structure, leaves
