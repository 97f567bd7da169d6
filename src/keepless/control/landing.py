"""Landing: a plan's step is run, compared with its prediction, and planned again for what it really costs.

Costs are measured op by op, alone; in the step ops meet warm caches and each other's memory. Each round runs the
planned step a few times, undone afterwards, corrects seconds and scratch bytes of the ops, and plans again within the
budget. A program whose corrected prediction is above the budget is never run, and the fastest one that was measured
stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from keepless.control.allocating import restated
from keepless.control.captured import Captures
from keepless.control.checks import check_module, check_optimizer, check_plan
from keepless.control.parts.module_plans import is_by_modules, settings_of
from keepless.control.parts.region_plans import EAGER, chosen_again
from keepless.control.reserve import with_reserve
from keepless.control.trial_steps import Seen, TrialSteps, captured_steps, module_steps
from keepless.cost import CostModel, corrected, corrected_scratch
from keepless.errors import ArgumentError, InfeasibleBudget, ParameterError, RewriteError
from keepless.ir import Budget, Certificate, Phase, Program, Run, Status, format_bytes
from keepless.machine import OPTIMIZER_IN_BACKWARD, Baseline, Landing, Plan, make_plan, simulate
from keepless.measure import optimizer_footprint
from keepless.passes import evaluate
from keepless.solve import Solution, replan
from keepless.solve.floor import floor_bound

MOST_ROUNDS = 3
NEAR = 0.005
"""A predicted peak this near the measured one is right."""
_REPEATS = 3


def land(
    model: torch.nn.Module,
    batch: Any,
    plan: Plan,
    *,
    loss_fn: Any,
    optimizer: torch.optim.Optimizer | None,
    rounds: int,
) -> Plan:
    """See `keepless.land`."""
    check_module(model)
    check_plan(plan)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= MOST_ROUNDS:
        raise ArgumentError(f"rounds={rounds!r} is not a number of rounds from 1 to {MOST_ROUNDS}.")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ParameterError("Landing runs steps, and the model is on the meta device: give it weights first.")
    check_landing(plan.rewrites)
    if optimizer is not None:
        plan = _with_optimizer(plan, model, optimizer)
    steps = module_steps if is_by_modules(plan) else captured_steps
    with steps(model, batch, plan, loss_fn) as trial:
        return _landed(plan, trial, rounds)


def _landed(plan: Plan, trial: TrialSteps, rounds: int) -> Plan:
    seen_rounds: list[Landing] = []
    best: tuple[float, int, Plan] | None = None
    limit = plan.budget.limits["device"]
    for number in range(1, rounds + 1):
        seen = trial.run(plan, _REPEATS)
        seen_rounds.append(
            Landing(
                number, plan.predicted_peak, seen.peak, plan.predicted_seconds, seen.seconds, plan.num_replays, False
            )
        )
        lesson = _learned(plan, seen)
        if lesson.ran is not None and (best is None or seen.seconds < best[0]):
            best = seen.seconds, number, lesson.ran
        if lesson.again is None:
            break
        if lesson.again.program.instrs == plan.program.instrs and abs(seen_rounds[-1].peak_error) <= NEAR:
            break
        plan = lesson.again
    if best is None:
        raise _above(plan, seen_rounds[-1], limit)
    _, kept, found = best
    found.landing = tuple(replace(one, is_kept=one.round == kept) for one in seen_rounds)
    return found


def check_landing(rewrites: tuple[str, ...]) -> None:
    """Refuses to land a step that updates parameters, which landing never does.

    Raises:
        RewriteError: it is one.
    """
    if OPTIMIZER_IN_BACKWARD in rewrites:
        raise RewriteError(
            f"Landing runs steps that are undone, and this plan's steps update parameters (rewrites={rewrites}): it "
            "cannot be landed."
        )


@dataclass(frozen=True)
class _Lesson:
    """What a round teaches.

    Arguments:
        ran: the program that ran, with the costs that would have predicted it; None where it rose above the budget.
        again: the plan for these costs; None where none is within the budget.
    """

    ran: Plan | None
    again: Plan | None


def _learned(plan: Plan, seen: Seen) -> _Lesson:
    limit = plan.budget.limits["device"]
    if seen.timeline.events:
        scratch = corrected_scratch(plan.graph, plan.cost, plan.program, plan.predicted, seen.timeline)
        cost = corrected(plan.graph, scratch, plan.program, seen.timeline)
    else:
        cost = _shifted(plan, seen)
    cost = _adding_up_to(seen.seconds, plan, cost)
    found, again = _replanned(plan, cost)
    if seen.peak > limit:
        return _Lesson(None, again)
    claim = found.certificate if found is not None else Certificate(plan.certificate.solver, Status.FEASIBLE)
    if found is None or found.program.instrs != plan.program.instrs:
        claim = replace(claim, status=Status.FEASIBLE)
    peak = simulate(plan.graph, plan.program, cost).peak
    if peak > limit:  # an op that runs twice needs less in one of both: the step was seen to fit
        cost = replace(cost, scratch=plan.cost.scratch)
        peak = simulate(plan.graph, plan.program, cost).peak
        claim = Certificate(claim.solver, Status.FEASIBLE, seed=claim.seed)
    budget = plan.budget
    if peak > budget.device:  # what is left of the reserve is what the measured step left
        claim = replace(claim, bound_seconds=0.0, witness="")
        budget = replace(budget, reserve=limit - peak)
    ran = _remade(plan, plan.program, cost, budget, claim, found)
    ran.measured_peak = seen.peak
    return _Lesson(ran, again)


def _replanned(plan: Plan, cost: CostModel) -> tuple[Solution | None, Plan | None]:
    if plan.signature.get("unseen"):
        return None, None  # the budget has room for calls that are not in the graph: only a survey knows how much
    signature = plan.signature
    known = plan.capture
    try:
        if plan.engine == EAGER:
            found, signature = chosen_again(plan, cost)
        else:
            settings = known.settings if isinstance(known, Captures) else settings_of(plan)
            corrected_already = replace(plan.predicted, events=())
            cost, found = replan(
                plan.graph,
                cost,
                plan.program,
                corrected_already,
                plan.budget,
                settings.solver,
                plan.certificate.seed,
            )
    except InfeasibleBudget:
        return None, None
    again = _remade(plan, found.program, cost, plan.budget, found.certificate, found)
    again.signature = dict(signature)
    return (found, again) if restated(again) else (None, None)


def _shifted(plan: Plan, seen: Seen) -> CostModel:
    """Costs of module calls with the bytes that were seen above or below the prediction at every op, since which of
    them it was is not known.
    """
    steps = _is_optimizers(plan)
    runs = [(event, plan.program[event.index]) for event in plan.predicted.events]
    highest = max((e.peak for e, instr in runs if not (isinstance(instr, Run) and steps[instr.op])), default=0)
    last = max((e.peak for e, instr in runs if isinstance(instr, Run) and steps[instr.op]), default=0)
    # Below the optimizer's peak, forward and backward are not told apart from it.
    off = seen.peak - highest if seen.peak > last else 0
    scratch = [n if own else max(0, n + off) for n, own in zip(plan.cost.scratch, steps, strict=True)]
    return replace(plan.cost, scratch=tuple(scratch))


def _adding_up_to(seconds: float, plan: Plan, cost: CostModel) -> CostModel:
    """The costs, but for the optimizer's, times one factor: so that the program takes so many seconds."""
    steps = _is_optimizers(plan)
    runs = [instr.op for instr in plan.program if isinstance(instr, Run)]
    rest = sum(cost.seconds[op] for op in runs if steps[op])
    before = sum(cost.seconds[op] for op in runs if not steps[op])
    factor = max(0.0, seconds - rest) / before if before > 0 else 1.0
    scaled = [s if own else s * factor for s, own in zip(cost.seconds, steps, strict=True)]
    return replace(cost, seconds=tuple(scaled), disturbed=0.0)


def _is_optimizers(plan: Plan) -> list[bool]:
    return [op.phase is Phase.OPTIMIZER for op in plan.graph.ops]


def _remade(
    plan: Plan, program: Program, cost: CostModel, budget: Budget, claim: Certificate, found: Solution | None
) -> Plan:
    """The plan with another program, costs and certificate."""
    everything = evaluate(plan.graph, cost, range(len(plan.graph.ops)))
    more = max(0, plan.baseline.peak - with_reserve(evaluate(plan.graph, plan.cost, range(len(plan.graph.ops))).peak))
    made = make_plan(
        plan.graph,
        program,
        cost,
        budget,
        claim,
        baseline=Baseline(with_reserve(everything.peak) + more, everything.seconds),
        signature=plan.signature,
        smallest_budget=with_reserve(found.smallest_nbytes) if found is not None else plan.smallest_budget,
        smallest_bound=found.smallest_bound if found is not None else floor_bound(plan.graph, cost)[0],
    )
    made.capture = plan.capture
    if plan.allocation is not None:  # that of reserved bytes, which peaks do not tell
        made.smallest_budget = plan.smallest_budget
        restated(made)
    return made


def _with_optimizer(plan: Plan, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Plan:
    """The plan with the optimizer's bytes and seconds as they are predicted now.

    Raises:
        ParameterError: the plan counts no optimizer, or one with another state.
    """
    check_optimizer(optimizer, model)
    last = next((op.id for op in plan.graph.ops if op.phase is Phase.OPTIMIZER), None)
    if last is None:
        raise ParameterError("The plan counts no optimizer: plan with optimizer=, and land without.")
    footprint = optimizer_footprint(optimizer, [p for p in model.parameters() if p.requires_grad])
    planned = plan.signature.get("state_nbytes")
    if planned != footprint.state_nbytes:
        raise ParameterError(
            f"The plan counts {planned} bytes of the optimizer's state, and this {type(optimizer).__name__} has "
            f"{footprint.state_nbytes}: plan with this optimizer."
        )
    seconds, scratch = list(plan.cost.seconds), list(plan.cost.scratch)
    seconds[last] = footprint.seconds_estimate or 0.0
    scratch[last] = footprint.scratch_nbytes
    cost = replace(plan.cost, seconds=tuple(seconds), scratch=tuple(scratch))
    peak = simulate(plan.graph, plan.program, cost).peak
    limit = plan.budget.limits["device"]
    if peak > limit:
        raise InfeasibleBudget(
            f"With this optimizer's temporaries the step needs {format_bytes(peak)}, above the budget of "
            f"{format_bytes(limit)} ({limit} bytes). Plan again with this optimizer.",
            smallest_budget=with_reserve(peak),
            bound=plan.smallest_bound,
            blocking=plan.graph.where(plan.graph.ops[last]),
        )
    budget = plan.budget if peak <= plan.budget.device else replace(plan.budget, reserve=limit - peak)
    return replace(plan, cost=cost, predicted=simulate(plan.graph, plan.program, cost), budget=budget)


def _above(plan: Plan, last: Landing, limit: int) -> InfeasibleBudget:
    needed = max(plan.smallest_budget, with_reserve(last.measured_peak))
    return InfeasibleBudget(
        f"The planned step rose to {last.measured_peak} bytes, above the budget of {limit}, and no plan within it was "
        f"found for what its ops were seen to need. Give a budget of {needed} bytes, or use a smaller batch.",
        smallest_budget=needed,
        bound=plan.smallest_bound,
        blocking="",
    )
