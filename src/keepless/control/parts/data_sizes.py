"""Steps whose sizes depend on the data: a mask picks edges, a router picks rows.

A plan is made from one batch. Another of the same shapes may need more where an op's output is as large as its data
say, and no look at the batch tells: the budget then holds with some of it kept free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from keepless import _compat
from keepless.control.runner import Runner
from keepless.machine import Plan

HEADROOM = 0.05
"""Share of a step's own bytes that is kept free. Steps of a graph network that drops half of its edges at random
needed up to 3.5 % more than each other.
"""
_SIZES = torch.Tag.dynamic_output_shape
_MASKS = (torch.bool, torch.uint8)


def data_dependent_ops(run: Runner) -> list[str]:
    """Names of the ops of a forward whose outputs have sizes that depend on the data."""
    seen = _Sizes()
    for has_grad in (False, True):
        run.prepare()
        try:
            with torch.set_grad_enabled(has_grad), seen:
                run.model(*run.inputs.args, **run.inputs.kwargs)
            break
        except RuntimeError:  # a forward that differentiates needs gradients, and then holds what it saves
            if has_grad:
                raise
    run.prepare()
    return sorted(seen.names)


def headroom_of(plan: Plan) -> int:
    """Bytes that such a step keeps free."""
    return int(HEADROOM * max(0, plan.predicted_peak - plan.graph.start_nbytes))


class _Sizes(_compat.WatchingMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _SIZES in getattr(func, "tags", ()) and not _picks_by_position(func, args):
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def _picks_by_position(func: Any, args: Sequence[Any]) -> bool:
    """An index has as many rows as it has positions, unless it is a mask."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(index is None or index.dtype not in _MASKS for index in args[1])
