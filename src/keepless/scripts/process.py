"""A script or module as `python` runs it: `__main__`, `sys.argv`, `sys.path[0]`, exit status, tracebacks.

Torch is not imported here: a script may set what torch reads when it is loaded (threads, devices).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

from keepless.errors import KeeplessError

INTERRUPTED = 130


@dataclass(frozen=True)
class Ended:
    """How a script ended.

    Arguments:
        code: its exit status.
        by_exit: it asked to end.
        error: of Keepless, that ended it and that nothing was printed about.
    """

    code: int
    by_exit: bool = False
    error: KeeplessError | None = None


class _Importing(MetaPathFinder):
    """Calls something when a module has been imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """See `importlib`."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(fullname)
        if found is not None and found.loader is not None:
            own: Callable[[Any], None] = found.loader.exec_module

            def exec_module(module: Any) -> None:
                own(module)
                self.then()

            found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found


@contextlib.contextmanager
def when_imported(name: str, then: Callable[[], None]) -> Iterator[None]:
    """Calls `then` once a module is there: now, or when the block imports it."""
    if name in sys.modules:
        then()
        yield
        return
    finder = _Importing(name, then)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(finder)


def run_script(path: Path, arguments: Sequence[str], ours: Callable[[KeeplessError], bool]) -> Ended:
    """Runs a file as `python FILE ARGUMENTS`.

    Arguments:
        ours: told of an error of Keepless that ends the script; True where its traceback is not to be printed.

    Raises:
        OSError: it cannot be read.
        SyntaxError: it is no Python.
    """
    name = os.path.abspath(path)
    with io.open_code(name) as file:
        source = file.read()
    module = types.ModuleType("__main__")
    module.__dict__.update(
        __file__=name, __builtins__=__builtins__, __loader__=SourceFileLoader("__main__", name), __spec__=None
    )
    sys.argv[:] = [str(path), *arguments]
    sys.path[0:0] = [str(Path(os.path.realpath(path)).parent)]
    sys.modules["__main__"] = module

    def run() -> None:
        exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)

    return _status(run, ours)


def run_module(name: str, arguments: Sequence[str], ours: Callable[[KeeplessError], bool]) -> Ended:
    """Runs a module as `python -m NAME ARGUMENTS`. Arguments as for `run_script`."""
    sys.argv[:] = [name, *arguments]
    sys.path[0:0] = [os.getcwd()]
    return _status(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True), ours)


def _status(run: Callable[[], object], ours: Callable[[KeeplessError], bool]) -> Ended:
    try:
        run()
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return Ended(leaving.code or 0, by_exit=True)
        print(leaving.code, file=sys.stderr)
        return Ended(1, by_exit=True)
    except BaseException as error:
        if isinstance(error, KeeplessError) and ours(error):
            return Ended(1, error=error)
        _show(error)
        return Ended(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)
    return Ended(0)


def _show(error: BaseException) -> None:
    """The traceback as python prints it: without the frames that stand around the script."""
    for one in _chain(error):
        one.__traceback__ = _within(one.__traceback__)
    if sys.excepthook is sys.__excepthook__:
        traceback.print_exception(error)
    else:
        sys.excepthook(type(error), error, error.__traceback__)


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and one not in found:
            found.append(one)
            left += [one.__cause__, one.__context__]
    return found


def _within(trace: types.TracebackType | None) -> types.TracebackType | None:
    """A traceback from the first frame on that is not of this file."""
    start = trace
    while start is not None and start.tb_frame.f_code.co_filename == __file__:
        start = start.tb_next
    return start
