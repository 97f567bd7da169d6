"""Direct entries dispatch to the overloads that they stand for, with the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keepless.execute.direct import DIRECT

aten = torch.ops.aten
A = torch.linspace(-2, 2, 12).reshape(3, 4)
B = torch.linspace(0.1, 3, 12).reshape(3, 4)
M = torch.linspace(-1, 1, 8).reshape(4, 2)
X4 = torch.linspace(-1, 1, 2 * 3 * 5 * 5).reshape(2, 3, 5, 5)
W4 = torch.linspace(-1, 1, 4 * 3 * 3 * 3).reshape(4, 3, 3, 3)

CASES: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    aten.add.Tensor: ((A, B), {"alpha": 2}),
    aten.sub.Tensor: ((A, 1.5), {}),
    aten.mul.Tensor: ((A, 0.7978845608028654), {}),
    aten.div.Tensor: ((A, B), {}),
    aten.add_.Tensor: ((A, B), {}),
    aten.sub_.Tensor: ((A, B), {}),
    aten.mul_.Tensor: ((A, 0.5), {}),
    aten.div_.Tensor: ((A, B), {}),
    aten.mm.default: ((A, M), {}),
    aten.bmm.default: ((A[None], M[None]), {}),
    aten.addmm.default: ((M[0], A, M), {}),
    aten.convolution.default: ((X4, W4, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), {}),
    aten.native_layer_norm.default: ((A, [4], M[:, 0], M[:, 1], 1e-5), {}),
    aten.native_batch_norm.default: ((X4, M[:3, 0], M[:3, 1], None, None, True, 0.1, 1e-5), {}),
    aten.embedding.default: ((A, torch.tensor([0, 2, 2]), -1, False, False), {}),
    aten.cat.default: (([A, B], 1), {}),
    aten.clone.default: ((A.t(),), {"memory_format": torch.contiguous_format}),
    aten.sum.dim_IntList: ((A, [0], True), {"dtype": torch.float64}),
    aten.mean.dim: ((X4, [2, 3], True), {}),
    aten.view.default: ((A, [-1, 2]), {}),
    aten.expand.default: ((A[:1], [3, 4]), {}),
    aten.transpose.int: ((A, 0, 1), {}),
    aten.permute.default: ((X4, [0, 2, 3, 1]), {}),
    aten.unsqueeze.default: ((A, 1), {}),
    aten.select.int: ((A, 0, 1), {}),
    aten.copy_.default: ((A, B), {}),
    aten.split.Tensor: ((A, 2, 1), {}),
    **{op: ((A, B), {"out": torch.zeros(3, 4)}) for op in (aten.add.out, aten.sub.out, aten.mul.out, aten.div.out)},
    aten.pow.Tensor_Scalar: ((A, 3), {}),
    aten.pow_.Scalar: ((A, 3), {}),
    aten.where.self: ((A > 0, A, B), {}),
    aten.gelu.default: ((A,), {"approximate": "tanh"}),
    aten.masked_fill.Scalar: ((A, A > 0, -1.5), {}),
    aten.native_group_norm.default: ((X4, M[:3, 0], M[:3, 1], 2, 3, 25, 3, 1e-5), {}),
    aten.baddbmm.default: ((M[None, :3], A[None], M[None]), {"beta": 0.5, "alpha": 2}),
    aten._softmax.default: ((A, -1, False), {}),
    aten._log_softmax.default: ((A, 1, False), {}),
    aten._softmax_backward_data.default: ((A, B, -1, torch.float32), {}),
    aten._log_softmax_backward_data.default: ((A, B, -1, torch.float32), {}),
}


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def _flat(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


@pytest.mark.parametrize("op", list(DIRECT), ids=str)
def test_direct_entry_is_the_overload(op: Any) -> None:
    """A direct entry runs its overload first of all, and returns the same bits."""
    args, kwargs = CASES.get(op, ((B,), {}))

    def fresh() -> tuple[Any, ...]:
        return tuple(arg.clone() if isinstance(arg, torch.Tensor) and op._schema.is_mutable else arg for arg in args)

    with torch.no_grad():
        first, second = fresh(), fresh()
        expected = _flat(op(*first, **kwargs))
        with _Names() as names:
            found = _flat(DIRECT[op](*second, **kwargs))
    assert names.seen[0] is op
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(expected, found, strict=True))
