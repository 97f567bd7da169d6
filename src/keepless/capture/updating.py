"""Where an optimizer may update a parameter in the backward: behind everything that could still want its old values.

That is the last op of the backward that reads the parameter, or anything that a replay would make from it. A replay
makes values again from any that stand, so that "made from it" means: by a chain of forward ops that may run again, from
the parameter on. Ops of the backward that read such values run once, so that no chain leads through them. No order of
such a graph needs a parameter after its update; that none reads it is rule R3.
"""

from __future__ import annotations

from keepless.capture.drafting import Draft, Drafting, draft_slots
from keepless.ir import RUNS_ONCE, Effect


def last_needs(work: Drafting, backward: list[Draft]) -> dict[int, int]:
    """Per parameter's value, the last position of the backward that may want it; O(edges), sets as bits of an int.

    Drafts of the backward that read what is made from parameters are marked to run once.
    """
    parameters = sorted({work.slot_value[slot] for slot in work.params.values()})
    made_from = {value: 1 << bit for bit, value in enumerate(parameters)}

    def wanted(draft: Draft) -> int:
        bits = 0
        for value in {work.slot_value[slot] for slot in draft_slots(draft)} | set(draft.extra_inputs):
            bits |= made_from.get(value, 0)
        return bits

    for draft in work.forward:
        bits = 0 if draft.effects & RUNS_ONCE else wanted(draft)
        for _, slot in draft.outputs:
            value = work.slot_value[slot]
            made_from[value] = made_from.get(value, 0) | bits
    last = dict.fromkeys(parameters, -1)
    seen = 0
    for position in range(len(backward) - 1, -1, -1):
        bits = wanted(backward[position])
        if bits:
            backward[position].effects.add(Effect.OPAQUE)
        new = bits & ~seen
        seen |= new
        while new:
            last[parameters[(new & -new).bit_length() - 1]] = position
            new &= new - 1
    return last
