"""Maximum flows of scipy, whose capacities are 32-bit whole numbers: one place for that limit.

A network is its edges (`rows` to `cols`) with capacities; the sink is its highest node.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from keepless.solve.tables import Ints

INFINITE = 2**30
TOTAL = 2**29
"""What the finite capacities of a network may sum to."""
Capacities = npt.NDArray[np.int32]


def infinite(num: int) -> Capacities:
    """Capacities of edges that no cut may part; finite ones are written over them."""
    return np.full(num, INFINITE, np.int32)


def flow_value(rows: Ints, cols: Ints, capacities: Capacities, source: int, sink: int) -> int:
    """The maximum flow, which is the capacity of the minimum cut."""
    return int(maximum_flow(_network(rows, cols, capacities, sink), source, sink, method="dinic").flow_value)


def source_side(rows: Ints, cols: Ints, capacities: Capacities, source: int, sink: int) -> Ints:
    """The nodes on the source's side of the minimum cut nearest to the source."""
    network = _network(rows, cols, capacities, sink)
    residual = network - maximum_flow(network, source, sink, method="dinic").flow
    residual.data = np.maximum(residual.data, 0)
    residual.eliminate_zeros()
    reached: Ints = breadth_first_order(residual, source, return_predecessors=False)
    return reached


def _network(rows: Ints, cols: Ints, capacities: Capacities, sink: int) -> csr_matrix:
    return csr_matrix((capacities, (rows, cols)), shape=(sink + 1, sink + 1))
