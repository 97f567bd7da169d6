"""A plugin for pytest: puts another module's functions in the place of torch's checkpoint, and writes outcomes down.

Loaded before any test module, so that `from torch.utils.checkpoint import checkpoint` gets the substitute.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import types
from typing import Any

import pytest
import torch.utils.checkpoint

NAMES = ("checkpoint", "checkpoint_sequential")


def _substitute(name: str) -> None:
    """Every module of torch that holds torch's functions gets those of the module `name`."""
    stand_in = importlib.import_module(name)
    for function in NAMES:
        torchs, ours = getattr(torch.utils.checkpoint, function), getattr(stand_in, function)
        for module in [m for key, m in sys.modules.items() if key.partition(".")[0] == "torch"]:
            if vars(module).get(function) is torchs:
                setattr(module, function, ours)


if os.environ["UPSTREAM_SUBSTITUTE"]:
    _substitute(os.environ["UPSTREAM_SUBSTITUTE"])


def _write(case: str, word: str, error: str = "") -> None:
    with open(os.environ["UPSTREAM_LOG"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"case": case, "word": word, "error": error}) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only cases whose class, name or code says checkpoint; each is lost until it ends."""
    wanted = [item for item in items if _says_checkpoint(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(wanted)])
    items[:] = wanted
    for item in wanted:
        _write(item.nodeid, "lost", "its process ended first")


def _says_checkpoint(item: pytest.Item) -> bool:
    if "checkpoint" in item.nodeid.partition("::")[2].lower():
        return True
    code = getattr(inspect.unwrap(getattr(item, "function", None)), "__code__", None)
    return code is not None and _names_checkpoint(code)


def _names_checkpoint(code: types.CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return any(name in NAMES for name in code.co_names) or any(_names_checkpoint(item) for item in inner)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A part of a case, or one of its subtests, ended."""
    if report.when == "call" or report.outcome != "passed":
        _write(report.nodeid, report.outcome, "" if report.passed else _words(report))


def _words(report: Any) -> str:
    """The error's own words."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1])
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join((crash.message if crash is not None else str(report.longrepr)).split())[:400]
