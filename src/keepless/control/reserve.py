"""The bytes of a budget that stay free, and what is said where a budget is too small."""

from __future__ import annotations

from keepless.cost import CostModel
from keepless.errors import BudgetError, InfeasibleBudget
from keepless.ir import Budget, Graph, Program, format_bytes
from keepless.reporting.floor import describe_floor, find_floor


def default_reserve(budget: int) -> int:
    """Bytes of a budget that stay free: what predictions miss.

    Small tensors below the model's resolution: generator states of replays in flight, wrapped numbers, autograd's
    own. Measured on the CPU over the six model families of the tests: under 60 KiB.
    """
    return 64 * 1024 + budget // 1000


def budget_with_reserve(nbytes: int, over: int = 0) -> Budget:
    """The budget of so many bytes on the device, the default reserve among them.

    Arguments:
        over: further bytes that stay free.

    Raises:
        BudgetError: nothing is left beside the reserve.
    """
    budget = Budget({"device": nbytes}, reserve=min(default_reserve(nbytes) + over, nbytes - 1))
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
    graph: Graph,
    cost: CostModel,
    budget: int,
    lowest: Program,
    peak: int,
    bound: int,
    own: tuple[str, int] | None = None,
    num_unrun: int = 0,
) -> InfeasibleBudget:
    """The error with what the floor is made of, and what would lower it.

    Arguments:
        budget: that is too small, in bytes.
        lowest: the program of the lowest peak that the default planner found.
        peak: the smallest that is stated for it.
        bound: no program has a lower one.
        own: name and lowest peak of the solver that was asked for, where that is another one.
        num_unrun: ops that were not run, as they need more than the budget alone.
    """
    needed = with_reserve(peak)
    floor = find_floor(graph, cost, lowest)
    size = f"{format_bytes(budget)} ({budget} bytes)"
    helps = [*floor.advice, f"a budget of {needed} bytes"]
    if own is None:
        text = (
            f"The budget {size} is too small. The smallest budget for which a plan was found is "
            f"{format_bytes(needed)} ({needed} bytes)"
        )
    else:
        name, least = own[0], with_reserve(own[1])
        text = (
            f"The budget {size} is too small for the solver {name}: the lowest plan that it found needs "
            f"{format_bytes(least)} ({least} bytes); the default planner's needs {format_bytes(needed)} "
            f"({needed} bytes)"
        )
        helps = [*floor.advice, f"a budget of {least} bytes", f"the default planner with {max(needed, budget)} bytes"]
        needed = least
    if num_unrun:
        ops = "1 op needs" if num_unrun == 1 else f"{num_unrun} ops need"
        text += f", to which the scratch bytes of what was not run come ({ops} more than this budget leaves)"
    return InfeasibleBudget(
        f"{text}; no plan can need less than {format_bytes(bound)}. {describe_floor(graph, floor)} What would help: "
        f"{'; '.join(helps[:-1])}; or {helps[-1]}.",
        smallest_budget=needed,
        bound=bound,
        blocking=graph.where(floor.op),
    )
