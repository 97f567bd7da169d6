"""What a caller asks for beside model, batch, budget and optimizer, as one object on its way down."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keepless.cost import DeviceSpec, find_device
from keepless.errors import RewriteError
from keepless.machine import OPTIMIZER_IN_BACKWARD
from keepless.solve import Solver

LossFn = Callable[[Any, Any], torch.Tensor]
Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages are "capture", "measure" and "solve", and "sizes" of what fits."""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is planned; each option is described in `keepless.plan`."""

    loss_fn: LossFn | None = None
    accumulate: bool = False
    release_outputs: bool = False
    outside: object = 0
    solver: str | Solver = "keepless"
    seed: int = 0
    cache: bool = True
    takeover: bool = False
    rewrites: Sequence[str] = ()
    eager_ops: bool = False
    on: str | os.PathLike[str] | DeviceSpec | None = None

    @property
    def elsewhere(self) -> DeviceSpec | None:
        """The device that is not here, for which it is planned.

        Raises:
            DeviceError: it is not known.
        """
        return None if self.on is None else find_device(self.on)


@dataclass(frozen=True, kw_only=True)
class SizeOptions(StepOptions):
    """How a size is searched; `keepless.max_batch` describes what is not in `keepless.plan`."""

    low: int = 1
    high: int | None = None
    multiple_of: int = 1
    max_overhead: float | None = None
    progress: Progress | None = None


def check_rewrites(rewrites: tuple[str, ...], *, has_optimizer: bool, accumulate: bool) -> None:
    """Refuses rewrites that a step of this kind cannot have.

    Raises:
        RewriteError: says why.
    """
    if OPTIMIZER_IN_BACKWARD not in rewrites:
        return
    if not has_optimizer:
        raise RewriteError(
            f"rewrites={rewrites} steps the optimizer in the backward: give it, as optimizer= (make_optimizer= of "
            "max_depth)."
        )
    if accumulate:
        raise RewriteError(
            f"rewrites={rewrites} updates a parameter as soon as its gradient is there, and this step adds to "
            "gradients that stand already (accumulation, or zero_grad after the forward): they would be lost."
        )
