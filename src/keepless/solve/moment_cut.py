"""The bound of one moment by minimum cuts: for graphs that are too large for the linear program of `moments`.

With one moment and a price l per byte, the relaxation is a minimum cut (values are kept or their producers run again):

    seconds again >= min over cuts (l * bytes + seconds) - l * (limit - other bytes)

for any l, and the right side is concave in l: a golden-section search finds its top. A cut of a graph with 30,000 ops
takes a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from keepless.solve.flow import TOTAL, flow_value, infinite
from keepless.solve.moments import Bound, Relaxation

_STEPS = 18


def cut_bound(relaxation: Relaxation, limit: int, op: int, price: float | None = None) -> Bound:
    """The bound of one moment.

    Arguments:
        limit: bytes.
        op: from the LOSS op on.
        price: of a byte, in seconds; None for the best one.
    """
    moment = relaxation.moment(op)
    slack = limit - moment.other
    dual, unit = _dual(relaxation, op)
    if slack < 0 or dual is None:
        return Bound(0.0, {})
    if price is None:
        exponent = _top(lambda x: dual(unit * 10**x) - unit * 10**x * slack)
        price = unit * 10**exponent
    return Bound(max(dual(price) - price * slack, 0.0), {op: price})


def _top(function: Callable[[float], float]) -> float:
    """Where a concave function is highest between -9 and 3."""
    low, high, ratio = -9.0, 3.0, (5**0.5 - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    found = [function(x) for x in inner]
    for _ in range(_STEPS):
        if found[0] >= found[1]:
            high, inner[1], found[1] = inner[1], inner[0], found[0]
            inner[0] = high - ratio * (high - low)
            found[0] = function(inner[0])
        else:
            low, inner[0], found[0] = inner[0], inner[1], found[1]
            inner[1] = low + ratio * (high - low)
            found[1] = function(inner[1])
    return inner[int(found[1] > found[0])]


def _dual(relaxation: Relaxation, op: int) -> tuple[Callable[[float], float] | None, float]:
    """The least of price * bytes + seconds over all cuts, as a function of the price; and a typical price."""
    network = relaxation.network(op)
    keep, again = network.keep, network.again
    if not keep.sum():
        return None, 0.0

    def value(price: float) -> float:
        priced = np.minimum(keep * price, again.sum())
        scale = TOTAL / max(float(priced.sum() + again.sum()), 1e-30)
        capacities = infinite(len(network.rows))  # finite ones round down: the bound stays true
        capacities[: len(keep)] = (priced * scale).astype(np.int32)
        capacities[len(keep) : len(keep) + len(again)] = (again * scale).astype(np.int32)
        return flow_value(network.rows, network.cols, capacities, network.source, network.sink) / scale

    return value, float(again.sum() + 1e-12) / float(keep.sum())
