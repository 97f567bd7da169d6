"""Backwards that fail, seen from where they were called: autograd tells of no failure by itself."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

Listener = Callable[[Exception, Sequence[Any]], "Exception | None"]
"""Told of an error and of the backward's roots; gives the error that is to stand in its place, if any."""

_home: Any = torch.autograd
_NAME = "_engine_run_backward"
_PLACES: tuple[Any, ...] = (_home, _home.graph)
_lock = threading.RLock()
_listeners: list[Listener] = []
_own: Any = None
_ours: Any = None


def watch_backwards(listener: Listener) -> Callable[[], None]:
    """Whoever calls `backward` or `grad`, the listener is told where that fails; gives what ends it.

    While anyone listens, torch's way into its engine is wrapped in a try block.
    """
    with _lock:
        if not _listeners:
            _wrap()
        _listeners.append(listener)

    def unwatch() -> None:
        with _lock:
            if listener in _listeners:
                _listeners.remove(listener)
                if not _listeners:
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
