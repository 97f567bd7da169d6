"""How high memory rises in planned steps of a script, as they run.

CUDA: the allocator's own highest level since the model was planned. CPU: a step from one training call of the model to
a later one with a step of the optimizer between; what stood at its begin, as far as Python can reach it, and the
allocations of torch since, of this thread. Later steps are not slowed down.
"""

from __future__ import annotations

from typing import Any

import torch

from keepless.measure import StepMeter
from keepless.measure.running import reachable_tensors

_MOST_CALLS = 64
"""Calls of a metered step at the most: the optimizer may never step. And of evaluations that are watched between two
steps, so that a script which evaluates after each of its steps has one that is told."""


class Meter:
    """Meters the steps of a planned model.

    Arguments:
        calls: of the model that were planned before.

    Attributes:
        calls: training calls of the model that were planned.
        steps: of the optimizer.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, calls: int = 0) -> None:
        self.calls, self.steps = calls, 0
        self._meter = StepMeter(next(model.parameters()).device)
        self._peak: int | None = None
        self._first_call = self._first_step = 0
        self._handles: list[Any] = [model.register_forward_pre_hook(self._called)]
        if optimizer is not None:
            self._handles.append(optimizer.register_step_post_hook(self._stepped))
        if self._meter.device.type == "cuda":
            self._meter.begin(())

    def end(self) -> int | None:
        """Ends metering; the highest bytes, None where no step was metered."""
        if self._meter.is_running and (self._is_whole or self._meter.device.type == "cuda"):
            self._peak = self._meter.end()
        self._meter.abort()
        for handle in self._handles:
            handle.remove()
        return self._peak

    @property
    def _is_whole(self) -> bool:
        return self.steps > self._first_step

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _called(self, model: torch.nn.Module, args: Any) -> None:
        is_training = torch.is_grad_enabled() and model.training
        self.calls += is_training
        if self._meter.device.type == "cuda" or self._meter.is_over:
            return
        if self._meter.is_running:
            is_long = not self.steps and self.calls - self._first_call >= _MOST_CALLS
            if not self._is_whole and not is_long and is_training:
                return
            if self._is_whole or is_long:
                self._peak = self._meter.end()
        if not is_training:
            self._meter.pass_by()
        elif self._meter.begin(reachable_tensors(self._meter.device)):
            self._first_call, self._first_step = self.calls, self.steps

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _stepped(self, *_: Any) -> None:
        self.steps += 1
