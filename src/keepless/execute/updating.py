"""An optimizer that steps in the backward: each parameter when its gradient is whole, which is dropped then.

Autograd runs a parameter's post-accumulate hook once in a backward, after the last part of its gradient. Hooks stand on
the model's parameters for as long as its plan does. The loop stays as it is: its own `optimizer.step()` and
`zero_grad()` find no gradients, and the step tells that the next backward is another step's.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from keepless import _compat
from keepless.errors import RewriteError, StepError, TornStep
from keepless.measure import innermost, is_out_of_memory, step_alone


class Updater:
    """Steps an optimizer parameter by parameter.

    Arguments:
        optimizer: the loop's own; a wrapper is looked through.
        parameters: by name, those that get gradients.

    Raises:
        RewriteError: one of them is not in the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> None:
        self.optimizer = innermost(optimizer)
        self._parameters = dict(parameters)
        self._names = {id(param): name for name, param in parameters.items()}
        self._groups = {id(p): number for number, g in enumerate(self.optimizer.param_groups) for p in g["params"]}
        absent = [name for name, param in parameters.items() if id(param) not in self._groups]
        if absent:
            raise RewriteError(
                f"{absent[0]} gets a gradient, and the optimizer that is given does not have it: give the one that "
                "steps this model."
            )
        self._updated: dict[int, None] = {}
        self._steps = False
        self._handles: list[Any] = []

    def put_in(self) -> None:
        """From now on a backward steps."""
        if self._handles:
            return
        self._updated.clear()
        me = weakref.ref(self)  # hooks live on the parameters, which the optimizer holds

        def whole(param: torch.Tensor) -> None:
            if (updater := me()) is not None:
                updater.update(param)

        def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            updater = me()
            if updater is not None and not updater._steps:  # a subclass may call its parent's step, hooks and all
                updater._updated.clear()

        self._handles = [_compat.after_gradient(param, whole) for param in self._parameters.values()]
        self._handles.append(self.optimizer.register_step_post_hook(stepped))

    def take_out(self) -> None:
        """From now on it does not."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def update(self, param: torch.Tensor) -> None:
        """Steps for a parameter whose gradient is whole, and drops that.

        Raises:
            StepError: it has been updated since the loop's last `optimizer.step()`; it is not updated again.
            TornStep: there was no memory for its update.
        """
        if param.grad is None:
            return
        if id(param) in self._updated:
            raise StepError(
                f"{self._names[id(param)]} gets a second gradient since the last optimizer.step(), and the first has "
                "updated it already: this model's optimizer steps in the backward. Call optimizer.step() after each "
                "backward, as without a plan; gradients cannot be accumulated over several."
            )
        self._steps = True
        try:
            with _compat.no_autocast():
                step_alone(self.optimizer, param, self._groups[id(param)])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            name = self._names[id(param)]
            updated = tuple(self._names[one] for one in self._updated)
            raise TornStep(
                f"There was no memory for the optimizer's update of {name}, in the backward ({error}). {len(updated)} "
                "parameters are updated by this step, this one may be in part, and the others are not: load the last "
                "state of model and optimizer, and plan for a smaller budget.",
                updated=updated,
                half_updated=(name,),
            ) from error
        finally:
            self._steps = False
        self._updated[id(param)] = None
        param.grad = None
