"""A region's second run: in the surroundings of its forward, and without a trace."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any

import torch

from keepless import _compat
from keepless.eager import closures, counters, hooks, randomness, selective
from keepless.eager.determinism import described
from keepless.eager.failures import REMEDY, CheckpointError
from keepless.eager.frame import Frame, Holder
from keepless.eager.profile import Profile
from keepless.eager.watch import Refuse, Unseen

# Recomputes that move shared state (generators, buffers, attributes) take turns.
_turn = threading.RLock()


class _Done(BaseException):
    """Ends a recompute: nothing that is still wanted comes after."""


def unpack(holder: Holder) -> torch.Tensor:
    """The unpack hook of the forward: the saved tensor, after a recompute where this backward has had none yet."""
    task = _compat.execution_group() or _compat.graph_task()
    frame = holder.frame
    try:
        if holder.found is None or task not in holder.found:
            _fill(frame, task)
            if holder.found is None or task not in holder.found:
                raise went_another_way(
                    frame, "saved a different number of tensors: "
                    f"the forward's number {holder.index} of {len(frame.holders)} was not reached"
                )  # fmt: skip
    except CheckpointError as error:
        frame.clear(task)
        if frame.on_failure is not None:
            frame.on_failure(error)
        raise
    except BaseException:
        frame.clear(task)
        raise
    value = holder.found[task]
    if task == -1:
        frame.clear(task)
    elif _compat.graph_is_kept():
        del holder.found[task]
    return value


def _fill(frame: Frame, task: Any) -> None:
    counters.count("recomputes")
    if _compat.graph_task() != -1 and _compat.graph_is_kept():
        reference = weakref.ref(frame)
        _compat.at_end_of_backward(lambda: _forget(reference, task))
    run = _Run(frame, task)
    if frame.state or frame.variables or run.rebound or len(frame.random) > 1:
        with _turn:
            run.rebound = frame.rebound()  # another thread may have had the forward's own in their places
            run.go()
    else:
        run.go()


def _forget(reference: weakref.ref[Frame], task: Any) -> None:
    frame = reference()
    if frame is not None:
        frame.clear(task)


def went_another_way(frame: Frame, what: str) -> CheckpointError:
    """The error of a recompute that did not do what the forward did."""
    return CheckpointError(
        f"checkpoint: the recompute of {frame.name} {what}. A region must do the same twice: what it reads from "
        "objects, clocks or files must not change in between. determinism_check='bitwise' finds the first tensor that "
        "differs; debug=True lists the ops of both runs"
    )


class _Run:
    __slots__ = ("count", "frame", "last", "rebound", "stops", "task")

    def __init__(self, frame: Frame, task: Any) -> None:
        self.frame = frame
        self.task = task
        self.rebound = frame.rebound()
        self.count = 0
        self.stops = frame.early_stop
        self.last = -1
        for index in range(len(frame.holders) - 1, -1, -1):
            if frame.holders[index]() is not None:
                self.last = index
                break

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """The pack hook of the recompute: hands the tensor to the holder of the same number."""
        frame, index = self.frame, self.count
        self.count = index + 1
        if tensor.requires_grad:
            tensor = tensor.detach()  # a saved output would hold its own graph
        if index >= len(frame.holders):
            return tensor
        holder = frame.holders[index]()
        if holder is not None:
            trait = frame.trait(tensor)
            if trait != frame.traits[index]:
                raise went_another_way(
                    frame, f"gave saved tensor {index} with different metadata: "
                    f"{described(frame.traits[index])} in the forward, {described(trait)} now"
                )  # fmt: skip
            if holder.found is None:
                holder.found = {}
            holder.found[self.task] = tensor
        if index == self.last and self.stops:
            raise _Done
        return tensor

    def go(self) -> None:
        """Runs the region as it ran; puts back all that this changes."""
        frame = self.frame
        changed = self._changed()
        inputs = [self._input(position) for position in range(len(frame.inputs))]
        args, kwargs = frame.arguments.filled(inputs)
        random = [(stream, stream.get()) for stream, _ in frame.random]
        state = _now(frame.state)
        variables = [item.now() if item.is_set or item.differs() else item for item in frame.variables]
        places = [item.now() for item in self.rebound]
        flags = frame.profile.flags_that_differ() if frame.profile is not None else []
        grad = torch.is_grad_enabled()
        try:
            _put_back(frame.state)
            randomness.put(frame.random)
            for item, current in zip(frame.variables, variables, strict=True):
                if current is not item:
                    item.put_back()
            for item in self.rebound:
                item.put_back()
            for module, now in flags:
                module.training = not now
            _compat.set_grad_enabled(True)
            special = self._special(changed, inputs)
            if special is None:
                self._call(args, kwargs)
            else:
                with special:
                    self._call(args, kwargs)
        finally:
            _compat.set_grad_enabled(grad)
            for module, now in flags:
                module.training = now
            for item in places:
                item.put_back()
            self._put_back_places()
            for item in variables:
                if item.differs():
                    item.put_back()
            _put_back(state)
            randomness.put(random)

    def _put_back_places(self) -> None:
        """Parameters and buffers that the recompute bound anew, and did not get to bind again before it was stopped."""
        differed = {(id(item.holder), item.name) for item in self.rebound}
        for item in self.frame.rebound():
            if (id(item.holder), item.name) not in differed:
                item.put_back()

    def _call(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        frame = self.frame
        if frame.tap is not None:
            frame.tap.begins()
        _compat.push_saved_tensor_hooks(selective.marked(self.pack) if frame.is_selective else self.pack, _as_it_is)
        try:
            function = frame.function
            if function is frame.region:
                function = closures.as_it_was(function, frame.held)
            function(*args, **kwargs)
        except _Done:
            return
        finally:
            _compat.pop_saved_tensor_hooks()
        if frame.is_over and not frame.early_stop and self.count != len(frame.holders):
            raise went_another_way(
                frame, f"saved a different number of tensors: {self.count}, the forward {len(frame.holders)}"
            )

    def _special(self, changed: list[torch.Tensor], inputs: list[torch.Tensor]) -> contextlib.ExitStack | None:
        frame = self.frame
        profile = frame.profile
        again = not frame.ambient.is_now()
        skip = profile.observers - frame.acting if profile is not None and profile.observers else None
        unseen = profile is not None and frame.known is not None and not self._is_seen(profile)
        if not (again or skip or changed or unseen or frame.context is not None):
            return None
        stack = contextlib.ExitStack()
        if again:
            stack.enter_context(frame.ambient.again())
        if skip:
            stack.enter_context(hooks.calls_through(hooks.without(skip)))
        if unseen:
            stack.enter_context(Unseen(frame.state, frame.clones, frame.random, inputs, self._not_watched))
        if changed:
            stack.enter_context(Refuse(changed, self._stale))
        if frame.context is not None:
            stack.enter_context(frame.context)
        return stack

    def _input(self, position: int) -> torch.Tensor:
        frame = self.frame
        read = frame.inputs[position]
        grad = frame.grads[position]
        if read is None:
            clone = frame.clones[position]
            with torch.set_grad_enabled(grad), _compat.own_ops():
                return clone.detach().requires_grad_(grad).clone()
        tensor = read()
        if not grad or tensor.__class__ is torch.nn.Parameter:
            return tensor
        return tensor.detach().requires_grad_()

    def _is_seen(self, profile: Profile) -> bool:
        frame = self.frame
        if not frame.is_elsewhere and frame.traits == profile.traits:
            self.stops = self.stops and not profile.runs_on
            return True
        if (not frame.is_elsewhere and frame.path() in profile.paths) or profile.is_compiled:
            profile.know_traits(frame.traits)
            return True
        profile.varies = True
        return False

    def _not_watched(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint: {self.frame.name} took a way that it did not take when it was watched, and {what}; "
            f"what that was before is not known. {REMEDY}"
        )

    def _changed(self) -> list[torch.Tensor]:
        frame = self.frame
        if _compat.versions(frame.fixed) == frame.versions:
            return []
        return [t for t, v in zip(frame.fixed, frame.versions, strict=True) if _compat.versions([t]) != [v]]

    def _stale(self, tensor: torch.Tensor) -> str:
        return (
            f"{_shape(tensor)} that {self.frame.name} reads was changed in place between forward and backward; its "
            "recompute would use the new values. Change it after the backward"
        )


def _shape(tensor: torch.Tensor) -> str:
    kind = "a parameter" if isinstance(tensor, torch.nn.Parameter) else "a tensor"
    return f"{kind} of shape {list(tensor.shape)}"


def _now(state: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if not state:
        return []
    with torch.no_grad(), _compat.own_ops():
        return [(tensor, tensor.detach().clone()) for tensor, _ in state]


def _put_back(state: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    if state:
        with torch.no_grad(), _compat.own_ops():
            for tensor, values in state:
                tensor.data.copy_(values)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
