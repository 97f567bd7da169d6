"""Where black boxes go, and how they are written and read."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from keepless.errors import PlanError
from keepless.files import write_whole
from keepless.reporting.black_box import FORMAT, VERSION

ENVIRONMENT = "KEEPLESS_BLACK_BOX"
"""Names the folder where `black_box=` does not."""
MOST_FILES = 50
"""Of one model; what fails later is not written down."""
MOST_NBYTES = 64 * 2**20
"""A file that is larger is not read."""
_number = itertools.count(1)


def folder_of(black_box: str | os.PathLike[str] | None) -> Path:
    """The folder: as it is given, or as the environment says, or the current one."""
    return Path(black_box if black_box is not None else os.environ.get(ENVIRONMENT) or ".")


def write_black_box(folder: Path, document: Mapping[str, object]) -> str:
    """Writes one file, all of it or nothing, and gives its path; empty, with a warning, where that does not work."""
    now = datetime.now(timezone.utc)
    whole = {"format": FORMAT, "version": VERSION, "time": now.isoformat(timespec="seconds"), **document}
    target = folder / f"keepless-oom-{now:%Y%m%d-%H%M%S}-{os.getpid()}-{next(_number)}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(target, (json.dumps(whole) + "\n").encode())
    except (OSError, ValueError, TypeError, MemoryError) as error:
        warnings.warn(f"A black box could not be written to {folder}: {error}", stacklevel=2)
        return ""
    return str(target)


def is_black_box(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as black boxes do, of whatever version."""
    with open(path, "rb") as file:
        return f'"format": "{FORMAT}"'.encode() in file.read(256)


def read_black_box(path: str | os.PathLike[str]) -> dict[str, object]:
    """A black box from its file.

    Raises:
        PlanError: it is none, is damaged, or is of another version.
        OSError: the file cannot be read.
    """
    if os.path.getsize(path) > MOST_NBYTES:
        raise PlanError(f"{os.fspath(path)} is larger than any black box.")
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{os.fspath(path)} is no black box: {error}.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PlanError(f"{os.fspath(path)} is no black box.")
    if document.get("version") != VERSION:
        raise PlanError(
            f"{os.fspath(path)} is a black box of version {document.get('version')!r}; this reads {VERSION}."
        )
    return document
