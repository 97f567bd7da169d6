"""The decisions of a plan as rows: by block, by module, and by value."""

from __future__ import annotations

from keepless.machine import Plan
from keepless.reporting.account import block_of
from keepless.reporting.decisions import Block, Choice, Decision, decisions
from keepless.reporting.page.data import FETCHED, KEPT, RECOMPUTED, DecisionRow, Decisions

MOST_VALUES = 1500
"""Rows of single values; the smallest are left out of a longer table."""
_WAY = {Choice.KEPT: KEPT, Choice.RECOMPUTED: RECOMPUTED, Choice.MOVED: FETCHED}


def decision_rows(plan: Plan, most: int = MOST_VALUES) -> Decisions:
    """The rows of all three tables.

    Arguments:
        most: rows of single values.
    """
    modules = decisions(plan, str)
    values = [_of_value(one) for module in modules for one in module.decisions]
    largest = sorted(range(len(values)), key=lambda i: (-sum(values[i].ways.values()), i))[:most]
    return Decisions(
        blocks=tuple(_of_block(block, block.name) for block in decisions(plan)),
        modules=tuple(_of_block(module, block_of(module.name)) for module in modules),
        values=tuple(values[i] for i in sorted(largest)),
        num_hidden=len(values) - len(largest),
    )


def _of_block(block: Block, module: str) -> DecisionRow:
    fetched = sum(one.nbytes for one in block.decisions if one.choice is Choice.MOVED)
    ways = {KEPT: block.kept_nbytes, RECOMPUTED: block.recomputed_nbytes, FETCHED: fetched}
    return DecisionRow(
        name=block.name,
        module=module,
        op="",
        source="",
        ways={way: nbytes for way, nbytes in ways.items() if nbytes},
        num_values=len(block.decisions),
        replays=block.replays,
        seconds=block.seconds,
        reason=block.reason,
    )


def _of_value(one: Decision) -> DecisionRow:
    return DecisionRow(
        name=one.name,
        module=one.module,
        op=one.op,
        source=one.source,
        ways={_WAY[one.choice]: one.nbytes} if one.nbytes else {},
        num_values=1,
        replays=one.times,
        seconds=one.seconds,
        reason=one.reason,
    )
