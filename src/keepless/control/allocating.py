"""Plans whose *reserved* bytes fit: on CUDA the budget bounds what torch's allocator holds from the card.

The allocator's model (`keepless.machine.allocation`) tells for a program what is reserved. What that is beyond the
bytes of the program's tensors cannot be known before there is a program, so it is found in rounds: plan, model, and
where too much is reserved, plan again for so many bytes less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from keepless.control.reserve import default_reserve, with_reserve
from keepless.cost import CostModel
from keepless.errors import InfeasibleBudget
from keepless.ir import Graph, Program, format_bytes
from keepless.machine import Allocation, Baseline, Plan, model_allocation
from keepless.machine.allocation import EXPANDABLE
from keepless.machine.allocator import LARGE_SEGMENT
from keepless.measure.card import CardAllocator
from keepless.passes import from_order, reuse_storage
from keepless.reporting.floor import describe_floor, find_floor

MARGINS = (0, LARGE_SEGMENT // 2, 2 * LARGE_SEGMENT)
"""Bytes by which each further plan is made less, beyond what those before it were seen to need: the next program is
fragmented in another way. Programs of a GPT-2 of 6 layers reserved 38 to 75 MiB beyond their peaks. After these plans
comes the one of the smallest peak.
"""

SLACK = 4096
"""Bytes by which a budget for a stated smallest peak is larger than that: shares are rounded."""


def allocation_of(graph: Graph, program: Program, cost: CostModel, card: CardAllocator) -> Allocation:
    """What a card's allocator takes for a program."""
    found = model_allocation(graph, program, cost, workspaces=card.workspaces, expandable=card.expandable)
    return replace(found, context=card.context)


def within_card(
    make: Callable[[int], Plan], lowest: Callable[[], Plan] | None, nbytes: int, card: CardAllocator
) -> Plan:
    """A plan whose reserved bytes, and the default reserve beside them, are within a budget.

    Its signature holds the allocation; its baseline and its smallest budget are those of reserved bytes.

    Arguments:
        make: the plan for the budget less so many bytes beside the default reserve.
        lowest: the plan of the smallest peak that is known; None where there is no other than `make`'s.
        nbytes: the budget.

    Raises:
        InfeasibleBudget: none of the plans tried has so few reserved bytes; says how many the last one needs.
    """
    plan, allocation, lowest = _first_that_fits(make, lowest, nbytes, card)
    needed = with_reserve(allocation.reserved)
    if needed > nbytes:
        graph = plan.graph
        floor = find_floor(graph, plan.cost, plan.program)
        helps = [*floor.advice, f"a budget of {needed} bytes"]
        if not card.expandable:
            helps.insert(0, "PYTORCH_ALLOC_CONF=expandable_segments:True")
        raise InfeasibleBudget(
            f"The budget {format_bytes(nbytes)} ({nbytes} bytes) is too small for what torch's allocator holds from "
            f"the card. The smallest budget for which a plan was found is {format_bytes(needed)} ({needed} bytes); no "
            f"plan can need less than {format_bytes(plan.smallest_bound)}. {allocation}. "
            f"{describe_floor(graph, floor)} What would help: {'; '.join(helps)}.",
            smallest_budget=needed,
            bound=plan.smallest_bound,
            blocking=graph.where(floor.op),
        )
    plan.signature["allocation"] = allocation.as_dict()
    everything = reuse_storage(plan.graph, from_order(plan.graph, range(len(plan.graph.ops))))
    kept = allocation_of(plan.graph, everything, plan.cost, card).reserved
    plan.baseline = Baseline(with_reserve(kept), plan.baseline.seconds)
    low = lowest()
    smallest = with_reserve(allocation_of(low.graph, low.program, low.cost, card).reserved)
    plan.smallest_budget = min(nbytes, smallest)  # what is stated is found again
    return plan


def restated(plan: Plan) -> bool:
    """Models the allocation of a card's plan anew, whose program or costs have changed.

    Returns:
        Whether its reserved bytes are within the budget; True for a plan that was made for no card.
    """
    old = plan.allocation
    if old is None:
        return True
    card = CardAllocator((old.workspaces,) if old.workspaces else (), old.mode == EXPANDABLE, old.context)
    found = allocation_of(plan.graph, plan.program, plan.cost, card)
    plan.signature["allocation"] = found.as_dict()
    return with_reserve(found.reserved) <= plan.budget.limits["device"]


def _first_that_fits(
    make: Callable[[int], Plan], lowest: Callable[[], Plan] | None, nbytes: int, card: CardAllocator
) -> tuple[Plan, Allocation, Callable[[], Plan]]:
    """The plan, or where none fits the one of the smallest peak; and how to have that one."""
    over, needed = sum(card.workspaces), 0
    for margin in (*MARGINS, 0):
        try:
            plan = make(over)
        except InfeasibleBudget as error:
            lowest = lowest or _lowest_by(make, nbytes, error.smallest_budget, over, error)
            break
        allocation = allocation_of(plan.graph, plan.program, plan.cost, card)
        lowest = lowest or _lowest_by(make, nbytes, plan.smallest_budget, over)
        if with_reserve(allocation.reserved) <= nbytes:
            return plan, allocation, lowest
        needed = max(needed, allocation.reserved - plan.predicted_peak)
        over = needed + margin
    assert lowest is not None
    plan = lowest()
    return plan, allocation_of(plan.graph, plan.program, plan.cost, card), lowest


def _lowest_by(
    make: Callable[[int], Plan], nbytes: int, smallest: int, over: int, error: InfeasibleBudget | None = None
) -> Callable[[], Plan]:
    """The plan of the smallest peak, as the one for a budget with room for just that peak.

    Arguments:
        smallest: the smallest budget that was stated, for so many bytes less (`over`).
        error: raised where that peak is above the budget.
    """
    peak = smallest - default_reserve(smallest) - over
    room = nbytes - default_reserve(nbytes) - peak
    if room < 0 and error is not None:
        raise error
    return lambda: make(max(0, room - SLACK))
