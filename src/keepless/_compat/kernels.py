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
