"""Binomial schedules of the step's stages: where searches start that replays of single values do not lead to.

The schedule is in `classics.revolve`, with its source.
"""

from __future__ import annotations

from keepless.solve.classics.chain import chains, order_of
from keepless.solve.classics.revolve import binomial_cost, binomial_schedule
from keepless.solve.classics.trial import turned
from keepless.solve.front import front_of
from keepless.solve.lagrange import Woven
from keepless.solve.tables import Tables

_MOST_SLOTS = 24


def binomials(tables: Tables, most_runs: int) -> list[Woven]:
    """Schedules with few slots, over chains from fine to coarse, none of which has both a higher peak and more seconds
    than another; the lowest first. The captured order is among them or beaten.

    Arguments:
        most_runs: ops of an order at the most.
    """
    found = [Woven.judged(tables, tables.base.tolist())]
    base = turned(tables)
    for chain in chains(base):
        for slots in range(1, min(_MOST_SLOTS, chain.num) + 1):
            if binomial_cost(chain.num, slots) <= most_runs:
                order = order_of(base, chain, binomial_schedule(chain.num, slots), most_runs)
                if order is not None:
                    found.append(Woven.judged(tables, order))
        found = front_of(found, lambda woven: (woven.peak, woven.seconds))
    return sorted(found, key=lambda woven: woven.peak)
