"""The bytes of a budget that stay free, and what is said where a budget is too small."""

from __future__ import annotations

from keepless.cost import CostModel
from keepless.errors import BudgetError, InfeasibleBudget
from keepless.ir import Budget, Graph, Program, format_bytes
from keepless.report.floor import describe_floor, find_floor


def default_reserve(budget: int) -> int:
    """Bytes of a budget that stay free: what predictions miss.

    Small tensors below the model's resolution: generator states of replays in flight, wrapped numbers, autograd's
    own. Measured on the CPU over the six model families of the tests: under 60 KiB.
    """
    return 64 * 1024 + budget // 1000


def budget_with_reserve(nbytes: int) -> Budget:
    """The budget of so many bytes on the device, the default reserve among them.

    Raises:
        BudgetError: nothing is left beside the reserve.
    """
    budget = Budget({"device": nbytes}, reserve=min(default_reserve(nbytes), nbytes - 1))
    if budget.device <= 0:
        raise BudgetError(f"The budget of {nbytes} bytes is smaller than its own reserve.")
    return budget


def with_reserve(peak: int) -> int:
    """The smallest budget whose device limit, less the default reserve, is at least this peak."""
    budget = (peak + 64 * 1024) * 1000 // 999
    while budget - default_reserve(budget) < peak:
        budget += 1
    return budget


def explain_infeasible(
    graph: Graph, cost: CostModel, budget: int, lowest: Program, peak: int, bound: int
) -> InfeasibleBudget:
    """The error with what the floor is made of, and what would lower it.

    Arguments:
        budget: that is too small, in bytes.
        lowest: the program of the lowest peak that was found.
        peak: the smallest that is stated.
        bound: no program has a lower one.
    """
    needed = with_reserve(peak)
    floor = find_floor(graph, cost, lowest)
    return InfeasibleBudget(
        f"The budget {format_bytes(budget)} ({budget} bytes) is too small. The smallest budget for "
        f"which a plan was found is {format_bytes(needed)} ({needed} bytes); no plan can need less than "
        f"{format_bytes(bound)}. {describe_floor(graph, floor)} What would help: {'; '.join(floor.advice)}; or a "
        f"budget of {needed} bytes.",
        smallest_budget=needed,
        bound=bound,
        blocking=graph.where(floor.op),
    )
