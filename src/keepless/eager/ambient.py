"""The state around a call that changes what its ops do: autocast, default dtype, kernel switches, function modes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from keepless import _compat

Autocast = tuple[tuple[str, bool, torch.dtype], ...]


class Ambient:
    """What was around a region's forward. Equal surroundings in the backward cost a comparison."""

    __slots__ = ("autocast", "flags", "modes")

    def __init__(self) -> None:
        self.flags = _compat.ambient_flags()
        self.autocast: Autocast | None = _autocast() if _compat.any_autocast() else None
        self.modes = _modes()

    def is_now(self) -> bool:
        """Whether the surroundings are the same now."""
        return (
            self.autocast is None
            and not _compat.any_autocast()
            and _compat.ambient_flags() == self.flags
            and ((not self.modes and not _compat.num_function_modes()) or self._has_modes())
        )

    def _has_modes(self) -> bool:
        return _same(_modes(), self.modes)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The same surroundings around the block; what was there before is put back.

        Autocast's cache is off: a cast weight of the forward may be gone, and one cast here must not outlive this.
        """
        with contextlib.ExitStack() as stack:
            now = _compat.ambient_flags()
            if now != self.flags:
                _compat.set_ambient_flags(self.flags)
                stack.callback(_compat.set_ambient_flags, now)
            if self.autocast is not None or _compat.any_autocast():
                for device_type, enabled, dtype in self.autocast or _off():
                    stack.enter_context(
                        torch.amp.autocast(device_type, enabled=enabled, dtype=dtype, cache_enabled=False)
                    )
            if not _same(_modes(), self.modes):
                stack.enter_context(_compat.function_modes_replaced(self.modes))
            yield


def _modes() -> list[Any]:
    """The torch-function modes around this call, but for those that watch a region: they hold what it was given, and
    a region inside it would hold them."""
    return [mode for mode in _compat.function_mode_stack() if not getattr(mode, "watches_region", False)]


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _autocast() -> Autocast:
    return tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _compat.device_types()
    )


def _off() -> Autocast:
    return tuple((kind, False, torch.get_autocast_dtype(kind)) for kind in _compat.device_types())
