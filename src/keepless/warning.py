"""Warnings that point at the caller's line, however deep in Keepless they are given."""

from __future__ import annotations

import os
import sys
import sysconfig
import warnings
from pathlib import Path

_OWN = str(Path(__file__).parent) + os.sep
_LIBRARY = sysconfig.get_paths()["stdlib"]
_INSTALLED = "site-packages"
"""Python's own library holds a folder of others."""


def warn_caller(text: str) -> None:
    """A `UserWarning` at the innermost line that led here and is none of Keepless', torch's or Python's own."""
    torch = sys.modules.get("torch")
    own = [_OWN] if torch is None or torch.__file__ is None else [_OWN, str(Path(torch.__file__).parent) + os.sep]

    def is_between(filename: str) -> bool:
        is_library = filename.startswith(_LIBRARY) and _INSTALLED not in filename
        return is_library or any(filename.startswith(folder) for folder in own)

    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and is_between(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
