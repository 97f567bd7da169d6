"""Calls of modules inside a region, and their hooks.

While a region is watched or run again, `torch.nn.Module._call_impl` goes through a route of this thread; other threads
keep the module's own. The route is taken down when no thread needs it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from keepless.eager import world

_Module: Any = torch.nn.Module
_Route = Callable[[Callable[..., Any], torch.nn.Module, tuple[Any, ...], dict[str, Any]], Any]

_lock = threading.Lock()
_users = 0
_original: Callable[..., Any] = _Module._call_impl
_local = threading.local()


def _routed(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    route = getattr(_local, "route", None)
    if route is None:
        return _original(self, *args, **kwargs)
    return route(_original, self, args, kwargs)


@contextlib.contextmanager
def calls_through(route: _Route | None) -> Iterator[None]:
    """This thread's module calls go through `route(call, module, args, kwargs)` inside the block."""
    global _users, _original
    before = getattr(_local, "route", None)
    is_counted = False
    try:  # an interrupt may come at any line
        with _lock:
            if _users == 0:
                _original = _Module._call_impl
            _users, is_counted = _users + 1, True
            _Module._call_impl = _routed
        _local.route = route
        yield
    finally:
        _local.route = before
        with _lock:
            _users -= is_counted
            if _users == 0:
                _Module._call_impl = _original


class Judge:
    """Runs hooks and finds those that do more than look.

    `around` is entered for each. A hook only looks if it returns nothing, sets no attribute of its module, and leaves
    `effects()` as it was.

    Attributes:
        seen: ids of the hooks that ran.
        active: ids of those that did something.
    """

    def __init__(self, effects: Callable[[], Any], around: Any = None) -> None:
        self.effects = effects
        self.around = around if around is not None else contextlib.nullcontext()
        self.seen: set[int] = set()
        self.active: set[int] = set()
        self.thread = threading.get_ident()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Judge:
        self.judge_in(*hook_dictionaries())
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def judge_in(self, *dictionaries: dict[int, Any]) -> None:
        """Hooks in these dictionaries are judged until the block ends."""
        for dictionary in dictionaries:
            for key in list(dictionary):
                with _lock:
                    self._judge_hook(dictionary, key)

    def _judge_hook(self, dictionary: dict[int, Any], key: int) -> None:
        hook = dictionary.get(key)
        if hook is not None and not (isinstance(hook, _Judged) and hook.judge is self):
            judged = dictionary[key] = _Judged(self, key, hook)
            self._undo.callback(_unjudge, dictionary, key, judged)


class _Judged:
    def __init__(self, judge: Judge, key: int, hook: Callable[..., Any]) -> None:
        self.judge, self.key, self.hook = judge, key, hook

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        judge = self.judge
        if threading.get_ident() != judge.thread:
            return self.hook(module, *args, **kwargs)
        attributes = world.looked_at(module)
        before = judge.effects()
        with judge.around:
            given = self.hook(module, *args, **kwargs)
        judge.seen.add(self.key)
        if given is not None or before != judge.effects() or world.changed(module, attributes):
            judge.active.add(self.key)
        return given


def _unjudge(dictionary: dict[int, Any], key: int, judged: _Judged) -> None:
    with _lock:
        outer = dictionary.get(key)
        if outer is judged:
            dictionary[key] = judged.hook
        while isinstance(outer, _Judged):  # another thread's judge may have come around this one
            if outer.hook is judged:
                outer.hook = judged.hook
            outer = outer.hook


def hooks_of(module: torch.nn.Module) -> tuple[int, ...]:
    """The ids of a module's forward hooks."""
    m: Any = module
    if m._forward_hooks or m._forward_pre_hooks:
        return (*m._forward_pre_hooks, *m._forward_hooks)
    return ()


def global_hooks() -> tuple[int, ...]:
    """The ids of the forward hooks of all modules."""
    state: Any = torch.nn.modules.module
    if state._global_forward_pre_hooks or state._global_forward_hooks:
        return (*state._global_forward_pre_hooks, *state._global_forward_hooks)
    return ()


def hook_dictionaries(module: torch.nn.Module | None = None) -> list[dict[int, Any]]:
    """The dictionaries of forward hooks of one module, or of all."""
    state: Any = torch.nn.modules.module
    if module is None:
        return [state._global_forward_pre_hooks, state._global_forward_hooks]
    m: Any = module
    return [m._forward_pre_hooks, m._forward_hooks]


def without(skip: set[int]) -> _Route:
    """A route that leaves these hooks out."""

    def route(call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if skip.isdisjoint((*hooks_of(module), *global_hooks())):
            return call(module, *args, **kwargs)
        return call_without(module, skip, args, kwargs)

    return route


def call_without(module: torch.nn.Module, skip: set[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a module with the hooks that are not in `skip`; backward hooks belong to the first run's graph only."""
    m: Any = module
    state: Any = torch.nn.modules.module
    for key, hook in (*state._global_forward_pre_hooks.items(), *m._forward_pre_hooks.items()):
        if key in skip:
            continue
        if key in m._forward_pre_hooks_with_kwargs:
            given = hook(module, args, kwargs)
            if given is not None:
                args, kwargs = given
        else:
            given = hook(module, args)
            if given is not None:
                args = given if isinstance(given, tuple) else (given,)
    result = m.forward(*args, **kwargs)
    for key, hook in (*state._global_forward_hooks.items(), *m._forward_hooks.items()):
        if key in skip:
            continue
        with_kwargs = key in m._forward_hooks_with_kwargs or key in state._global_forward_hooks_with_kwargs
        given = hook(module, args, kwargs, result) if with_kwargs else hook(module, args, result)
        if given is not None:
            result = given
    return result
