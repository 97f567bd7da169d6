"""Configs of another depth, for `max_depth`."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from keepless.errors import SizeError

C = TypeVar("C")

NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
"""What configs call the number of their layers."""


def depth_name(config: Any) -> str:
    """The attribute that holds a config's number of layers.

    Raises:
        SizeError: there is none that is known.
    """
    for name in NAMES:
        number = getattr(config, name, None)
        if isinstance(number, int) and not isinstance(number, bool):
            return name
    raise SizeError(
        f"The {type(config).__name__} has none of {', '.join(NAMES)}: write a make_model of your own that makes the "
        "model of a depth."
    )


def with_depth(config: C, depth: int) -> C:
    """A copy of a config with another number of layers: of transformers, or any object that names it alike.

    Lists with an entry for each layer (`layer_types`, say) are cut, or go on as they began.

    Raises:
        SizeError: the config has none of the names under which a number of layers stands.
    """
    name = depth_name(config)
    before: int = getattr(config, name)
    made = copy.deepcopy(config)
    for key, item in list(vars(made).items()):
        if "layer" in key and isinstance(item, list) and len(item) == before > 1:
            setattr(made, key, [item[index % before] for index in range(depth)])
    setattr(made, name, depth)
    return made
