"""Checkpointing that a model has already, turned off for as long as a plan stands in it.

It is turned off by the library's own function where there is one, else by its flag. What that changed in the model's
modules is remembered, and put back as it was: the same flags, functions with the same arguments, hooks.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from keepless.capture.checkpointed import (
    FLAGS,
    as_it_is,
    checkpointed_places,
    is_fairscale,
    is_wrapper,
    refuse_checkpointing,
)
from keepless.control.parts.module_steps import uncompiled
from keepless.errors import CheckpointingError
from keepless.machine import Plan

TAKEOVER = "takeover"
"""What a plan's signature says where its model's own checkpointing may be turned off."""

_SWITCHES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("activation_checkpointing_disable", ()),  # transformers from 5
    ("gradient_checkpointing_disable", ()),  # transformers
    ("disable_gradient_checkpointing", ()),  # diffusers
    ("set_grad_checkpointing", (False,)),  # timm
)
_MISSING = object()


class Taken:
    """What turning a model's checkpointing off has changed. It holds no reference to the model, which must stay free
    to go.

    Attributes:
        places: where the model checkpointed.
    """

    def __init__(self, model: torch.nn.Module, places: tuple[str, ...]) -> None:
        self.places = places
        self._changes: list[tuple[weakref.ref[torch.nn.Module], dict[str, Any], dict[str, dict[Any, Any]]]] = []
        if not places:
            return
        modules = list(model.modules())
        before = [(module.__dict__.copy(), _hooks(module)) for module in modules]
        try:
            _turn_off(model)
            left = checkpointed_places(model)
            if left:
                raise CheckpointingError(
                    f"The model's checkpointing cannot be turned off: its own switch leaves it on at {left[0]}. Turn "
                    "it off yourself before planning.",
                    places=left,
                )
        except BaseException:
            self._compare(modules, before)
            self.give_back()
            raise
        self._compare(modules, before)

    def _compare(self, modules: list[torch.nn.Module], before: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        for module, (attributes, hooks) in zip(modules, before, strict=True):
            now = module.__dict__
            changed = {
                name: attributes.get(name, _MISSING)
                for name in (*attributes, *(name for name in now if name not in attributes))
                if attributes.get(name, _MISSING) is not now.get(name, _MISSING)
            }
            gone = {name: table for name, table in hooks.items() if any(key not in now[name] for key in table)}
            for name, table in gone.items():  # those that stayed are not ours to put back
                gone[name] = {key: _MISSING if key in now[name] else hook for key, hook in table.items()}
            if changed or gone:
                self._changes.append((weakref.ref(module), changed, gone))

    def give_back(self) -> None:
        """The model checkpoints again as it did."""
        for ref, changed, gone in self._changes:
            module = ref()
            if module is None:
                continue
            for name, value in changed.items():
                if value is _MISSING:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = value
            for name, hooks in gone.items():
                table = module.__dict__[name]
                now = table.copy()
                table.clear()
                for key, hook in hooks.items():
                    if hook is not _MISSING or key in now:
                        table[key] = now.get(key, hook)
                table.update(now)  # those that were registered since come last
        self._changes.clear()


def _hooks(module: torch.nn.Module) -> dict[str, dict[Any, Any]]:
    return {
        name: table.copy() for name, table in module.__dict__.items() if "hooks" in name and isinstance(table, dict)
    }


def _turn_off(model: torch.nn.Module) -> None:
    """Whatever way each module's library has, the outermost modules first."""
    for path, module in model.named_modules():
        if is_fairscale(module):
            raise CheckpointingError(
                f"fairscale's checkpoint_wrapper has replaced the forward of {path or 'the model'} and changed its "
                "normalizations; it has no way back. Build the model without it.",
                places=(path or type(module).__name__,),
            )
        for name, args in _SWITCHES:
            if callable(getattr(type(module), name, None)) and checkpointed_places(module):
                _switch(module, name, args, path)
                break
    for module in model.modules():
        if is_wrapper(module):
            module.__dict__["checkpoint_fn"] = as_it_is
        for name in FLAGS:
            if module.__dict__.get(name) is True:
                setattr(module, name, False)
            elif name not in module.__dict__ and getattr(type(module), name, None) is True:
                module.__dict__[name] = False


def _switch(module: torch.nn.Module, name: str, args: tuple[Any, ...], path: str) -> None:
    try:
        getattr(module, name)(*args)
        # transformers hooks the embeddings so that their outputs require gradients; its switch may leave that on.
        if module.__dict__.get("_require_grads_hook") is not None:
            module.disable_input_require_grads()  # type: ignore[operator]
    except Exception as error:
        raise CheckpointingError(
            f"The model's checkpointing cannot be turned off: {name} of {path or type(module).__name__} failed "
            f"({type(error).__name__}: {error}). Turn it off yourself before planning.",
            places=(path or type(module).__name__,),
        ) from error


_taken: weakref.WeakKeyDictionary[torch.nn.Module, Taken] = weakref.WeakKeyDictionary()
"""Of models in which a plan stands: what was taken over for it."""


def is_allowed(plan: Plan) -> bool:
    """Whether a plan was made with takeover=True."""
    return plan.signature.get(TAKEOVER) is True


def note(signature: dict[str, object], takeover: bool) -> None:
    """Writes into a plan's signature that its model's own checkpointing may be turned off."""
    if takeover:
        signature[TAKEOVER] = True


def check_checkpointing(model: torch.nn.Module, takeover: bool) -> None:
    """Refuses a model that checkpoints, or would if no plan stood in it, unless that may be taken over.

    Raises:
        CheckpointingError: names where.
    """
    if not takeover:
        standing = _taken.get(uncompiled(model))
        refuse_checkpointing(standing.places if standing is not None else checkpointed_places(model))


@contextlib.contextmanager
def turned_off(model: torch.nn.Module, takeover: bool) -> Iterator[None]:
    """Inside, the model does not checkpoint, whatever plans are put in and taken out; afterwards it is as before.

    Raises:
        CheckpointingError: it does, and may not be taken over.
    """
    check_checkpointing(model, takeover)
    model = uncompiled(model)
    standing, own = _taken.get(model), None
    try:
        _taken.pop(model, None)
        if standing is None:
            own = Taken(model, checkpointed_places(model))
        yield
    finally:
        if standing is not None:
            _taken[model] = standing
        if own is not None:
            own.give_back()


def take(model: torch.nn.Module) -> None:
    """Turns the model's checkpointing off until `give_back`."""
    model = uncompiled(model)
    places = checkpointed_places(model)
    if places:
        _taken[model] = Taken(model, places)


def give_back(model: torch.nn.Module) -> None:
    """Turns on again what `take` turned off."""
    taken = _taken.pop(uncompiled(model), None)
    if taken is not None:
        taken.give_back()
