"""Planning inside a loop's own training step: when the model is first called, for that very call.

A loop of somebody else's calls the model deep inside a function that makes the batch's loss. `wait_in` has a plan made
when the first module is called; `LossOf` is then what that function does with the output, as a loss function: the
function itself, with the model's call replaced by an output.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from keepless import _compat
from keepless.capture import Inputs
from keepless.capture.side_effects import python_state, restore_python_state
from keepless.errors import LossError
from keepless.measure import optimizer_footprint, tensors_in
from keepless.modules.lazy import Begin, LazyForward


def wait_in(model: torch.nn.Module, begin: Begin) -> list[LazyForward]:
    """Waits in a model and all its modules that have something to train: the outermost that is called begins.

    Arguments:
        begin: puts a plan into the module that is called.
    """
    # What torch.compile wraps is planned itself: its wrapper would be asked for Dynamo's frames.
    found = [
        m for m in model.modules() if "_orig_mod" not in m._modules and any(p.requires_grad for p in m.parameters())
    ]
    waiting: list[LazyForward] = []

    def begin_one(module: torch.nn.Module, inputs: Inputs) -> None:
        for one in waiting:
            one.take_out()
        begin(module, inputs)

    waiting += [LazyForward(module, begin_one) for module in found]
    for one in waiting:
        one.put_in()
    return waiting


class LossOf:
    """The loss that a training step makes of a module's output: the step, with the module's first call left out.

    What the step changes in Python is put back, draws from Python's and NumPy's random numbers among it; tensors are by
    `put_back`. It holds the batch until `release`.

    Arguments:
        root: what `step` belongs to.
        module: whose first call gives the output.
        step: gives the loss, or a mapping with "loss", for its arguments.
        args, kwargs: of the step.
        quiet: around each run, so that it is not logged.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        module: torch.nn.Module,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        quiet: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> None:
        self._held: tuple[Any, ...] | None = (root, module, step, args, kwargs, quiet)

    def release(self) -> None:
        """Lets the batch go; the loss can be made no more."""
        self._held = None

    def __call__(self, output: Any, batch: Any = None) -> torch.Tensor:
        if self._held is None:
            raise LossError("The training step that made this plan's loss is over: give loss_fn=.")
        root, module, step, args, kwargs, quiet = self._held
        before, draws = python_state(root), (random.getstate(), np.random.get_state())
        try:
            with quiet(), _giving(module, output) as given:
                found = step(*args, **kwargs)
        finally:
            restore_python_state(before)
            random.setstate(draws[0])
            np.random.set_state(draws[1])
        if not given:
            raise LossError(
                "The training step did not call the model when it was run again: it is not always the same."
            )
        if isinstance(found, Mapping):
            found = found.get("loss")
        if not isinstance(found, torch.Tensor):
            raise LossError(f"The training step gives a {type(found).__name__} as its loss, not a tensor.")
        return found


@contextlib.contextmanager
def _giving(module: torch.nn.Module, output: Any) -> Iterator[list[bool]]:
    """The module's first call gives this output; later ones run what stood there."""
    own = module.__dict__
    stood = own.get("forward")
    called: list[bool] = []

    def back() -> None:
        if stood is None:
            own.pop("forward", None)
        else:
            own["forward"] = stood

    def give(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        back()
        return output

    own["forward"] = give
    try:
        yield called
    finally:
        back()


def beside(
    root: torch.nn.Module, module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, given: Any, batch: Any
) -> int:
    """Bytes that a step holds beside one module's: the rest of `root` with its gradients and optimizer state, and the
    tensors of the batch that the module is not given.

    Raises:
        MeasureError: the optimizer cannot be tried.
    """
    own = {id(t) for t in (*module.parameters(), *module.buffers())}
    rest = [t for t in (*root.parameters(), *root.buffers()) if id(t) not in own]
    trained = [t for t in rest if t.requires_grad]
    nbytes = sum(t.nbytes for t in rest) + sum(t.nbytes for t in trained)
    if trained and optimizer is not None:
        footprint = optimizer_footprint(optimizer, trained)
        nbytes += footprint.state_nbytes + footprint.scratch_nbytes
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    inside = {t.untyped_storage().data_ptr() for t in tensors_in(given)}
    others = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(batch) if t.device == device
    }
    return nbytes + sum(size for pointer, size in others.items() if pointer not in inside)


@contextlib.contextmanager
def put_back(root: torch.nn.Module, batch: Any) -> Iterator[None]:
    """Tensors are as they were when the block ends: gradients, buffers, those in modules' attributes, the batch's.

    Steps that run for planning write to them: a normalization beside the planned module counts its batch, a batch is
    scaled in place. Copies are made of all but parameters and their gradients, which no step here writes to.
    """
    gradients = [(p, p.grad) for p in root.parameters()]
    params = {id(p) for p in root.parameters()}
    held = [t for m in root.modules() for t in tensors_in([dict(m._buffers), _plain(m)]) if id(t) not in params]
    found = {id(t): t for t in (*held, *tensors_in(batch)) if not t.is_inference() and not _compat.overlaps_itself(t)}
    tensors = list(found.values())
    versions = _compat.versions(tensors)
    copies = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy, then, now in zip(tensors, copies, versions, _compat.versions(tensors), strict=True):
                if then != now or not torch.equal(tensor, copy):  # batch norm's kernels do not count as changes
                    tensor.data.copy_(copy)
        _compat.set_versions(tensors, versions)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _plain(module: torch.nn.Module) -> list[Any]:
    """What a module has in attributes of its own: tensors, and containers of them."""
    return [value for value in module.__dict__.values() if type(value) in (torch.Tensor, list, tuple, dict)]
