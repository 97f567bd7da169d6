"""Whether a script resets gradients between a forward and its backward: then they stand in the next step's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_RESETTING: tuple[Any, ...] = (torch.optim.Optimizer, torch.nn.Module)


class Resets:
    """Watches `zero_grad` of optimizers and modules from `begin` to `end`.

    Arguments:
        is_between: whether a call waits for its backward now.

    Attributes:
        are_late: `zero_grad` was called while one did.
    """

    def __init__(self, is_between: Callable[[], bool]) -> None:
        self.are_late = False
        self._is_between = is_between
        self._own: list[tuple[Any, Callable[..., None]]] = []

    def begin(self) -> None:
        """From here on."""
        for kind in _RESETTING:
            own: Callable[..., None] = kind.zero_grad

            def zero_grad(thing: Any, *args: Any, own: Callable[..., None] = own, **kwargs: Any) -> None:
                self.are_late = self.are_late or self._is_between()
                own(thing, *args, **kwargs)

            self._own.append((kind, own))
            kind.zero_grad = zero_grad

    def end(self) -> None:
        """Puts back what was there."""
        for kind, own in self._own:
            kind.zero_grad = own
        self._own.clear()
