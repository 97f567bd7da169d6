"""The two products of a linear layer's backward, in the order whose peak is lower.

Autograd makes the gradient of the input first, while the input still stands for the gradient of the weight. The other
way round the input goes before its own gradient comes. Neither product reads the other's, and both stand in the end:
bits are the same, and no byte is lost by it.
"""

from __future__ import annotations

import torch

from keepless.capture.drafting import Draft, Drafting, draft_slots

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)


def lower_first(work: Drafting, backward: list[Draft]) -> list[Draft]:
    """The ops of a backward with neighbouring products of one gradient swapped where the pair's peak is lower so."""
    ordered = list(backward)
    reads = [{work.slot_value[slot] for slot in draft_slots(draft)} - work.resident for draft in ordered]
    last = {value: position for position, values in enumerate(reads) for value in values}
    for position in range(len(ordered) - 1):
        pair = ordered[position : position + 2]
        if any(draft.call is None or draft.call.target not in _PRODUCTS or draft.effects for draft in pair):
            continue
        mine, other = reads[position : position + 2]
        made, made_after = (_made(work, draft) for draft in pair)
        if made & other or not mine & other:
            continue
        # What only one of them reads goes behind it, what both read behind the pair.
        gone = {value for value in mine - other if last[value] == position}
        gone_after = {value for value in other - mine if last[value] == position + 1}
        first, second = _nbytes(work, made), _nbytes(work, made_after)
        as_it_is = max(first, first - _nbytes(work, gone) + second)
        swapped = max(second, second - _nbytes(work, gone_after) + first)
        if swapped < as_it_is:
            ordered[position : position + 2] = pair[::-1]
            reads[position : position + 2] = [other, mine]
            last |= dict.fromkeys(gone, position + 1) | dict.fromkeys(gone_after, position)
    return ordered


def _made(work: Drafting, draft: Draft) -> set[int]:
    return {work.slot_value[slot] for _, slot in draft.outputs}


def _nbytes(work: Drafting, values: set[int]) -> int:
    return sum(work.values[value].nbytes for value in values)
