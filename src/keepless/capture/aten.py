"""What Keepless knows about single aten ops: in-place forms, dropout taken apart, BatchNorm without statistics.

Every form here gives the same bits as the op that it stands for; `tests/cpu/test_capture_aten.py` compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from keepless import _compat

aten = torch.ops.aten


def draw_mask(size: tuple[int, ...], stride: tuple[int, ...], keep: float) -> torch.Tensor:
    """A dropout mask as `aten.native_dropout` draws it on the CPU: bool, True with probability `keep`."""
    return torch.empty_strided(size, stride, dtype=torch.bool).bernoulli_(keep)


def full_mask(size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """The mask of a dropout that drops all: its scale is zero, so that -1.0 and NaN become -0.0 and NaN as in eager."""
    return torch.empty_strided(size, stride, dtype=torch.bool).fill_(True)


def apply_mask(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """`x` where the mask is True, scaled. The same products, in the same order, as eager's dropout.

    The mask is widened into the output, so that no temporary of the output's size is needed (`x * mask` makes one).
    """
    out = torch.empty_like(x).copy_(mask)
    return torch.mul(x, out, out=out).mul_(scale)


def eager_scale(p: float, dtype: torch.dtype) -> float:
    """The factor by which eager's dropout on the CPU scales what it keeps, rounded as eager rounds it.

    Eager divides its noise tensor by 1 - p in the tensor's dtype; `native_dropout` multiplies by 1 / (1 - p).
    """
    return float(torch.ones((), dtype=dtype).div_(1 - p).item())


def draw_in_place(
    size: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    keep: float,
    generator: None = None,
) -> torch.Tensor:
    """`empty_like(x).bernoulli_(keep)` as eager draws it, in the order of x's memory.

    Tracing makes `aten.bernoulli.p` of it, which draws in the order of the indices, into a contiguous tensor.
    """
    return torch.empty_strided(size, stride, dtype=dtype, device=device).bernoulli_(keep).contiguous()


def lstm_layer(*args: Any) -> Any:
    """`aten.mkldnn_rnn_layer` for training: its kernel makes its workspace only where grad mode is on."""
    plain = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
    with torch.enable_grad():
        return aten.mkldnn_rnn_layer.default(*plain)


def lstm_workspace_nbytes(args: tuple[Any, ...]) -> int:
    """Bytes of the workspace that `lstm_layer` returns, which only its kernel knows: it runs once, on zeros."""
    real = [torch.zeros(arg.shape, dtype=arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]
    workspace: torch.Tensor = lstm_layer(*real)[3]
    return workspace.untyped_storage().nbytes()


def materialize(grad: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """A copy of a gradient with its parameter's layout, so that autograd takes it over without another copy."""
    return torch.empty_strided(size, stride, dtype=grad.dtype, device=grad.device).copy_(grad)


_INPLACE: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.add.Scalar: aten.add_.Scalar,
    aten.sub.Scalar: aten.sub_.Scalar,
    aten.mul.Scalar: aten.mul_.Tensor,  # mul_.Scalar rounds the number to bfloat16 or float16 first
    aten.div.Scalar: aten.div_.Scalar,
    aten.tanh.default: aten.tanh_.default,
    aten.exp.default: aten.exp_.default,
    aten.neg.default: aten.neg_.default,
    aten.relu.default: aten.relu_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.silu.default: aten.silu_.default,
    aten.gelu.default: aten.gelu_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.elu.default: aten.elu_.default,
    aten.rsqrt.default: aten.rsqrt_.default,
    aten.sqrt.default: aten.sqrt_.default,
    aten.pow.Tensor_Scalar: aten.pow_.Scalar,
    aten.masked_fill.Scalar: aten.masked_fill_.Scalar,
}
"""Ops whose first argument may be overwritten by the result."""

_OUT: dict[Any, tuple[Any, str, tuple[int, ...]]] = {
    aten.add.Tensor: (aten.add.out, "out", (1,)),
    aten.mul.Tensor: (aten.mul.out, "out", (1,)),
    aten.sub.Tensor: (aten.sub.out, "out", (1,)),
    aten.div.Tensor: (aten.div.out, "out", (1,)),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input", (0,)),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input", (0,)),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input", (0,)),
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, "grad_input", (0,)),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input", (0,)),
    aten.where.self: (aten.where.self_out, "out", (1, 2)),
}
"""Elementwise ops with an out= form, and the arguments that may serve as the out tensor.

TensorIterator allows an output that is exactly one of its inputs (`assert_no_partial_overlap`).
"""


_ROWWISE: dict[Any, tuple[Any, str, int]] = {
    aten._softmax.default: (aten._softmax.out, "out", 1),
    aten._log_softmax.default: (aten._log_softmax.out, "out", 1),
    aten._softmax_backward_data.default: (aten._softmax_backward_data.out, "grad_input", 2),
    aten._log_softmax_backward_data.default: (aten._log_softmax_backward_data.out, "out", 2),
}
"""Ops that go row by row, with an out= form and the position of their `dim` argument.

Over the last dimension on the CPU each row is read before it is written, so that the out tensor may be the first
argument. It saves a copy of the logits, or of the attention scores, where they are the peak.
"""


@dataclass(frozen=True)
class Into:
    """An op that writes its result over one of its arguments, by its out= form.

    Arguments:
        op: the form; `name` is its out argument's.
        position: of the argument that is written.
    """

    op: Any
    name: str
    position: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.op(*args, **kwargs, **{self.name: args[self.position]})


def in_place_forms(target: Any, args: tuple[Any, ...], num_dims: int, device: str) -> dict[int, Callable[..., Any]]:
    """Argument position -> callable with the op's own arguments that writes its result over that argument.

    Arguments:
        target: the op.
        args: of the call; tensors may be anything.
        num_dims: of the op's result.
        device: type of the device that it runs on.
    """
    forms: dict[int, Callable[..., Any]] = {}
    if target in _ROWWISE and device == "cpu":
        out_op, name, place = _ROWWISE[target]
        if args[place] in (-1, num_dims - 1) and num_dims > 0:
            forms[0] = Into(out_op, name, 0)
    if target in _INPLACE:
        forms[0] = _INPLACE[target]
    if target in _OUT:
        out_op, name, positions = _OUT[target]
        for position in positions:
            forms.setdefault(position, Into(out_op, name, position))
    return forms


def draws_random(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call advances the random generator."""
    if target is draw_mask or target is draw_in_place:
        return True
    if not isinstance(target, _compat.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    names = [argument.name for argument in target._schema.arguments]
    if "philox_seed" in names:  # attention's backward draws the forward's numbers again, from its saved state
        return False
    bound = dict(zip(names, args, strict=False)) | kwargs
    return not ("dropout_p" in bound and bound["dropout_p"] == 0.0)


FRESH = (aten.lift_fresh_copy.default, aten.lift_fresh.default)
"""Ops that stand for `torch.tensor(...)` in the forward: their argument is made anew in each step."""

CHOICES = frozenset({"topk", "sort", "argsort", "argmax", "argmin", "kthvalue", "searchsorted", "bucketize"})
"""Names of ops that pick indices by comparing numbers."""
WHOLE_LOSSES = frozenset(
    {
        aten.mse_loss.default,
        aten.smooth_l1_loss.default,
        aten.soft_margin_loss.default,
        aten.binary_cross_entropy.default,
    }
)
"""Losses whose kernels make room for an element per input's, and then let their mean or sum stand in the first."""
NORMS = frozenset(
    {
        aten.native_layer_norm.default,
        aten.native_group_norm.default,
        aten.native_batch_norm.default,
        aten._native_batch_norm_legit_functional.default,
        aten._native_batch_norm_legit_no_training.default,
        aten._native_batch_norm_legit.no_stats,
    }
)
"""Norms that return statistics in places 1 and 2."""
SAME_RESULTS: dict[Any, dict[int | None, int]] = {aten.mkldnn_rnn_layer_backward.default: {4: 3}}
"""Results that are the tensor of another place: an LSTM's two biases have one gradient. Fake tensors tell so only at
an op's first call; for later ones torch's cache makes two of it."""
BATCH_NORM_FORWARD = (aten._native_batch_norm_legit_functional.default,)
NEW_STATISTICS = (3, 4)
"""Places of the running statistics in its results."""
BATCH_NORM_ALONE = (aten._native_batch_norm_legit.no_stats,)
"""Without running statistics."""
BATCH_NORM_INFERENCE = (aten._native_batch_norm_legit_no_training.default,)
BATCH_NORM_BACKWARD = (aten.native_batch_norm_backward.default,)


def batch_norm_replay(
    args: tuple[Any, ...], dtype: torch.dtype, of_statistics: torch.dtype
) -> tuple[Any, tuple[Any, ...]] | None:
    """For a training-mode BatchNorm: the op and arguments that give the same outputs without its statistics.

    Arguments:
        dtype: of its input.
        of_statistics: dtype of its running statistics, which set the precision where it has no weights.
    """
    x, weight, bias, _, _, training, momentum, eps = args
    if not training:
        return None
    if weight is None and of_statistics != dtype:
        return batch_norm_mixed, (x, of_statistics, momentum, eps)
    return aten.native_batch_norm.default, (x, weight, bias, None, None, True, momentum, eps)


def batch_norm_mixed(x: torch.Tensor, of_statistics: torch.dtype, momentum: float, eps: float) -> Any:
    """A training-mode BatchNorm without weights, in the precision of running statistics that are not touched."""
    mean, var = torch.zeros((2, x.shape[1]), dtype=of_statistics, device=x.device)
    return aten.native_batch_norm.default(x, None, None, mean, var, True, momentum, eps)


def batch_norm_backward_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The backward's arguments without the running statistics, which it reads only in evaluation mode."""
    return (*args[:3], None, None, *args[5:]) if args[7] else args
