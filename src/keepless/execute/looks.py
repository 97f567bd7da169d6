"""Which views of a step are one and the same.

A backward turns around what the forward turned: `t(t(x))`, a view of a view with the first one's shape, `detach` of
`detach`. Each such call costs a microsecond or two, ten where the caches are cold, and gives a tensor that there is.
"""

from __future__ import annotations

import torch

from keepless.binding import Binding

aten = torch.ops.aten

_MAPS = frozenset(
    {
        aten._unsafe_view.default,
        aten.alias.default,
        aten.detach.default,
        aten.expand.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.dim,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
"""Views that place each element of theirs at one of their source's, whatever the source's strides are."""

Look = tuple[int, tuple[int, ...], tuple[int, ...], int]
"""Of a slot: the slot that its chain of views begins at, sizes, strides and offset."""


class Looks:
    """Compares slots of a binding."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._known: dict[int, Look | None] = {}

    def same(self, one: int, other: int) -> bool:
        """Whether two slots are the same elements of one tensor, in the same layout."""
        look = self._of(one)
        return look is not None and look == self._of(other)

    def _of(self, slot: int) -> Look | None:
        """None where it is not known how a slot looks at its source."""
        views, known, chain = self._binding.views, self._known, [slot]
        while chain[-1] in views and chain[-1] not in known:
            chain.append(views[chain[-1]].source)
        for each in reversed(chain):
            if each not in known:
                known[each] = self._found(each)
        return known[slot]

    def _found(self, slot: int) -> Look | None:
        view = self._binding.views.get(slot)
        before = self._known[view.source] if view is not None else None
        if view is not None and (before is None or view.item is not None or view.call.target not in _MAPS):
            return None
        example = self._binding.examples[slot]
        layout = tuple(example.size()), tuple(example.stride()), int(example.storage_offset())
        return (slot if before is None else before[0], *layout)
