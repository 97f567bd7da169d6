"""Modes that look at the ops which run."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode


class WatchingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that looks, and changes nothing that others do.

    Higher-order ops (flex attention) come to it like all others: torch raises on those under a mode that does not say
    so. Compiled code stays compiled, and what goes on inside of it is not seen: where a mode does not say so, torch
    runs the code as it is written, and raises where it must be compiled as a whole.

    Torch's class has no types: its calls are left unchecked here, and nowhere else.
    """

    supports_higher_order_operators = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """For torch."""
        return True
