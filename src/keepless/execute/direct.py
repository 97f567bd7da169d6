"""The quickest Python entry of an aten op.

`torch.mm(a, b)` and `torch.ops.aten.mm.default(a, b)` end in the same kernel, but torch's own bindings parse their
arguments 0.4 to 1.5 us faster per call: on a model that is bound by overhead, a tenth of the step. Each entry here
takes the overload's own positional and keyword arguments and dispatches to that very overload;
`tests/cpu/test_engine_direct.py` watches that it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from keepless import _compat

aten = torch.ops.aten
_C = _compat.functions
_T = torch.Tensor

_BY_NAME = {
    "_softmax": aten._softmax.default,
    "_log_softmax": aten._log_softmax.default,
    "_softmax_backward_data": aten._softmax_backward_data.default,
    "_log_softmax_backward_data": aten._log_softmax_backward_data.default,
}
"""Names among torch's bindings, where a release has them."""

DIRECT: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.add_.Tensor: _T.add_,
    aten.sub_.Tensor: _T.sub_,
    aten.mul_.Tensor: _T.mul_,
    aten.div_.Tensor: _T.div_,
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.addmm.default: torch.addmm,
    aten.convolution.default: torch.convolution,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.native_batch_norm.default: torch.native_batch_norm,
    aten.embedding.default: torch.embedding,
    aten.cat.default: torch.cat,
    aten.clone.default: torch.clone,
    aten.sum.dim_IntList: torch.sum,
    aten.mean.dim: torch.mean,
    aten.tanh.default: torch.tanh,
    aten.exp.default: torch.exp,
    aten.neg.default: torch.neg,
    aten.relu.default: torch.relu,
    aten.rsqrt.default: torch.rsqrt,
    aten.sigmoid.default: torch.sigmoid,
    aten.tanh_.default: _T.tanh_,
    aten.relu_.default: _T.relu_,
    aten.copy_.default: _T.copy_,
    aten.view.default: _T.view,
    aten.expand.default: _T.expand,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.select.int: torch.select,
    aten.detach.default: _T.detach,
    aten.split.Tensor: getattr(_C, "split", aten.split.Tensor),
    aten.add.out: torch.add,
    aten.sub.out: torch.sub,
    aten.mul.out: torch.mul,
    aten.div.out: torch.div,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.pow_.Scalar: _T.pow_,
    aten.where.self: torch.where,
    aten.sin.default: torch.sin,
    aten.cos.default: torch.cos,
    aten.sqrt.default: torch.sqrt,
    aten.gelu.default: torch.nn.functional.gelu,
    aten.masked_fill.Scalar: _T.masked_fill,
    aten.native_group_norm.default: torch.native_group_norm,
    aten.baddbmm.default: torch.baddbmm,
    **{op: getattr(_C, name) for name, op in _BY_NAME.items() if hasattr(_C, name)},
}
"""Overload -> callable with the same arguments."""


def direct(target: Callable[..., Any]) -> Callable[..., Any]:
    """The quickest callable that does what `target` does."""
    try:
        found = DIRECT.get(target)
    except TypeError:  # a callable that cannot be hashed
        found = None
    return found if found is not None else _compat.raw_op(target)
