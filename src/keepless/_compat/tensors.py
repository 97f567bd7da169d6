"""Facts of many tensors at once, by the compiled check of torch's own guards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

try:
    from torch._C._dynamo import guards as _guards
except ImportError:  # pragma: no cover - a release without it
    _guards = None  # type: ignore[assignment]


def quick_look(tensors: Sequence[torch.Tensor]) -> Callable[[Sequence[Any]], bool] | None:
    """A check whether other tensors are like these: each in class, dtype, device, sizes, strides and in whether it
    requires a gradient, and no two of them one object. True is certain; False may mean that another mode is around.

    It holds none of the tensors. None where this release has no such check, or it does not know these tensors again.
    """
    try:
        check = _guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        known = bool(check(*tensors))
    except Exception:  # whatever a release does instead
        return None

    def are_alike(now: Sequence[Any]) -> bool:
        try:
            return bool(check(*now))
        except TypeError:  # one is no tensor
            return False

    return are_alike if known else None
