"""BatchNorm on a card as eager runs it: tracing makes torch's own kernel of cuDNN's, whose bits are others.

`aten.cudnn_batch_norm` is taken apart before autograd sees it, into `aten._native_batch_norm_legit_functional`. What
eager would take is asked again here, and put in its place, with the reserve that the backward reads.
"""

from __future__ import annotations

from typing import Any

import torch

from keepless import _compat

aten = torch.ops.aten
RESERVE = 5
"""Place of the reserve among the results: after those of `_native_batch_norm_legit_functional`."""


def runs_by_cudnn(x: torch.Tensor, *others: Any) -> bool:
    """Whether eager norms by cuDNN.

    Arguments:
        x: of which only device, dtype and shape are read; it may be fake.
        others: weight, bias, running mean and variance, whether it trains, and epsilon.
    """
    return x.device.type == "cuda" and _compat.batch_norm_backend(x, *others) == "Cudnn"


def cudnn_batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor | None, ...]:
    """Output, the batch's mean and inverse deviation, new running mean and variance, reserve.

    Running statistics are not written; without them none are made.
    """
    if training and mean is not None and var is not None:
        mean, var = mean.clone(), var.clone()
    out, of_batch, deviation, reserve = aten.cudnn_batch_norm.default(
        x, weight, bias, mean, var, training, momentum, eps
    )
    if isinstance(x, _compat.FakeTensor):  # its fake kernel knows of no reserve
        reserve = x.new_empty((_compat.batch_norm_reserve_nbytes(x, training),), dtype=torch.uint8)
    return out, of_batch, deviation, mean, var, reserve


def cudnn_batch_norm_inference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """In evaluation mode: output, and two that are empty. The backward is torch's own, as in eager."""
    found: tuple[torch.Tensor, ...] = aten.cudnn_batch_norm.default(x, weight, bias, mean, var, False, momentum, eps)
    return found[:3]


def cudnn_batch_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    of_batch: torch.Tensor,
    deviation: torch.Tensor,
    eps: float,
    reserve: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of input, weight and bias (`cudnn_batch_norm` of derivatives.yaml). The reserve is not written."""
    grad = grad.contiguous(memory_format=_compat.suggested_memory_format(x))
    found: tuple[torch.Tensor, ...] = aten.cudnn_batch_norm_backward.default(
        x, grad, weight, None, None, of_batch, deviation, eps, reserve.clone()
    )
    return found
