"""Models that checkpoint already: where, by the conventions of the libraries that have such switches.

Hugging Face and diffusers set `gradient_checkpointing` on the modules that recompute their parts, timm sets
`grad_checkpointing`, older code a flag on the model itself; torch and fairscale wrap modules. A call of a checkpoint
function that no such switch shows is the forward's own affair.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from keepless import _compat
from keepless.errors import CheckpointingError

FLAGS = ("gradient_checkpointing", "grad_checkpointing", "is_gradient_checkpointing", "is_activation_checkpointing")
"""Attributes of modules that are True where a part is checkpointed."""


def checkpointed_places(model: torch.nn.Module) -> tuple[str, ...]:
    """Where a model checkpoints: "encoder.layer.0.gradient_checkpointing"; a module's own path where it is wrapped."""
    found = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        found += [f"{prefix}{name}" for name in FLAGS if _is_on(module, name)]
        if is_wrapper(module) or is_fairscale(module):
            found.append(path or type(module).__name__)
    if not found:
        found += [name for name in _SUMS if _says(model, name)][:1]
    return tuple(found)


_SUMS = ("is_activation_checkpointing", "is_gradient_checkpointing")
"""Properties of whole models; transformers from 5 warns where the second, its old name, is read."""


def _says(model: torch.nn.Module, name: str) -> bool:
    """Whether a model's own property says that it checkpoints, by a convention that is not known here."""
    if not isinstance(_class_attribute(model, name), property) or (name != _SUMS[0] and hasattr(type(model), _SUMS[0])):
        return False
    return getattr(model, name) is True


def _is_on(module: torch.nn.Module, name: str) -> bool:
    """Whether a flag is True on a module or on its class; properties only sum up the flags of parts."""
    own = module.__dict__.get(name)
    return own is True or (own is None and _class_attribute(module, name) is True)


def _class_attribute(module: torch.nn.Module, name: str) -> object:
    return next((vars(cls)[name] for cls in type(module).__mro__ if name in vars(cls)), None)


def is_wrapper(module: torch.nn.Module) -> bool:
    """Whether a module is torch's `CheckpointWrapper`, and recomputes what it wraps."""
    return _compat.is_checkpoint_wrapper(module) and module.__dict__.get("checkpoint_fn") is not as_it_is


def is_fairscale(module: torch.nn.Module) -> bool:
    """Whether fairscale's `checkpoint_wrapper` has replaced a module's forward."""
    standing = module.__dict__.get("forward")
    function: Any = standing.func if isinstance(standing, functools.partial) else None
    home, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
    return isinstance(home, str) and home.startswith("fairscale.") and "checkpoint" in name


def as_it_is(module: object, *args: object, **kwargs: object) -> object:
    """Stands in a wrapper for its checkpoint function: the module is called, and nothing is recomputed."""
    assert callable(module)
    return module(*args, **kwargs)


def refuse_checkpointing(places: tuple[str, ...]) -> None:
    """Refuses a model that checkpoints at these places, if there are any.

    Raises:
        CheckpointingError: names them.
    """
    if not places:
        return
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    raise CheckpointingError(
        f"The model checkpoints already ({', '.join(places[:3])}{more}): a plan would count memory that is freed, and "
        "recompute what is recomputed. Turn that off, or give takeover=True: it is then off while the plan stands in "
        "the model, and on again after keepless.remove.",
        places=places,
    )
