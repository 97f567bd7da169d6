"""How often regions ran, were run again, or could not be."""

from __future__ import annotations

import dataclasses
import threading


@dataclasses.dataclass
class Counters:
    """Counts since the start of the process or the last `reset`.

    Attributes:
        regions: calls of checkpointed regions that will be recomputed.
        watched: of these, the calls that were watched (a region's first, and each where its path varies).
        recomputes: runs again in a backward.
        direct: calls under a torch.func transform or forward-mode AD, which ran as they are and saved as they do.
    """

    regions: int = 0
    watched: int = 0
    recomputes: int = 0
    direct: int = 0


_counters = Counters()
_lock = threading.Lock()


def count(name: str) -> None:
    """Adds one."""
    with _lock:
        setattr(_counters, name, getattr(_counters, name) + 1)


def checkpoint_counters() -> Counters:
    """A copy of the counts."""
    with _lock:
        return dataclasses.replace(_counters)


def reset_checkpoint_counters() -> None:
    """Sets all counts to zero."""
    with _lock:
        for field in dataclasses.fields(_counters):
            setattr(_counters, field.name, 0)
