"""Private parts of torch for fake tensors whose values are known."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary as WeakTensorKeyDictionary


class Watcher(Protocol):
    """What is told of the ops that fakes meet."""

    def made(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An op gave a result."""

    def answer(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an op that gives Python a tensor's data would give; None where it is not known."""


class WatchedFakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake tensors, of whose ops a watcher is told. It may say what Python asks of their data."""

    watcher: Watcher | None = None

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watcher, kwargs = self.watcher, kwargs or {}
        if watcher is None or not isinstance(func, torch._ops.OpOverload):
            return super().dispatch(func, types, args, kwargs)
        if torch.Tag.data_dependent_output in func.tags:
            answer = watcher.answer(func, args, kwargs)
            if answer is not None:
                return answer
        result = super().dispatch(func, types, args, kwargs)
        watcher.made(func, args, kwargs, result)
        return result


@contextlib.contextmanager
def real_ops() -> Iterator[None]:
    """Ops run on real tensors here as they are written, whatever modes are around: not differentiated, and not cast.

    An op that was met beneath autocast has its casts beside it.
    """
    with _disable_current_modes(), torch.no_grad(), torch._C._DisableAutocast():
        yield


@contextlib.contextmanager
def fakes_pass_for_real() -> Iterator[None]:
    """Model code that takes another way for fake tensors goes the eager way: transformers asks by a function of its
    own."""
    module: Any = sys.modules.get("transformers.utils.import_utils")
    before = getattr(module, "is_fake_tensor", None)
    if before is None:
        yield
        return
    try:
        module.is_fake_tensor = lambda x: False
        yield
    finally:
        module.is_fake_tensor = before
