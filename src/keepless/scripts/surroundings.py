"""What stands around a script's model: its optimizer, and bytes on the device that are not the model's."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch

from keepless._compat import storage_key
from keepless.errors import MeasureError
from keepless.measure import innermost, optimizer_footprint
from keepless.measure.running import is_own, reachable_tensors


def optimizers_of(model: torch.nn.Module) -> tuple[torch.optim.Optimizer | None, list[torch.optim.Optimizer]]:
    """The optimizer that steps most of a model's parameters, and the others of the process."""
    own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    found: dict[int, torch.optim.Optimizer] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.optim.Optimizer) and getattr(thing, "param_groups", None):
            inner = innermost(thing)
            found[id(inner)] = inner
    shares = {key: sum(id(p) in own for p in _params(optimizer)) for key, optimizer in found.items()}
    best = max(shares, key=lambda key: shares[key], default=None)
    if best is None or not shares[best]:
        return None, list(found.values())
    return found[best], [optimizer for key, optimizer in found.items() if key != best]


def scales_gradients() -> bool:
    """Whether the process has a gradient scaler that is on."""
    return any(issubclass(type(thing), torch.amp.GradScaler) and thing.is_enabled() for thing in gc.get_objects())


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Standing:
    """The bytes that stand on a device now: of all tensors that Python can reach, on CUDA all that are allocated.

    Attributes:
        nbytes: all of them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.nbytes = torch.cuda.memory_allocated(device)
            self._storages: dict[int, int] = {}
            return
        self._storages = _storages(reachable_tensors(device), device)
        self.nbytes = sum(self._storages.values())

    def beside(
        self, model: torch.nn.Module, inputs: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer | None
    ) -> int:
        """Those that are not a model's, its optimizer's, or inputs of its call."""
        state = [] if optimizer is None else [item for held in optimizer.state.values() for item in held.values()]
        gradients = [parameter.grad for parameter in model.parameters()]
        own = _storages((*model.parameters(), *model.buffers(), *gradients, *inputs, *state), self.device)
        if self.device.type == "cuda":
            return max(0, self.nbytes - sum(own.values()))
        return sum(nbytes for key, nbytes in self._storages.items() if key not in own)


def _storages(things: Iterable[Any], device: torch.device) -> dict[int, int]:
    """Bytes of each storage on a device, once; what is no tensor is left out."""
    own = (thing for thing in things if isinstance(thing, torch.Tensor) and is_own(thing, device))
    return {storage_key(thing): thing.untyped_storage().nbytes() for thing in own}


def coming_nbytes(model: torch.nn.Module, others: Iterable[torch.optim.Optimizer], device: torch.device) -> int:
    """Bytes that other optimizers of the script will have beside the model: their state, and their parameters'
    gradients, as far as these are not there yet."""
    own = {id(parameter) for parameter in model.parameters()}
    total = 0
    for optimizer in others:
        params = [p for p in _params(optimizer) if p.requires_grad and p.device.type == device.type]
        total += sum(p.numel() * p.element_size() for p in params if id(p) not in own and p.grad is None)
        try:
            footprint = optimizer_footprint(optimizer, params)
        except MeasureError:
            continue
        missing = footprint.missing_nbytes
        total += footprint.state_nbytes if missing is None else missing
    return total
