"""What a shell is offered for a word that is being typed. Needs no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop", "adagrad", "none")
DTYPES = ("float32", "bfloat16", "float16", "float64")
ENGINES = ("auto", "graph", "blocks", "eager")
REWRITES = ("optimizer_in_backward", "chunked_loss")
EXPORTS = ("names", "every-n-layers", "selective")
ON_OOM = ("survive", "raise")
_MOST = 200


def _among(names: Iterable[str], begun: str) -> list[str]:
    return [name for name in names if name.startswith(begun)]


def optimizers(incomplete: str) -> list[str]:
    """Of `--optimizer`."""
    return _among(OPTIMIZERS, incomplete)


def dtypes(incomplete: str) -> list[str]:
    """Of `--dtype`."""
    return _among(DTYPES, incomplete)


def engines(incomplete: str) -> list[str]:
    """Of `--engine`."""
    return _among(ENGINES, incomplete)


def on_oom(incomplete: str) -> list[str]:
    """Of `--on-oom`."""
    return _among(ON_OOM, incomplete)


def exports(incomplete: str) -> list[str]:
    """Of `show --export`."""
    return _among(EXPORTS, incomplete)


def rewrites(incomplete: str) -> list[str]:
    """Of `--rewrite`."""
    return _among(REWRITES, incomplete)


def solvers(incomplete: str) -> list[str]:
    """Of `--solver`."""
    from keepless.solve import SOLVERS

    return _among(sorted(SOLVERS), incomplete)


def devices(incomplete: str) -> list[str]:
    """Of `--device`: devices of torch's, and the table of those that can be planned for."""
    from keepless.cost import known_devices

    return _among(("cpu", "cuda", "meta", *known_devices()), incomplete)


def files(incomplete: str, endings: tuple[str, ...] = ()) -> list[str]:
    """Files and folders that a path may go on to.

    Arguments:
        endings: of files' names; none for all.
    """
    folder, _, begun = incomplete.rpartition("/")
    home = Path(folder or ("/" if incomplete.startswith("/") else "."))
    found: list[str] = []
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(home), key=lambda one: one.name):
            if not entry.name.startswith(begun) or (entry.name.startswith(".") and not begun):
                continue
            path = f"{incomplete[: len(incomplete) - len(begun)]}{entry.name}"
            if entry.is_dir():
                found.append(f"{path}/")
            elif not endings or entry.name.endswith(endings):
                found.append(path)
    return found[:_MOST]


def plan_files(incomplete: str) -> list[str]:
    """Of plan files and black boxes."""
    return files(incomplete, (".plan", ".json"))


def scripts(incomplete: str) -> list[str]:
    """Of `keepless run`."""
    return files(incomplete, (".py",))


def models(incomplete: str) -> list[str]:
    """Of models: `hf:` with a config, `module:` of a Python file here, and the functions in it."""
    if incomplete.startswith("hf:"):
        return [f"hf:{path}" for path in files(incomplete[3:], (".json",))]
    name, colon, begun = incomplete.partition(":")
    if colon:
        return [f"{name}:{function}" for function in _functions(name) if function.startswith(begun)]
    folder, dot, last = name.rpartition(".")
    home = Path(*folder.split(".")) if folder else Path()
    found: list[str] = []
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(home or "."), key=lambda one: one.name):
            stem = entry.name.removesuffix(".py")
            if not stem.startswith(last) or not stem.isidentifier() or stem.startswith("__"):
                continue
            if entry.is_dir() and (home / stem / "__init__.py").is_file():
                found.append(f"{folder}{dot}{stem}.")
            elif entry.name.endswith(".py"):
                found.append(f"{folder}{dot}{stem}:")
    return _among(["hf:"], incomplete) + found[:_MOST]


def _functions(module: str) -> list[str]:
    """The functions that a module's file defines, read and not run."""
    import ast

    path = Path(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        with contextlib.suppress(OSError, SyntaxError, ValueError):
            tree = ast.parse(file.read_bytes())
            return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    return []
