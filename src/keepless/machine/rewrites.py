"""Rewrites of a step that its owner may ask for, because they change more than where values stand.

`keepless.plan(..., rewrites=("optimizer_in_backward",))`. What a rewrite needs, and what it costs, is said here in the
words that messages and reports use; the rewriting itself is in `keepless.capture`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from keepless.errors import RewriteError

OPTIMIZER_IN_BACKWARD = "optimizer_in_backward"
CHUNKED_LOSS = "chunked_loss"


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One rewrite.

    Arguments:
        name: as it is asked for.
        is_exact: whether the step gives the same bits as without it.
        does: in a few words.
    """

    name: str
    is_exact: bool
    does: str

    @property
    def exactness(self) -> str:
        """ "same bits" or "not bitwise"."""
        return "same bits" if self.is_exact else "not bitwise"


REWRITES: Mapping[str, Rewrite] = {
    rewrite.name: rewrite
    for rewrite in (
        Rewrite(
            OPTIMIZER_IN_BACKWARD,
            True,
            "each parameter is updated as soon as its gradient is whole, and the gradient dropped",
        ),
        Rewrite(
            CHUNKED_LOSS,
            False,
            "logits, their loss and their gradient are made in chunks of rows, and never stand as a whole; sums round "
            "in another order, and logits are no output",
        ),
    )
}


def read_rewrites(names: object) -> tuple[str, ...]:
    """The rewrites of a caller's option or of a plan's signature, each once, in the table's order.

    Raises:
        RewriteError: it is no sequence of names, or one of them is unknown.
    """
    if names is None:
        return ()
    if isinstance(names, str) or not isinstance(names, (tuple, list, set, frozenset)):
        raise RewriteError(f'rewrites={names!r} is no sequence of names: rewrites=("{OPTIMIZER_IN_BACKWARD}",).')
    for name in names:
        if not isinstance(name, str) or name not in REWRITES:
            raise RewriteError(f"There is no rewrite {name!r}. Rewrites: {', '.join(REWRITES)}.")
    return tuple(name for name in REWRITES if name in names)


def describe_rewrites(names: tuple[str, ...]) -> list[str]:
    """A line for each rewrite of a plan."""
    return [f"rewrite {name} ({REWRITES[name].exactness}): {REWRITES[name].does}" for name in names]
