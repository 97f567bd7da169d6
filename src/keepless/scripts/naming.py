"""What a script calls its modules, and where it calls them: for messages, and for `--model-path`."""

from __future__ import annotations

import inspect
import os
import re
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from keepless.control.parts.module_steps import uncompiled

_DEPTH = 3
"""Attributes of a path at the most: trainer.net.encoder.block has three."""
_MOST = 4000
"""Objects that are looked into for one name."""
_STEP = re.compile(r"\.?(\w+)|\[(\d+)\]|\['([^'\]]*)'\]")


@dataclass(frozen=True)
class Called:
    """A module as a script knows it.

    Arguments:
        name: a variable or a path from one (`generator`, `trainer.net`, `nets['G']`); empty where there is none.
        kind: its class's name.
        place: file and line of its first call; empty before that.
    """

    name: str
    kind: str
    place: str = ""

    def __str__(self) -> str:
        where = f"first called at {self.place}" if self.place else "not called yet"
        return f"{self.name} ({self.kind}, {where})" if self.name else f"{self.kind} ({where})"

    @property
    def short(self) -> str:
        """Without the place."""
        return f"{self.name} ({self.kind})" if self.name else self.kind

    @property
    def path(self) -> str:
        """What `--model-path` takes."""
        return self.name or self.kind


def called(module: torch.nn.Module, *, now: bool = True) -> Called:
    """A module's name in the script, and the line that calls it.

    Arguments:
        now: it is being called.
    """
    return Called(name_of(module), type(uncompiled(module)).__name__, _place() if now else "")


def name_of(module: torch.nn.Module) -> str:
    """What the script calls a module: a variable of its main file, else of the functions that run, else a path from
    one; empty where there is none."""
    scopes = list(_scopes())
    try:
        for scope in scopes:
            for name, value in scope.items():
                if _is_plain(name) and _is(value, module):
                    return name
        return _path_to(module, scopes)
    finally:
        _let_go(scopes)


def stands_at(path: str, module: torch.nn.Module) -> bool:
    """Whether a module is what the script calls by this path."""
    steps = _steps(path)
    if not steps:
        return False
    scopes = list(_scopes())
    try:
        return any(_is(_at(scope, steps), module) for scope in scopes)
    finally:
        _let_go(scopes)


def _is(value: object, module: torch.nn.Module) -> bool:
    return value is module or (issubclass(type(value), torch.nn.Module) and uncompiled(value) is module)  # type: ignore[arg-type]


def _is_plain(name: str) -> bool:
    return name.isidentifier() and not name.startswith("__")


def _steps(path: str) -> list[str | int]:
    """A path's parts: names, and numbers of lists; empty where it is no path."""
    found: list[str | int] = []
    end = 0
    for match in _STEP.finditer(path):
        if match.start() != end:
            return []
        end = match.end()
        name, number, key = match.groups()
        found.append(int(number) if number is not None else name if name is not None else key)
    return found if end == len(path) else []


def _at(scope: Mapping[str, object], steps: list[str | int]) -> object:
    here: Any = scope
    for step in steps:
        if isinstance(here, Mapping):
            here = here.get(step)
        elif isinstance(step, int):
            here = here[step] if isinstance(here, (list, tuple)) and step < len(here) else None
        else:
            here = getattr(here, step, None)
        if here is None:
            return None
    return here


def _path_to(module: torch.nn.Module, scopes: list[Mapping[str, object]]) -> str:
    """The shortest path to a module from names of the script."""
    left: deque[tuple[str, object, int]] = deque(
        (name, value, 0) for scope in scopes for name, value in scope.items() if _is_plain(name)
    )
    seen: set[int] = set()
    while left and len(seen) < _MOST:
        path, here, depth = left.popleft()
        if _is(here, module):
            return path
        if id(here) in seen or depth == _DEPTH or _is_closed(here):
            continue
        seen.add(id(here))
        left += [(f"{path}{step}", value, depth + 1) for step, value in _parts(here)]
    return ""


def _is_closed(value: object) -> bool:
    """Whether nothing inside a value is looked for."""
    kinds = (torch.Tensor, types.ModuleType, type, str, bytes, int, float, types.FunctionType, types.MethodType)
    return value is None or issubclass(type(value), kinds)


def _parts(here: object) -> Iterator[tuple[str, object]]:
    """Steps from a value, and where they lead: attributes without running code, items of short lists and dicts."""
    if type(here) in (list, tuple):
        yield from ((f"[{index}]", value) for index, value in enumerate(here[:16]))  # type: ignore[index]
    elif type(here) is dict:
        for key, value in list(here.items())[:64]:
            if type(key) is str and "'" not in key:
                yield f"['{key}']", value
    else:
        own = getattr(here, "__dict__", None)
        if type(own) is dict:
            names = own | (own.get("_modules") or {}) if issubclass(type(here), torch.nn.Module) else own
            for name, value in list(names.items()):
                if type(name) is str and name not in ("_modules", "_parameters", "_buffers"):
                    yield f".{name}", value


def _frames() -> Iterator[types.FrameType]:
    """The frames of the script and of what it calls, innermost first; not those of torch, nor ours."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        home = str(frame.f_globals.get("__name__", ""))
        if home == "keepless.scripts.process":
            return
        if home.partition(".")[0] not in ("torch", "keepless", "runpy"):
            yield frame
        frame = frame.f_back


def _scopes() -> Iterator[Mapping[str, object]]:
    """Names of the main file, then of each function that runs."""
    yield vars(sys.modules["__main__"])
    for frame in _frames():
        if frame.f_code.co_flags & inspect.CO_NEWLOCALS:
            yield frame.f_locals


def _let_go(scopes: list[Mapping[str, object]]) -> None:
    """Before Python 3.13 a frame keeps the dict of its locals, which would hold a step's tensors."""
    for scope in scopes[1:]:
        if type(scope) is dict:
            scope.clear()


def _place() -> str:
    """File and line of the call that is being made: the innermost one outside of installed packages."""
    frames = list(_frames())
    own = [frame for frame in frames if not re.search(r"[\\/](site|dist)-packages[\\/]", frame.f_code.co_filename)]
    if not frames:
        return ""
    frame = (own or frames)[0]
    name = frame.f_code.co_filename
    if os.path.isabs(name) and name.startswith(os.path.join(os.getcwd(), "")):
        name = os.path.relpath(name)
    return f"{name}:{frame.f_lineno}"
