"""What a script trains beside its planned model: which modules, and what they keep for their own backward."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from keepless.control.parts.module_steps import uncompiled
from keepless.errors import MeasureError
from keepless.measure import optimizer_footprint
from keepless.scripts.naming import Called, called


class Kept:
    """Counts what ops save for the backward: each storage once, also where it has gone by then."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[Any, int]] = {}  # a weak reference holds the number, not the bytes

    def add(self, tensor: torch.Tensor) -> None:
        """Something is saved."""
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a wrapper without memory of its own
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]

    def nbytes(self, without: Iterable[torch.Tensor]) -> int:
        """Bytes of all that was saved, without these tensors, which stand by themselves."""
        others = set()
        for tensor in without:
            with contextlib.suppress(RuntimeError, NotImplementedError):
                others.add(tensor.untyped_storage()._cdata)
        return sum(nbytes for key, (_, nbytes) in self._storages.items() if key not in others)


def modules_beside(model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.nn.Module]:
    """The outermost modules whose parameters these optimizers step, apart from a model and what it stands in."""
    own = {id(parameter) for parameter in model.parameters()}
    wanted = {
        id(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and id(parameter) not in own
    }
    if not wanted:
        return []
    found: dict[int, torch.nn.Module] = {}
    inner: set[int] = set()
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.nn.Module) or "_modules" not in thing.__dict__:
            continue
        parts = list(thing.modules())
        if any(part is model for part in parts) or not any(id(p) in wanted for p in thing.parameters()):
            continue
        found[id(thing)] = thing
        if not isinstance(thing, (torch.nn.ModuleList, torch.nn.ModuleDict)):  # these are never called themselves
            inner |= {id(part) for part in parts[1:]}
    return [
        module
        for key, module in found.items()
        if key not in inner and not isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict))
    ]


def rest_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device) -> tuple[int, int]:
    """Bytes of the parameters of others that a model's own optimizer steps, too: gradients and state that are not there
    yet, and the temporaries of their step."""
    own = {id(parameter) for parameter in model.parameters()}
    groups = [] if optimizer is None else optimizer.param_groups
    rest = [
        parameter
        for group in groups
        for parameter in group["params"]
        if parameter.requires_grad and parameter.device.type == device.type and id(parameter) not in own
    ]
    if optimizer is None or not rest:
        return 0, 0
    coming = sum(p.numel() * p.element_size() for p in rest if p.grad is None)
    try:
        footprint = optimizer_footprint(optimizer, rest)
    except MeasureError:
        return coming, 0
    return coming + (footprint.missing_nbytes or 0), footprint.scratch_nbytes


def gradients_to_come(modules: Iterable[torch.nn.Module], optimizers: Iterable[torch.optim.Optimizer | None]) -> int:
    """Bytes of gradients that are not there yet, of parameters of these modules that an optimizer steps."""
    groups = [group for optimizer in optimizers if optimizer is not None for group in optimizer.param_groups]
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    params = {id(p): p for module in modules for p in module.parameters() if id(p) in stepped}
    return sum(p.numel() * p.element_size() for p in params.values() if p.requires_grad and p.grad is None)


class Unforeseen:
    """Tells what modules keep that had not been called when the model was planned; each module's next training call
    is looked at, no later one.

    Arguments:
        tell: takes a module's name in the script, and the bytes that it keeps from then on until its backward.
    """

    def __init__(
        self, modules: Iterable[torch.nn.Module], tell: Callable[[torch.nn.Module, Called, int], None]
    ) -> None:
        self._tell = tell
        self._handles: dict[int, list[Any]] = {}
        self._within: dict[int, tuple[Called, Kept, Any]] = {}
        for module in modules:
            self._handles[id(module)] = [
                module.register_forward_pre_hook(self._called, with_kwargs=True),
                module.register_forward_hook(self._returned, always_call=True),
            ]

    def end(self) -> None:
        """Nothing is looked at any more."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _called(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled() or not module.training or id(module) not in self._handles:
            return
        kept = Kept()
        hooks: Any = contextlib.nullcontext()
        if uncompiled(module) is module:  # compiled code may be made anew under hooks
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _noted(kept, tensor), lambda tensor: tensor)
        try:
            hooks.__enter__()
        except RuntimeError:  # the script forbids such hooks
            hooks = contextlib.nullcontext()
        self._within[id(module)] = called(module), kept, hooks

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _returned(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        begun = self._within.pop(id(module), None)
        if begun is None:
            return
        name, kept, hooks = begun
        hooks.__exit__(None, None, None)
        if output is None:  # it has raised
            return
        for handle in self._handles.pop(id(module), ()):
            handle.remove()
        self._tell(module, name, kept.nbytes((*module.parameters(), *module.buffers())))


def _noted(kept: Kept, tensor: torch.Tensor) -> torch.Tensor:
    kept.add(tensor)
    return tensor.detach()  # an output that its own node held would never be freed
