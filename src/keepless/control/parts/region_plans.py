"""Plans of regions: module calls that are recomputed as a whole, for any module, run by the eager engine."""

from __future__ import annotations

from dataclasses import replace

from keepless.capture import flatten_inputs
from keepless.control.allocating import within_card
from keepless.control.captured import Settings
from keepless.control.parts.module_costs import MeasuredModules
from keepless.control.reserve import budget_with_reserve, default_reserve, explain_infeasible, with_reserve
from keepless.control.runner import Runner
from keepless.control.signature import batch_signature, model_signature, module_facts
from keepless.cost import CostModel
from keepless.errors import InfeasibleBudget, PlanError
from keepless.ir import Certificate, Program, Status
from keepless.machine import Baseline, Plan, make_plan
from keepless.modules.sites import Site
from keepless.passes import evaluate, from_order, reuse_storage
from keepless.solve.floor import floor_bound
from keepless.solve.regions import NAME, Region, Regions, RegionTree
from keepless.solve.solution import Solution, solution

EAGER = "eager"


def solved(run: Runner, measured: MeasuredModules, settings: Settings, over: int) -> Plan:
    """The plan of regions for a budget less `over` bytes.

    Raises:
        InfeasibleBudget: none was found.
    """
    if settings.card is None:
        return _solved(run, measured, settings, over)

    def make(more: int) -> Plan:
        plan = _solved(run, measured, settings, over + more)
        smallest = plan.smallest_budget
        plan.smallest_budget = with_reserve(smallest - default_reserve(smallest) + more)
        return plan

    return within_card(make, None, settings.budget, settings.card.with_handles(2))


def _solved(run: Runner, measured: MeasuredModules, settings: Settings, over: int) -> Plan:
    graph, cost, tree = measured.graph, measured.cost, measured.tree
    budget = budget_with_reserve(settings.budget)
    limit = budget.device - over
    solver = Regions(tree)
    found, chosen = solver.choose(graph, cost, limit, settings.seed)
    low, lowest = solver.lowest(graph, cost)
    low = min(low, found.peak)
    if limit < low <= limit + budget.reserve // 2:
        # Measured again, the smallest step may come out a little larger than when its budget was stated.
        budget = replace(budget, reserve=budget.reserve - budget.reserve // 2)
        limit = budget.device - over
        found, chosen = solver.choose(graph, cost, limit, settings.seed)
    bound = floor_bound(graph, cost)[0]
    if found.peak > limit:
        order = tree.order(lowest, len(graph.ops))
        least = solution(graph, cost, order, Certificate(NAME, Status.FEASIBLE))
        raise explain_infeasible(graph, cost, settings.budget, least.program, low + over, bound)
    everything = evaluate(graph, cost, range(len(graph.ops)))
    flat = flatten_inputs(run.inputs)
    sites = measured.cut.sites
    facts: dict[str, object] = {
        **module_facts(run.model, run.device, settings, graph),
        "engine": EAGER,
        "solver": NAME,
        "regions": [[site.path, site.number, r.first, r.last] for site, r in zip(sites, tree.regions, strict=True)],
        "holds": list(tree.holds),
        "saving": sorted(tree.saving),
        "recomputed": sorted(chosen),
    }
    plan = make_plan(
        graph,
        found.program,
        cost,
        budget,
        found.certificate,
        baseline=Baseline(with_reserve(everything.peak), everything.seconds),
        signature={**model_signature(run.model), **batch_signature(flat), **facts},
        smallest_budget=with_reserve(low),
        smallest_bound=bound,
    )
    plan.capture = settings
    return plan


def chosen_again(plan: Plan, cost: CostModel) -> tuple[Solution, dict[str, object]]:
    """The regions that these costs ask for within a plan's budget, and the plan's signature with them.

    Raises:
        InfeasibleBudget: none was found.
        PlanError: the plan's list of regions is damaged.
    """
    tree, before = _tree_of(plan)
    limit = plan.budget.device
    found, chosen = Regions(tree).choose(plan.graph, cost, limit, plan.certificate.seed)
    low = min(found.peak, Regions(tree).lowest(plan.graph, cost)[0])
    bound = floor_bound(plan.graph, cost)[0]
    ran = solution(plan.graph, cost, tree.order(before, len(plan.graph.ops)), found.certificate)
    if ran.peak <= limit and (found.peak > limit or ran.seconds <= found.seconds):
        claim = found.certificate if chosen == before else replace(found.certificate, status=Status.FEASIBLE)
        found, chosen = replace(ran, certificate=claim), before
    if found.peak > limit:
        raise InfeasibleBudget(
            f"No module calls to recompute were found within {limit} bytes; the lowest needs {low}.",
            smallest_budget=with_reserve(low),
            bound=bound,
            blocking="",
        )
    return found.stating(low, bound), {**plan.signature, "recomputed": sorted(chosen)}


def recomputed_sites(plan: Plan) -> frozenset[Site]:
    """The module calls that a plan recomputes.

    Raises:
        PlanError: the plan's calls are not those of its program.
    """
    tree, numbers = _tree_of(plan)
    rows = plan.signature["regions"]
    assert isinstance(rows, list)
    try:
        sites = [Site(str(path), int(number)) for path, number, _, _ in rows]
        order = tree.order(numbers, len(plan.graph.ops))
        program = reuse_storage(plan.graph, from_order(plan.graph, order))
        found = frozenset(sites[number] for number in numbers)
    except (AssertionError, TypeError, ValueError, IndexError) as error:
        raise PlanError(_DAMAGED) from error
    if program.instrs != plan.program.instrs:
        raise PlanError("The plan's recomputed module calls are not what its program recomputes. Plan again.")
    return found


def lowest_sites(plan: Plan) -> frozenset[Site]:
    """The module calls to recompute for the lowest peak that is found."""
    tree, _ = _tree_of(plan)
    _, numbers = Regions(tree).lowest(plan.graph, plan.cost)
    sites = _sites_of(plan)
    return frozenset(sites[number] for number in numbers)


def program_of(plan: Plan, recomputed: frozenset[Site]) -> Program:
    """The plan's step where these calls are recomputed."""
    tree, _ = _tree_of(plan)
    numbers = frozenset(number for number, site in enumerate(_sites_of(plan)) if site in recomputed)
    return reuse_storage(plan.graph, from_order(plan.graph, tree.order(numbers, len(plan.graph.ops))))


def _sites_of(plan: Plan) -> list[Site]:
    rows = plan.signature["regions"]
    assert isinstance(rows, list)
    return [Site(str(path), int(number)) for path, number, _, _ in rows]


_DAMAGED = "The plan's list of recomputed module calls is damaged. Plan again."


def _tree_of(plan: Plan) -> tuple[RegionTree, frozenset[int]]:
    """The regions of a plan, and which of them it recomputes."""
    rows, saving, chosen = (plan.signature.get(name) for name in ("regions", "saving", "recomputed"))
    try:
        assert isinstance(rows, list)
        assert isinstance(saving, list)
        assert isinstance(chosen, list)
        holds = plan.signature.get("holds", [])
        assert isinstance(holds, list)
        regions = tuple(Region(int(first), int(last)) for _, _, first, last in rows)
        count = plan.graph.loss_op
        assert count is not None
        return RegionTree(regions, count, frozenset(map(int, saving)), tuple(map(int, holds))), frozenset(
            map(int, chosen)
        )
    except (AssertionError, TypeError, ValueError, IndexError) as error:
        raise PlanError(_DAMAGED) from error
