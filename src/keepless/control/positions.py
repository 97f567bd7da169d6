"""Tables that are read beyond their end: learned positions of a model that gets a longer text than it has them for.

Fake tensors have no data, so that a capture lets an index pass whatever it is. Positions come of nothing but numbers,
though (`torch.arange`, and what is made of it): these few ops are run, and their results compared with the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from keepless.binding import Binding, Ref, map_refs, slots_of
from keepless.errors import PositionError

_MOST = 1 << 20
"""Elements of a tensor that is made here."""


@dataclass(frozen=True, slots=True)
class Beyond:
    """A table that is read beyond its end.

    Arguments:
        rows: that it has.
        wanted: the row that is asked for.
        where: the op.
    """

    rows: int
    wanted: int
    where: str

    def __str__(self) -> str:
        return f"row {self.wanted} of a table of {self.rows} rows is read at {self.where}"


def read_beyond(binding: Binding) -> Beyond | None:
    """The first embedding of a step whose indices, made of numbers alone, are beyond its table. O(ops)."""
    made = _Made(binding)
    for op, code in zip(binding.graph.ops, binding.ops, strict=True):
        if code is None or code.call.target is not torch.ops.aten.embedding.default:
            continue
        table, index = code.call.args[:2]
        found = made.tensor(index.slot) if isinstance(index, Ref) else None
        rows = binding.examples[table.slot].shape[0]
        if found is not None and found.numel() and int(found.max()) >= rows:
            return Beyond(rows, int(found.max()), binding.graph.where(op))
    return None


def check_positions(binding: Binding) -> None:
    """Refuses a step in which a table is read beyond its end: it would fail where it first runs.

    Raises:
        PositionError: names the table's rows, and the row that is asked for.
    """
    beyond = read_beyond(binding)
    if beyond is not None:
        raise PositionError(
            f"The batch is too long for a table of the model: {beyond}. Give shorter rows, or a model with more "
            "positions; keepless.max_length finds the longest that it takes."
        )


class _Made:
    """The tensors of a step that are made of numbers alone."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._known: dict[int, torch.Tensor | None] = {}
        self._made_by = {
            slot: (code.call, position)
            for code in binding.ops
            if code is not None and code.state is None
            for position, slot, _ in code.outputs
        }

    def tensor(self, slot: int) -> torch.Tensor | None:
        """The slot's tensor, on the CPU; None where it depends on more than numbers, or is large."""
        if slot not in self._known:
            self._known[slot] = None  # what would need itself is not known
            self._known[slot] = self._make(slot)
        return self._known[slot]

    def _make(self, slot: int) -> torch.Tensor | None:
        example = self._binding.examples[slot]
        if example.is_floating_point() or example.is_complex() or example.numel() > _MOST:
            return None
        if slot in self._binding.constants:
            return self._binding.constants[slot].cpu()
        if slot in self._binding.views:
            view = self._binding.views[slot]
            call, position = view.call, view.item
        elif slot in self._made_by:
            call, position = self._made_by[slot]
        else:
            return None
        if getattr(call.target, "namespace", "") != "aten":  # what it does beside computing is not known
            return None
        given = {one: self.tensor(one) for one in slots_of(call)}
        if any(tensor is None for tensor in given.values()):
            return None
        kwargs: dict[str, Any] = map_refs(dict(call.kwargs), given.__getitem__)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        try:
            with torch.no_grad():
                found = call.target(*map_refs(call.args, given.__getitem__), **kwargs)
        except Exception:  # of any kind, from an op that was never asked to run here: then nothing is known
            return None
        found = found if position is None else found[position]
        return found if isinstance(found, torch.Tensor) else None
