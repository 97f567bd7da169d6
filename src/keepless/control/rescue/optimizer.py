"""An optimizer's step that does not begin where there is no memory for it, and that says so where it ends half way.

`OptimizerGuard` registers a step pre-hook that allocates what the step is predicted to need (its temporaries, and the
state that is not there yet), lets go of it, and raises before anything is changed. Where an optimizer fails all the
same, the wrap around its `step` tells which parameters it had come to, from the versions of parameters and state.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from keepless.control.rescue.survival import Survival, device_facts
from keepless.errors import MeasureError, OutOfMemory, TornStep
from keepless.execute.recovery import OutOfMemoryHere, make_room
from keepless.ir import Phase, format_bytes
from keepless.measure import innermost, is_out_of_memory, optimizer_footprint
from keepless.reporting.black_box import describe_plan

_Versions = list[tuple[int, dict[Any, int]]]
_SHOWN = 6


def allocate(sizes: Sequence[int], device: torch.device) -> None:
    """Allocates so many bytes each, all at once, and lets go of them."""
    held = [torch.empty(nbytes, dtype=torch.uint8, device=device) for nbytes in sizes]
    del held


class OptimizerGuard:
    """Looks after the steps of one optimizer while a plan stands in its model.

    Arguments:
        survival: writes down what fails.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, survival: Survival) -> None:
        self.survival = survival
        self._optimizer = weakref.ref(innermost(optimizer))
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.state_nbytes, self.scratch_nbytes = _footprint(innermost(optimizer), survival)
        self._known = -1
        self._missing = 0
        self._whole: _Versions | None = None  # what a whole step changes
        self._settled = False  # the last two whole steps changed the same
        self._handle: Any = None
        self._step: Any = None
        self._before: Any = None
        self._is_in = False

    # ---- putting in and taking out

    def put_in(self) -> None:
        """The optimizer's steps are looked after."""
        optimizer = self._optimizer()
        if optimizer is None or self._is_in:
            return
        self._is_in = True
        self._handle = optimizer.register_step_pre_hook(self._probe)
        self._before = optimizer.__dict__.get("step")
        self._step = optimizer.step = _wrapped(self, optimizer)  # type: ignore[method-assign]

    def take_out(self) -> None:
        """The optimizer is as it was; where others have wrapped it since, this wrap stays and does nothing."""
        optimizer = self._optimizer()
        if not self._is_in:
            return
        self._is_in = False
        self._handle.remove()
        if optimizer is not None and optimizer.__dict__.get("step") is self._step:
            if self._before is None:
                del optimizer.__dict__["step"]
            else:
                optimizer.step = self._before  # type: ignore[method-assign]
        self._step = self._before = None

    # ---- before a step

    def _probe(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        if len(optimizer.state) != self._known:  # the first step, mostly
            self._known, self._settled = len(optimizer.state), False
            self._missing = max(0, self.state_nbytes - _present(optimizer))
        needed = self._missing + self.scratch_nbytes
        sizes = _like_parameters(params, needed)
        try:
            allocate(sizes, params[0].device)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            text = f"{type(error).__name__}: {error}".strip()
        make_room(params[0].device)
        try:
            allocate(sizes, params[0].device)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        path = self._written(optimizer, text, "raised before the optimizer's step: nothing was changed", {})
        where = f" {path} has the whole." if path else ""
        raise OutOfMemoryHere(
            f"The step of {type(optimizer).__name__} needs {format_bytes(needed)} "
            f"({format_bytes(self._missing)} of state that is not there yet), and the device has no room for them "
            f"({text}). Nothing was changed: the step can be taken again when there is room. A smaller budget does not "
            f'help here; rewrites=("optimizer_in_backward",) does, or foreach=False.{where}',
            phase="optimizer",
            black_box=path,
        )

    # ---- around a step

    def run(self, optimizer: torch.optim.Optimizer, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The optimizer's own step.

        Raises:
            TornStep: it ran out of memory with parameters or state changed already.
            OutOfMemory: it did so before.
        """
        if not self._is_in:
            return step(*args, **kwargs)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        before = _versions(optimizer, params)
        try:
            result = step(*args, **kwargs)
        except Exception as error:
            if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
                raise
            error.__traceback__ = None  # it holds the temporaries of the step
            changes = _changes(before, _versions(optimizer, params))
            raise self._torn(optimizer, params, changes, error) from error
        if not self._settled or self._whole is None or len(self._whole) != len(before):
            changes = _changes(before, _versions(optimizer, params))
            self._settled, self._whole = changes == self._whole, changes
        return result

    def _torn(
        self,
        optimizer: torch.optim.Optimizer,
        params: list[torch.Tensor],
        changes: _Versions,
        error: BaseException,
    ) -> OutOfMemoryHere | TornStep:
        updated: list[str] = []
        half: list[str] = []
        known = self._whole if self._whole is not None and len(self._whole) == len(changes) else None
        for number, (param, change) in enumerate(zip(params, changes, strict=True)):
            if not change[0] and not any(change[1].values()):
                continue
            name = self.names.get(id(param), f"parameter {number}")
            # Only a whole step says what a whole update is: before the first one nothing is taken for complete.
            complete = known is not None and change[0] > 0 and change == known[number]
            (updated if complete else half).append(name)
        text, kind = f"{type(error).__name__}: {error}".strip(), type(optimizer).__name__
        if not updated and not half:
            path = self._written(optimizer, text, "raised: nothing was changed", {})
            return OutOfMemoryHere(
                f"{kind} ran out of memory before it changed anything ({text}). The step can be taken again when there "
                f"is room.{f' {path} has the whole.' if path else ''}",
                phase="optimizer",
                black_box=path,
            )
        torn = {"updated": updated, "half_updated": half}
        path = self._written(optimizer, text, "raised in the middle of the optimizer's step", torn)
        return TornStep(
            f"{kind} ran out of memory in the middle of its step ({text}): {_some(updated)} updated, {_some(half)} "
            f"half updated or not known to be complete, of {len(params)} parameters. Weights and state are no state of "
            f"the training any more: load a checkpoint.{f' {path} has the whole.' if path else ''}",
            updated=tuple(updated),
            half_updated=tuple(half),
            black_box=path,
        )

    def _written(self, optimizer: torch.optim.Optimizer, text: str, done: str, more: dict[str, list[str]]) -> str:
        device = next(p.device for group in optimizer.param_groups for p in group["params"])
        return self.survival.write(
            {
                "error": {"type": text.partition(":")[0], "text": text.partition(": ")[2]},
                "phase": Phase.OPTIMIZER.value,
                "instruction": {},
                "optimizer": {
                    "name": type(optimizer).__name__,
                    "scratch_nbytes": self.scratch_nbytes,
                    "state_nbytes": self.state_nbytes,
                    "missing_state_nbytes": self._missing,
                    **more,
                },
                "timeline": {},
                "inputs": [],
                "plan": describe_plan(self.survival.plan),
                "device": device_facts(device),
                "suggested_budget": None,
                "done": done,
                "after": None,
            }
        )


def _wrapped(guard: OptimizerGuard, optimizer: torch.optim.Optimizer) -> types.MethodType:
    """A bound method, as LR schedulers expect, with the signature and marks of the step that it wraps."""
    before = optimizer.__dict__.get("step")

    @functools.wraps(optimizer.step)
    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        own = before if before is not None else type(self).step.__get__(self)
        return guard.run(self, own, args, kwargs)

    return types.MethodType(step, optimizer)


def _footprint(optimizer: torch.optim.Optimizer, survival: Survival) -> tuple[int, int]:
    """Bytes of the whole state, and of the temporaries of one step; 0 where they cannot be predicted."""
    try:
        found = optimizer_footprint(optimizer)
    except MeasureError:
        return 0, 0
    return found.state_nbytes, found.scratch_nbytes


def _present(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _like_parameters(params: Sequence[torch.Tensor], nbytes: int) -> list[int]:
    """Sizes that add up to so many bytes, each as large as a parameter: what the step will ask for, and no more."""
    sizes: list[int] = []
    own = [size for p in params if (size := p.numel() * p.element_size())]
    while nbytes > 0 and own:
        for size in own:
            sizes.append(min(size, nbytes))
            nbytes -= size
            if nbytes <= 0:
                break
    return sizes


def _versions(optimizer: torch.optim.Optimizer, params: Sequence[torch.Tensor]) -> _Versions:
    state: Any = optimizer.state  # a defaultdict: asked for without making entries
    own = [state.get(p) or {} for p in params]
    return [
        (p._version, {key: t._version for key, t in items.items() if isinstance(t, torch.Tensor)})
        for p, items in zip(params, own, strict=True)
    ]


def _changes(before: _Versions, after: _Versions) -> _Versions:
    """How often each parameter and each tensor of its state was written to; what is new counts as written."""
    return [
        (now - then, {key: version - old.get(key, version - 1) for key, version in new.items()})
        for (then, old), (now, new) in zip(before, after, strict=True)
    ]


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
