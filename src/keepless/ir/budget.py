"""Budgets: bytes per tier, read from what people write.

`"8GiB"` is 8 * 2**30 bytes and `"8GB"` is 8 * 10**9; an int is bytes; a float in (0, 1] is a fraction of the device.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from keepless.errors import BudgetError

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_TEXT = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})\s*([a-zA-Z]*)\s*")
_HELP = 'Write it as "8GiB" (2**30), "8GB" (10**9), an int of bytes, or a float in (0, 1] for a share of the device.'
MAX_NBYTES = 2**60
"""Above any machine; larger numbers in a file or an argument are a mistake."""


def parse_bytes(budget: object, *, device_nbytes: int | None = None, name: str = "The budget ") -> int:
    """Bytes that a budget means.

    Arguments:
        budget: text with a unit, an int of bytes, or a float in (0, 1] as a share of the device.
        device_nbytes: bytes of the device, needed for a share.
        name: what errors call it; its value follows.

    Raises:
        BudgetError: the budget cannot be read, is not positive, or is beyond any machine.
    """
    if isinstance(budget, bool):
        raise BudgetError(f"{name}{budget!r} is a bool, not a number of bytes. {_HELP}")
    if isinstance(budget, str):
        nbytes = _parse_text(budget, name)
    elif isinstance(budget, float):
        if not (math.isfinite(budget) and 0 < budget <= 1):
            raise BudgetError(f"{name}{budget!r} is a float outside (0, 1]. {_HELP}")
        if device_nbytes is None:
            raise BudgetError(f"{name}{budget!r} is a share of the device, and the device's size is not known.")
        nbytes = int(budget * device_nbytes)
    else:
        try:
            nbytes = operator.index(budget)  # type: ignore[arg-type]  # ints, numpy's too; whatever else has one
        except TypeError:
            raise BudgetError(
                f"{name}{budget!r} is of type {type(budget).__name__}, not a number of bytes. {_HELP}"
            ) from None
    if not 0 < nbytes <= MAX_NBYTES:
        raise BudgetError(f"{name}{budget!r} is {nbytes} bytes; it must be between 1 and 2**60. {_HELP}")
    return nbytes


def _parse_text(text: str, name: str) -> int:
    match = _TEXT.fullmatch(text) if len(text) <= 64 else None
    unit = match.group(2).lower() if match else ""
    if match is None or (unit and unit not in _UNITS):
        raise BudgetError(f"{name}{text[:64]!r} cannot be read. {_HELP}")
    if not unit:
        raise BudgetError(f"{name}{text!r} has no unit. {_HELP}")
    return int(float(match.group(1)) * _UNITS[unit])


def format_bytes(nbytes: float) -> str:
    """Bytes as people read them, in binary units: "1.50 GiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


@dataclass(frozen=True)
class Budget:
    """What a plan may use.

    Arguments:
        limits: bytes per tier; a tier that is not named may not be used.
        reserve: bytes of the device's limit that stay free for the allocator.
        max_rel_error: largest relative error of a gradient; 0 means lossless.
    """

    limits: Mapping[str, int] = field(default_factory=dict)
    reserve: int = 0
    max_rel_error: float = 0.0

    @property
    def device(self) -> int:
        """Bytes that a program may have on the device at once."""
        return self.limits["device"] - self.reserve
