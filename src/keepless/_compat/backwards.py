"""Backwards seen from where they are called: autograd tells neither of their begin nor of a failure by itself."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

Listener = Callable[[Exception, Sequence[Any]], "Exception | None"]
"""Told of an error and of the backward's roots; gives the error that is to stand in its place, if any."""

_home: Any = torch.autograd
_NAME = "_engine_run_backward"
_PLACES: tuple[Any, ...] = (_home, _home.graph)
Begin = Callable[[Sequence[Any], Sequence[Any], bool, bool], None]
"""Told before a backward runs: its roots, their gradients, whether the graph stays, and whether the backward is itself
differentiated."""
_lock = threading.RLock()
_listeners: list[Listener] = []
_begins: list[Begin] = []
_own: Any = None
_ours: Any = None


def watch_backwards(listener: Listener) -> Callable[[], None]:
    """Whoever calls `backward` or `grad`, the listener is told where that fails; gives what ends it.

    While anyone listens, torch's way into its engine is wrapped in a try block.
    """
    return _listen(_listeners, listener)


def watch_begins(begin: Begin) -> Callable[[], None]:
    """Whoever calls `backward` or `grad`, `begin` is called first, in the caller's thread; gives what ends it."""
    return _listen(_begins, begin)


def _listen(told: list[Any], listener: Any) -> Callable[[], None]:
    with _lock:
        if not _listeners and not _begins:
            _wrap()
        told.append(listener)

    def unwatch() -> None:
        with _lock:
            if listener in told:
                told.remove(listener)
                if not _listeners and not _begins:
                    _unwrap()

    return unwatch


def _wrap() -> None:
    global _own, _ours
    if _ours is not None and getattr(_home, _NAME) is _ours:  # somebody wrapped it, and took that off since
        return
    _own = getattr(_home, _NAME)
    _ours = _watched(_own)
    for place in _PLACES:
        if getattr(place, _NAME) is _own:
            setattr(place, _NAME, _ours)


def _unwrap() -> None:
    """Where others have wrapped it since, ours stays below and does nothing."""
    for place in _PLACES:
        if getattr(place, _NAME) is _ours:
            setattr(place, _NAME, _own)


def _watched(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def run_backward(t_outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for begin in list(_begins):
            begin(t_outputs, args[0], bool(args[1]), bool(args[2]))
        try:
            return own(t_outputs, *args, **kwargs)
        except Exception as error:
            other = _told(error, t_outputs)
            if other is None:
                raise
        raise other  # out of the handler, which holds what the failed backward's frames do

    return run_backward


def _told(error: Exception, roots: Sequence[Any]) -> Exception | None:
    for listener in list(_listeners):
        other = listener(error, roots)
        if other is not None:
            return other
    return None


def number_of(node: Any) -> int:
    """A node's place in the order in which this thread made them; leaves are greater than any."""
    return int(node._sequence_nr())


def hooks_of(tensor: torch.Tensor) -> Any:
    """What `tensor.register_hook` has registered; None or empty where that is nothing."""
    return tensor._backward_hooks


@contextlib.contextmanager
def without_hooks(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """No hook of these tensors runs inside the block, where gradients for them are found, and none is retained.

    For a backward inside of another one, which hands these gradients on to the same tensors: their hooks run there,
    once, on the sums of all that comes from the whole graph.
    """
    tensors = list(tensors)
    standing = {id(hooks): (hooks, dict(hooks)) for tensor in tensors if (hooks := hooks_of(tensor))}
    retaining = [(tensor, tensor.grad) for tensor in tensors if tensor.retains_grad and not tensor.is_leaf]
    try:
        for hooks, _ in standing.values():
            hooks.clear()
        yield
    finally:
        for hooks, kept in standing.values():
            hooks.update(kept)
        for tensor, grad in retaining:  # `retain_grad` is a hook, too, and noted what comes to it once more
            tensor.grad = grad
