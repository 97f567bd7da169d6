"""The peak of one step of somebody else's loop, which begins and ends in calls of its own."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from keepless import _compat
from keepless.measure._profiler import AllocationWatch, levels_of

MOST_STEPS = 5
"""Steps that are watched at the most until one can be told."""
_MOST_CALLS = 64
"""Calls of an evaluation between two steps that are watched at the most: each leaves events in memory."""
_SMALL = 1 << 12
"""Bytes of a tensor below which it does not matter whether its free is seen."""
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

_Storages = dict[int, torch.UntypedStorage]


class StepMeter:
    """Measures the highest bytes on a device between `begin` and `end`, which are called on one thread.

    On CUDA these are the allocator's, of all that stands on the device. On the CPU they are the bytes that stand at the
    beginning, as far as they are known, and what this thread allocates and frees from then on, by torch's profiler.
    It is sure of a free only where it saw what is freed come. So a loop calls `begin` and `end` in each step until
    `is_over`: the first step is watched, and the next one is told, unless it frees what stood before both.

    Arguments:
        is_alone: the step frees nothing that stood before it, and the first one can be told.
    """

    def __init__(self, device: torch.device, *, is_alone: bool = False) -> None:
        self.device = device
        self.is_running = False
        """Whether a step has begun and not ended."""
        self.is_over = False
        """Whether a step was told, or so many could not be that no more will."""
        self._is_alone = is_alone
        self._watch = AllocationWatch()
        self._before: dict[int, tuple[StorageWeakRef, int]] = {}
        self._base = self._tries = self._came = self._passed = 0
        self._is_sure = False

    def begin(self, standing: Iterable[torch.Tensor | None], beside: int = 0) -> bool:
        """Begins a step; False where a profiler of the user's is running, or it is over.

        Arguments:
            standing: tensors on the device now. What is left of the watched steps is added: what Python can reach of
                it, and what it cannot, as a graph that was not let go, or numpy's view of a tensor.
            beside: bytes of others that stand there all the time. The allocator knows better on CUDA.
        """
        if self.is_over:
            return False
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.is_running = True
            return True
        self._passed = 0
        told = _storages_of(standing, self.device)
        events = self._watch.stop()
        self._is_sure = self._is_alone or events is not None
        unreached = 0
        if self._is_alone:
            self._before = _references(told)
        elif events is None:
            self._before = _references(_storages_of(reachable_tensors(self.device), self.device) | told)
            self._came = 0
        else:
            self._before = {key: known for key, known in self._before.items() if not _is_gone(known)}
            reached = _storages_of(reachable_tensors(self.device), self.device)
            told |= {key: storage for key, storage in reached.items() if key not in self._before}
            self._came += levels_of(events)[0]
            new = sum(storage.nbytes() for key, storage in told.items() if key not in self._before)
            unreached = max(0, self._came - new)  # frees of older blocks may lower it, and are of no other harm
        self._base = beside + unreached + sum(storage.nbytes() for storage in told.values())
        self.is_running = self._watch.start()
        return self.is_running

    def end(self) -> int | None:
        """The highest bytes since it began; None where the step cannot be told."""
        assert self.is_running, "the meter has not begun"
        self.is_running = False
        if self.device.type == "cuda":
            self.is_over = True
            return torch.cuda.max_memory_allocated(self.device)
        self._tries += 1
        is_last = self._tries == MOST_STEPS
        is_sure = self._is_sure and not any(_is_gone(known) for known in self._before.values() if known[1] >= _SMALL)
        if not is_sure and not is_last:
            return None
        events = self._watch.stop()
        told = self._base + levels_of(events)[1] if is_sure and events is not None else None
        self.is_over = told is not None or is_last
        return told

    def pass_by(self) -> None:
        """A call of an evaluation: between steps some are watched, too; within one there is no answer."""
        self._passed += 1
        if self.is_running or self._passed > _MOST_CALLS:
            self.abort()

    def abort(self) -> None:
        """Ends without an answer; where it begins again, nothing is known of the steps before."""
        self.is_running = False
        self._watch.stop()


def nbytes_of(tensors: Iterable[torch.Tensor | None], device: torch.device) -> int:
    """Bytes that tensors hold on a device, each storage once."""
    return sum(storage.nbytes() for storage in _storages_of(tensors, device).values())


def standing_tensors(model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.Tensor | None]:
    """What stands of a model between two steps: parameters, buffers, gradients, and its optimizers' state."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    return [*tensors, *tensors_in([list(one.state.values()) for one in optimizers])]


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Strided tensors in a pytree, in objects with attributes, too (a batch of a dataclass, say)."""
    leaves, _ = _compat.tree_flatten(tree)
    leaves += [value for leaf in leaves if hasattr(leaf, "__dict__") for value in vars(leaf).values()]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided]


def reachable_tensors(device: torch.device) -> list[torch.Tensor]:
    """All tensors on a device that Python can reach, in memory of torch's own: none of a mapped file, say."""
    things = [thing for thing in gc.get_objects() if type(thing) in _PLAIN]
    return [thing for thing in things if is_own(thing, device)]


def is_own(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor stands on a device in memory of torch's own."""
    with contextlib.suppress(RuntimeError, NotImplementedError):  # a wrapper without memory of its own
        if tensor.device.type == device.type and tensor.layout is torch.strided:
            return device.type != "cpu" or bool(tensor.untyped_storage().resizable())
    return False


def _storages_of(tensors: Iterable[torch.Tensor | None], device: torch.device) -> _Storages:
    found: _Storages = {}
    for tensor in tensors:
        if tensor is not None and tensor.device.type == device.type:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage
    return found


def _references(storages: _Storages) -> dict[int, tuple[StorageWeakRef, int]]:
    return {
        key: (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        for key, storage in storages.items()
    }


def _is_gone(known: tuple[StorageWeakRef, int]) -> bool:
    return bool(known[0].expired())  # type: ignore[no-untyped-call]
