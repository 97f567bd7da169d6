"""Costs of ops on disk, so that a second plan on the same device needs no trials.

One text file per environment (device, torch, threads, switches), one JSON object per line, appended in one write.
Several processes may append at once; a line that cannot be read is skipped with a warning and measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from keepless.ir.budget import MAX_NBYTES
from keepless.measure.device import describe_device

_FORMAT = "v6"
_STORED = ("seconds", "scratch", "spread", "n", "launch")
_MAX_FILE_NBYTES = 64 * 2**20
"""A larger file is not ours, or is mostly duplicates: it is started afresh."""


@dataclass(frozen=True, slots=True)
class OpCost:
    """What one run of an op costs.

    Arguments:
        seconds: median of the runs, the least where they were disturbed; on CPU nearer to those with emptied caches.
        scratch: bytes beyond the outputs while the op runs.
        spread: relative spread of the seconds (p80 / p20 - 1).
        n: number of timed runs.
        disturbed: other processes had the cores in every run: the seconds are too long by an unknown factor.
        launch: seconds that the host takes to start it, on a device that runs beside the host; 0.0 elsewhere.
    """

    seconds: float
    scratch: int
    spread: float
    n: int
    disturbed: bool = False
    launch: float = 0.0


def cache_folder() -> Path:
    """$KEEPLESS_CACHE_DIR, else keepless under $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("KEEPLESS_CACHE_DIR")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "keepless"


class CostCache:
    """Measured costs, remembered between processes.

    Arguments:
        path: folder of the files; None for `cache_folder()`.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(path) if path is not None else cache_folder()
        self._known: dict[str, dict[str, OpCost]] = {}

    def load(self, device: torch.device | str, keys: Iterable[str]) -> dict[str, OpCost]:
        """Costs known for these keys on this device as it is set up now; other keys are left out."""
        known = self._table(self._file(device))
        found = {key: known.get(_digest(key)) for key in keys}
        return {key: cost for key, cost in found.items() if cost is not None}

    def store(self, device: torch.device | str, costs: Mapping[str, OpCost]) -> None:
        """Remember costs. A folder that cannot be written is a warning, not an error."""
        if not costs:
            return
        file = self._file(device)
        known = self._table(file)
        rows = {_digest(key): cost for key, cost in costs.items()}
        known.update(rows)
        lines = [json.dumps({"key": key, **{name: getattr(c, name) for name in _STORED}}) for key, c in rows.items()]
        # The leading newline ends a line that another process may have left torn.
        text = "\n" + "\n".join([json.dumps({"environment": describe_device(device)}), *lines]) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(handle, text.encode())
            finally:
                os.close(handle)
        except OSError as error:
            warnings.warn(f"The costs of ops could not be stored in {file}: {error}", stacklevel=2)

    def clear(self, device: torch.device | str) -> None:
        """Forget everything about this device as it is set up now."""
        file = self._file(device)
        self._known.pop(file.name, None)
        file.unlink(missing_ok=True)

    def _file(self, device: torch.device | str) -> Path:
        facts = json.dumps(describe_device(device), sort_keys=True)
        return self.folder / f"costs-{_FORMAT}-{_digest(facts)[:16]}.jsonl"

    def _table(self, file: Path) -> dict[str, OpCost]:
        if file.name not in self._known:
            self._known[file.name] = _read(file)
        return self._known[file.name]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, OpCost]:
    try:
        if file.stat().st_size > _MAX_FILE_NBYTES:
            file.unlink()
            return {}
        data = file.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        warnings.warn(f"The cost cache {file} cannot be read and is ignored: {error}", stacklevel=4)
        return {}
    table: dict[str, OpCost] = {}
    num_bad = 0
    for line in data.splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "environment" not in row:
                table[_text(row["key"])] = _cost(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            num_bad += 1
    if num_bad:
        warnings.warn(f"{num_bad} lines of the cost cache {file} cannot be read and are ignored.", stacklevel=4)
    return table


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _cost(row: Mapping[str, object]) -> OpCost:
    seconds, scratch, spread, n, launch = numbers = tuple(row[name] for name in _STORED)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError("not a number")
        if not (math.isfinite(number) and 0 <= number <= MAX_NBYTES):
            raise ValueError("outside the range")
    assert isinstance(seconds, (int, float))
    assert isinstance(spread, (int, float))
    assert isinstance(launch, (int, float))
    if not isinstance(scratch, int) or not isinstance(n, int):
        raise TypeError("not a whole number")
    return OpCost(float(seconds), scratch, float(spread), n, launch=float(launch))
