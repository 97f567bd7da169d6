"""Kernels of torch's own ops that stand in for a while: how a capture on the CPU takes another device's ops."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.library import _scoped_library

HOST_OUTPUTS: Mapping[str, tuple[int, ...]] = {
    "aten::_scaled_dot_product_efficient_attention": (2, 3),
    "aten::_efficient_attention_forward": (2, 3),
}
"""CUDA ops -> positions of outputs that are on the host: the seed and the offset of dropout, unless a CUDA graph is
recorded. Their fake kernels say that these are on the device, and their backward reads them there without a check: a
tensor on the device in such a place ends the process."""


def torch_release() -> tuple[int, int]:
    """The running torch's major and minor version."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def cudnn_version() -> int:
    """The running torch's cuDNN, 91900 for 9.19; 0 without one."""
    cudnn: Any = torch.backends.cudnn
    return int(cudnn.version() or 0)


def cudnn_attention_enabled() -> bool:
    """Whether attention may take cuDNN."""
    cuda: Any = torch.backends.cuda
    return bool(cuda.cudnn_sdp_enabled())


def host_outputs(target: Any) -> tuple[int, ...]:
    """Positions of the outputs of an op on CUDA that are on the host although its fakes are not."""
    schema = getattr(target, "_schema", None)
    return () if schema is None else HOST_OUTPUTS.get(schema.name, ())


@contextlib.contextmanager
def replaced_kernels(table: Mapping[tuple[str, str], Callable[..., Any]]) -> Iterator[None]:
    """Within it, ops of the CPU run these functions in this thread.

    Registrations are the whole process's: other threads that meet one run what they would have run.

    Arguments:
        table: (op's name with its overload, dispatch key "AutogradCPU" or "AutocastCPU") -> function of its arguments.
            An op must be composite for the first key, and not be in autocast's own lists for the second.
    """
    owner = threading.get_ident()
    try:
        with _scoped_library("aten", "IMPL") as library:
            for (name, key), function in table.items():
                library.impl(name, _guarded(name, key, function, owner), key)
            _forget_choices(table)
            yield
    finally:
        _forget_choices(table)


def _forget_choices(table: Mapping[tuple[str, str], object]) -> None:
    """While it traces, torch remembers for each op and key which kernel runs, and is not told when that changes."""
    for name, _ in table:
        _overload(name)._dispatch_cache.clear()


def _overload(name: str) -> Any:
    op, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, op), overload or "default")


def _guarded(name: str, key: str, function: Callable[..., Any], owner: int) -> Callable[..., Any]:
    target = _overload(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == owner:
            return function(*args, **kwargs)
        if key == "AutocastCPU":
            with torch.autocast("cpu", enabled=False):
                return target(*args, **kwargs)
        return target.decompose(*args, **kwargs)

    return kernel


def batch_norm_backend(x: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, eps: float) -> str:
    """What eager takes for a BatchNorm: "Native", "Cudnn" or "Miopen".

    Arguments:
        weight, bias, mean, var: tensors or None.
    """
    if weight is None or bias is None or (mean is None) != (var is None) or (mean is None and not training):
        return "Native"
    mean, var = (weight, weight) if mean is None else (mean, var)  # the call takes tensors only
    found: Any = torch._C._select_batch_norm_backend(x, weight, bias, mean, var, training, eps)
    return str(found.name)


def convolution_backend(x: torch.Tensor, weight: torch.Tensor, bias_sizes: Any, how: tuple[Any, ...]) -> str:
    """What eager takes for a convolution with a backward: "Mkldnn", "MkldnnTranspose", "Slow3d", "Cudnn" ...

    Arguments:
        x, weight: of which only device, dtype, shape and strides are read.
        bias_sizes: of the bias, or None without one.
        how: stride, padding, dilation, transposed, output padding and groups, as `aten.convolution` takes them.
    """
    found: Any = torch._C._select_conv_backend(x, weight, None, *how, bias_sizes)
    known: Any = torch._C._ConvBackend  # type: ignore[attr-defined]
    # The enum's Python side leaves the one behind Mkldnn out.
    return "MkldnnTranspose" if int(found) == int(known.Mkldnn) + 1 else str(found.name)


def batch_norm_reserve_nbytes(x: torch.Tensor, training: bool) -> int:
    """Bytes that cuDNN's BatchNorm keeps for its backward."""
    return int(torch._C._get_cudnn_batch_norm_reserve_space_size(x, training))  # type: ignore[attr-defined]


def suggested_memory_format(x: torch.Tensor) -> torch.memory_format:
    """`Tensor::suggest_memory_format`."""
    return torch._prims_common.suggest_memory_format(x)


_CYCLES_PER_S = 2e9
"""About what a card's clock does; slower ones are busy for longer."""


def keep_busy(seconds: float) -> None:
    """Has the current CUDA device do nothing else for about so long; the host goes on at once."""
    torch.cuda._sleep(int(seconds * _CYCLES_PER_S))  # type: ignore[no-untyped-call]


def clear_workspaces() -> None:
    """Gives cuBLAS' workspaces back to the allocator: each thread that multiplies matrices makes its own anew."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch._C._cuda_clearCublasWorkspaces()
