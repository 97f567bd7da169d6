"""The ops of both runs of a region, for the message of a recompute that went another way."""

from __future__ import annotations

import itertools
from typing import Any

from keepless import _compat
from keepless.eager.calls import tensors_in
from keepless.eager.failures import CheckpointError


class OpLog(_compat.WatchingMode):
    """Lists the ops that run, with the shapes of their tensors and the source line that called them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_in(args))
        self.lines.append((f"{func}({shapes})", _compat.caller_source()))
        return func(*args, **(kwargs or {}))


class OpLogs:
    """Two logs, and the error that shows them."""

    def __init__(self) -> None:
        self.forward, self.again = OpLog(), OpLog()

    def explain(self, error: CheckpointError) -> None:
        """Raises the error with both lists of ops and the first that differs."""
        ran = [line for line, _ in self.again.lines]
        pairs = itertools.zip_longest((line for line, _ in self.forward.lines), ran)
        differs = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        if differs is None or differs >= len(ran):
            first = "the recompute's ops are the forward's first ones"
        else:
            first = f"op {differs} differs first"
        raise CheckpointError(
            f"{error}\n\n{first}\n\nforward:\n{_listed(self.forward)}\n\nrecompute:\n{_listed(self.again)}"
        ) from error


def _listed(log: OpLog) -> str:
    return "\n".join(f"{i:5d}  {line}  {source}".rstrip() for i, (line, source) in enumerate(log.lines))
