"""Exceptions at chosen lines of Keepless, as Ctrl-C raises them anywhere.

What puts things back cannot itself be undone: an exception that would come inside a `finally`, a handler of all
exceptions, or `__exit__` comes after it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import keepless

HOME = str(Path(keepless.__file__).parent)
PURE = tuple(
    f"{HOME}/{name}" for name in ("solve/", "passes/", "machine/", "ir/", "cost/", "reporting/", "errors", "cli/")
)
"""Below the torch line: nothing of the world is touched there, and most lines run there."""

Place = tuple[str, int]


@functools.cache
def _cleaning(path: str) -> frozenset[int]:
    """Lines of a file that put things back."""
    found: set[int] = set()

    def take(nodes: list[Any]) -> None:
        for node in nodes:
            found.update(range(node.lineno, node.end_lineno + 1))

    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.Try):
            take(node.finalbody)
            for handler in node.handlers:
                if handler.type is None or getattr(handler.type, "id", "") == "BaseException":
                    take(handler.body)
        if isinstance(node, ast.FunctionDef) and node.name in ("__exit__", "__del__", "give_back", "take_out"):
            take(node.body)
    return frozenset(found)


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(HOME) and not name.startswith(PURE)


def _is_cleaning(frame: FrameType | None) -> bool:
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(HOME) and frame.f_lineno in _cleaning(name):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _tracing(on_line: Callable[[FrameType], None]) -> Iterator[None]:
    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            on_line(frame)
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, event, _: local if _is_ours(frame) else None)
    try:
        yield
    finally:
        sys.settrace(before)


def places(run: Callable[[], object]) -> list[Place]:
    """The lines that a call comes to, in the order in which it first does."""
    found: dict[Place, None] = {}
    with _tracing(lambda frame: found.setdefault((frame.f_code.co_filename, frame.f_lineno))):
        run()
    return list(found)


def interrupted(run: Callable[[], object], place: Place, error: BaseException) -> bool:
    """Runs a call in which a line raises, the first time that it is come to; whether that came out of the call."""
    is_due = False

    def on_line(frame: FrameType) -> None:
        nonlocal is_due
        is_due = is_due or (frame.f_code.co_filename, frame.f_lineno) == place
        if is_due and not _is_cleaning(frame):
            is_due = False
            sys.settrace(None)
            raise error

    try:
        with _tracing(on_line):
            run()
    except BaseException as caught:
        if caught is error or caught.__context__ is error or caught.__cause__ is error:
            return True
        raise
    return False
