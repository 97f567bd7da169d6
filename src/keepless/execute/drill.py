"""Failures on purpose: what tests of out-of-memory recovery hook into.

Steps that are lowered inside `drilling` call the hook before each op that they run, and a hook that raises makes that
op fail, as if it had found no memory. Steps that are lowered elsewhere have no trace of it::

    with drilling(hook):            # hook(program, index of the instruction)
        keepless.apply(model, plan)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from keepless.ir import Program

Hook = Callable[[Program, int], None]
"""Called before an op runs, with the program and the instruction's index."""

_hooks: list[Hook] = []


@contextmanager
def drilling(hook: Hook) -> Iterator[None]:
    """Steps that are lowered inside the block call the hook, now and later."""
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


def drill_of(program: Program) -> Callable[[int], None] | None:
    """What a step that is lowered now calls before its ops; None in ordinary life."""
    return partial(_hooks[-1], program) if _hooks else None
