"""How high memory rises in planned steps of a script, as they run.

CUDA: the allocator's own highest level since the model was planned. CPU: some steps, from one training call of the
model to a later one with a step of the optimizer between; what stood at their begin, as far as Python can reach it, and
the allocations of torch since, of this thread. Frees of what stood before are not seen: outputs and losses of the step
before are counted until the call returns, when the script's names mean the new ones. Later steps are not slowed down.
"""

from __future__ import annotations

from typing import Any

import torch

from keepless.measure._profiler import AllocationWatch
from keepless.scripts.surroundings import Standing

METERED = 2
"""Steps that are metered on the CPU, after the one in which the model is planned."""
_MOST_CALLS = 64
"""Calls of a metered step at the most: the optimizer may never step."""


class Meter:
    """Meters the steps of a planned model.

    Arguments:
        calls: of the model that were planned before.

    Attributes:
        calls: training calls of the model that were planned.
        steps: of the optimizer.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, calls: int = 0) -> None:
        self.device = next(model.parameters()).device
        self.calls, self.steps = calls, 0
        self._highest = 0
        self._left = METERED if self.device.type == "cpu" else 0
        self._watch: AllocationWatch | None = None
        self._base = self._outputs = self._first_call = self._first_step = 0
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._called),
            model.register_forward_hook(self._returned),
        ]
        if optimizer is not None:
            self._handles.append(optimizer.register_step_post_hook(self._stepped))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def end(self) -> int | None:
        """Ends metering; the highest bytes, None where no step was metered."""
        if self._watch is not None:
            self._close()
        for handle in self._handles:
            handle.remove()
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self._highest or None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _called(self, model: torch.nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled() or not model.training:
            return
        self.calls += 1
        if self._watch is not None:
            is_whole = self.steps > self._first_step or self.calls - self._first_call >= _MOST_CALLS
            if not is_whole:
                return
            self._close()
        if self._left:
            self._left -= 1
            standing = Standing(self.device)
            self._base, self._outputs = standing.nbytes, standing.outputs
            self._first_call, self._first_step = self.calls, self.steps
            self._watch = AllocationWatch()
            self._watch.start()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _returned(self, *_: Any) -> None:
        if self._watch is not None and torch.is_grad_enabled():
            self._watch.mark()

    def _close(self) -> None:
        events = self._watch.stop() if self._watch is not None else None
        self._watch = None
        level = highest = self._base
        for nbytes in events or ():
            if nbytes is None:
                level -= self._outputs
                self._outputs = 0
                continue
            level += nbytes
            highest = max(highest, level)
        if events is not None and (self.steps > self._first_step or not self.steps):
            self._highest = max(self._highest, highest)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _stepped(self, *_: Any) -> None:
        self.steps += 1
