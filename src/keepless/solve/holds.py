"""What a recomputed call holds, and a call that is kept does not: its inputs, and the generator's state.

A call that is kept lets go of an input that no backward reads when its code does. One that is recomputed holds it until
all that it saved is used up. Which of both it is, an order of ops decides; so each region begins with a
`keepless.hold` op that reads what would be held, and runs once more where that is let go, if the region runs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from keepless.ir import HOLD, Effect, Graph, Kind, Op, Phase, Value
from keepless.solve.regions import Region, RegionTree


def with_holds(
    graph: Graph, tree: RegionTree, inputs: Sequence[frozenset[int]], names: Sequence[str], state_nbytes: int
) -> tuple[Graph, RegionTree, list[int]]:
    """The graph with an op at each region's begin that reads what it holds; the regions in its ops; and for each op of
    the graph without holds its number in this one.

    Arguments:
        graph: of pieces.
        tree: its regions.
        inputs: for each region, values that a recompute holds.
        names: for each region, of the call.
        state_nbytes: of the generator's state that each recompute puts back; 0 where it takes no bytes of the device.
    """
    begins: dict[int, list[int]] = {}
    for number, region in enumerate(tree.regions):
        begins.setdefault(region.first, []).append(number)
    values = list(graph.values)
    ops: list[Op] = []
    place: list[int] = []
    holds: dict[int, int] = {}
    for op in graph.ops:
        for number in begins.get(op.id, ()):
            holds[number] = len(ops)
            state: tuple[int, ...] = ()
            if state_nbytes:
                state = (len(values),)
                name = f"{names[number]}.generator"
                values.append(Value(len(values), name, state_nbytes, Kind.RNG, "uint8", (state_nbytes,)))
            effects = frozenset({Effect.RNG}) if state else frozenset[Effect]()
            read = tuple(sorted(inputs[number]))
            ops.append(Op(len(ops), HOLD, read, state, Phase.FORWARD, effects, module=names[number], key=HOLD))
        place.append(len(ops))
        ops.append(replace(op, id=len(ops)))
    regions = tuple(Region(holds[number], place[region.last]) for number, region in enumerate(tree.regions))
    own = RegionTree(
        regions,
        tree.num_forward + len(holds),
        frozenset(place[op] for op in tree.saving),
        tuple(region.first for region in regions),
    )
    return Graph(tuple(ops), tuple(values), graph.inputs, graph.pinned), own, place


def spread_over(figures: Sequence[float], place: Sequence[int], count: int) -> list[float]:
    """Figures of the ops of the graph without holds as those of one with them, for which they are 0."""
    found = [0.0] * count
    for number, figure in zip(place, figures, strict=True):
        found[number] = figure
    return found
