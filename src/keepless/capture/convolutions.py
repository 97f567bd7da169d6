"""A convolution's backward as two ops: the gradients of weight and bias, then that of the input.

As one op it needs the input, its gradient and the output's at once, which is the peak of many a convolutional net. But
the input is read for the weight's gradient alone: as two ops, it can go before its own gradient is made, and where the
weight is frozen it is not needed at all. On the CPU torch makes the two by kernels of their own in any case (oneDNN's
in `aten/src/ATen/native/mkldnn/Conv.cpp`, torch's own in `ConvolutionMM2d.cpp` and `ConvolutionMM3d.cpp`): bits and
time are the same.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch

from keepless import _compat
from keepless.capture.layouts import is_dense

aten = torch.ops.aten
CONVOLUTION_BACKWARD = aten.convolution_backward.default
_BACKENDS = ("Mkldnn", "MkldnnTranspose", "Slow2d", "Slow3d")
"""Backends that make the two by kernels of their own, and read nothing of the input for its gradient."""
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_MASK = 10
"""Place of the op's argument that says which gradients are wanted."""


def is_in_parts(args: tuple[Any, ...]) -> bool:
    """Whether a call of `aten.convolution_backward` may be taken apart.

    Arguments:
        args: its own; of tensors only shape, strides and dtype are read. They may be fake, and are taken to be on the
            CPU.
    """
    if len(args) <= _MASK or not args[_MASK][0]:
        return False
    _, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups = args[:_MASK]
    if not all(is_dense(tensor) and tensor.numel() for tensor in (x, weight)):
        return False
    backend = _compat.convolution_backend(
        hollow(tuple(x.shape), tuple(x.stride()), x.dtype),
        hollow(tuple(weight.shape), tuple(weight.stride()), weight.dtype),
        bias_sizes,
        (stride, padding, dilation, transposed, output_padding, groups),
    )
    return backend in _BACKENDS


def of_weight(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's arguments for the gradients of weight and bias, as far as these are wanted."""
    return (*args[:_MASK], [False, *args[_MASK][1:]])


def of_input(args: tuple[Any, ...], x: torch.Tensor) -> tuple[Any, ...]:
    """Arguments of `convolution_input_gradient`.

    Arguments:
        args: of `aten.convolution_backward`.
        x: its input, of which only shape, strides and dtype are read.
    """
    return (args[0], tuple(x.shape), tuple(x.stride()), x.dtype, *args[2:_MASK])


def convolution_input_gradient(
    grad: torch.Tensor,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    weight: torch.Tensor,
    bias_sizes: Sequence[int] | None,
    *how: Any,
) -> torch.Tensor:
    """The first of the gradients of `aten.convolution_backward`, without its input.

    Arguments:
        grad: of the convolution's output.
        size, stride, dtype: of its input.
        how: stride, padding, dilation, transposed, output padding and groups, as the op takes them.
    """
    if isinstance(grad, _compat.FakeTensor):
        return grad.new_empty_strided(size, stride, dtype=dtype)
    x = hollow(size, stride, dtype)
    found: torch.Tensor = CONVOLUTION_BACKWARD(grad, x, weight, bias_sizes, *how, [True, False, False])[0]
    return found


def hollow(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A dense tensor on the CPU that takes no memory as long as nobody reads it: its pages are never touched."""
    pages = mmap.mmap(-1, dtype.itemsize * math.prod(size), **_PRIVATE)
    return torch.frombuffer(pages, dtype=dtype).as_strided(size, stride)
