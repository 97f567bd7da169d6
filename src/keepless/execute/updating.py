"""An optimizer that steps in the backward: each parameter when its gradient is whole, which is dropped then.

Autograd runs a parameter's post-accumulate hook once in a backward, after the last part of its gradient. Hooks stand on
the model's parameters for as long as its plan does. The loop stays as it is: its own `optimizer.step()` and
`zero_grad()` find no gradients, and the step tells that the next backward is another step's.

A backward that ends half way (Ctrl-C, an error in a hook) leaves some parameters updated and others not. Autograd calls
back at a backward's end only where that is reached; where it was not, the next planned call, or the loop's step, says
so.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from keepless import _compat
from keepless.errors import RewriteError, StepError, TornStep
from keepless.measure import innermost, is_out_of_memory, step_alone

_SHOWN = 6


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
        self._updated: dict[int, int] = {}  # and the version that each had then
        self._half: tuple[int, int] | None = None
        self._is_open = False  # a backward has begun to update, and is not known to have come to its end
        self._steps = False
        self._handles: list[Any] = []

    def put_in(self) -> None:
        """From now on a backward steps."""
        if self._handles:
            return
        if not self._is_open:
            self._updated.clear()
        me = weakref.ref(self)  # hooks live on the parameters, which the optimizer holds

        def whole(param: torch.Tensor) -> None:
            if (updater := me()) is not None:
                updater.update(param)

        def steps(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            updater = me()
            if updater is not None and not updater._steps:
                updater.check()

        def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            updater = me()
            if updater is not None and not updater._steps:  # a subclass may call its parent's step, hooks and all
                updater._updated.clear()

        self._handles = [_compat.after_gradient(param, whole) for param in self._parameters.values()]
        self._handles.append(self.optimizer.register_step_pre_hook(steps))
        self._handles.append(self.optimizer.register_step_post_hook(stepped))

    def take_out(self) -> None:
        """From now on it does not."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check(self) -> None:
        """Before a step: whether the backward before it came to its end. Told once; not where the parameters have been
        written since, as by `load_state_dict`.

        Raises:
            TornStep: it did not, and had updated parameters.
        """
        if not self._is_open or _compat.graph_task() != -1:  # inside a backward, it is open
            return
        updated, half = self._updated, self._half
        self._forget()
        versions = {id(param): param._version for param in self._parameters.values()}
        touched = {**updated, **({half[0]: half[1]} if half is not None else {})}
        if all(versions[one] != version for one, version in touched.items()):
            return
        names = tuple(self._names[one] for one in updated)
        halves = (self._names[half[0]],) if half is not None else ()
        of_it = f"{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}" if names else "none"
        raise TornStep(
            f"The last backward did not come to its end (it was interrupted, or an error was raised in it), and its "
            f"optimizer steps in the backward: {len(names)} of {len(versions)} parameters were updated ({of_it})"
            f"{f', {halves[0]} may be in part' if halves else ''}, the others were not. Weights and state are no state "
            "of the training any more: load the last state of model and optimizer. This is said once.",
            updated=names,
            half_updated=halves,
        )

    def _forget(self) -> None:
        self._updated, self._half, self._is_open = {}, None, False

    def _ended(self) -> None:
        self._is_open = False

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
        if not self._is_open:
            _compat.at_backwards_end(self._ended)
            self._is_open = True
        self._steps = True
        try:
            with _compat.no_autocast():
                step_alone(self.optimizer, param, self._groups[id(param)])
        except BaseException as error:
            self._half = (id(param), param._version)
            if not is_out_of_memory(error):
                raise
            name = self._names[id(param)]
            updated = tuple(self._names[one] for one in self._updated)
            self._forget()  # it is told here
            raise TornStep(
                f"There was no memory for the optimizer's update of {name}, in the backward ({error}). {len(updated)} "
                "parameters are updated by this step, this one may be in part, and the others are not: load the last "
                "state of model and optimizer, and plan for a smaller budget.",
                updated=updated,
                half_updated=(name,),
            ) from error
        finally:
            self._steps = False
        self._updated[id(param)] = param._version
        param.grad = None
