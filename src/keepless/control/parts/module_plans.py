"""Plans of module calls: for any module, measured by running it.

The step is surveyed, measured in steps of which every region is recomputed (the smallest that there are), planned for,
and run once by its plan before it is given out: where that step rose above the budget, it is planned again for less.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from keepless.capture import Inputs, planned_device
from keepless.control.captured import Settings, settings_from
from keepless.control.parts import block_plans, region_plans
from keepless.control.parts.block_plans import BLOCKS
from keepless.control.parts.data_sizes import data_dependent_ops, headroom_of
from keepless.control.parts.module_costs import measure_modules
from keepless.control.parts.module_steps import (
    as_written,
    check,
    check_alone,
    recording,
    standing_alone,
    tensors_of,
    uncompiled,
    without_plan,
)
from keepless.control.parts.region_plans import EAGER
from keepless.control.runner import Runner
from keepless.control.signature import check_signature, model_signature
from keepless.eager.randomness import Stream
from keepless.errors import (
    BatchError,
    CaptureError,
    InfeasibleBudget,
    KeeplessError,
    LossError,
    MeasureError,
    ParameterError,
    PlanError,
    SolverError,
)
from keepless.execute import Attached
from keepless.execute.recovery import covers
from keepless.ir import Phase
from keepless.machine import Plan, managed_share
from keepless.modules.blocks import Blocks
from keepless.modules.chosen import Chosen
from keepless.modules.kinds import CONSTANT, STRUCTURE, Key, autocast_now, model_key
from keepless.modules.leftovers import STEPS_BEFORE
from keepless.modules.planned import PlannedModules
from keepless.modules.recovery import CHANGES, CallSurvivor, streams_of
from keepless.modules.sites import tensors_in
from keepless.modules.untouched import Before, untouched
from keepless.solve.regions import NAME

_ROUNDS = 3
"""How often a plan whose step rose above its budget is planned again for less."""


_LOST = (
    "Captured blocks do what their ops do: what their code does beside that (a loss that it puts where code around it "
    'looks, kernels of its own that it is compiled to) is lost. engine="eager" runs the model\'s own code.'
)
OTHER_LOSS = "A planned step has a loss of {}, a step of the model's own code one of {}. " + _LOST
FAILS = "A planned step fails, and a step of the model's own code does not ({}). " + _LOST

_REPEATS = 5
"""Timed steps at most; a kind of step that is planned when it comes is timed once."""
_ENOUGH_MANAGED = 0.85
"""Where a plan of blocks decides about less than this share of what is saved, one of regions is made beside it."""


def is_by_modules(plan: Plan) -> bool:
    """Whether a plan is one of module calls: of blocks, or of regions alone."""
    return plan.engine in (EAGER, BLOCKS)


def make(
    model: torch.nn.Module,
    batch: Any,
    settings: Settings,
    tell: Any,
    engine: str = EAGER,
    blocks: Blocks | None = None,
    like: Plan | None = None,
) -> Plan:
    """A plan of module calls. See `keepless.plan`.

    Arguments:
        like: a plan of another kind of step of this model.
    """
    if engine == EAGER and settings.solver not in ("keepless", NAME):
        raise SolverError(
            f"The eager engine recomputes module calls as a whole and plans with a search of its own; solver="
            f"{settings.solver!r} plans single ops, for the graph and block engines."
        )
    model = uncompiled(model)
    check(model)
    check_alone(model)
    device = planned_device(model)
    inputs, batch = standing_alone(batch)
    with _trials(model, device, inputs) as before:
        run = Runner(model, inputs, batch, settings.loss_fn, settings, device, before)

        def told(done: int, total: int) -> None:
            tell("measure", done, total)

        repeats = _REPEATS if like is None else 1
        if engine == BLOCKS:
            measured = block_plans.measure(run, settings, tell, blocks, repeats)
            return _landed(run, settings, tell, lambda over: block_plans.solved(run, measured, settings, over, like))
        pieces = measure_modules(run, settings, told, most_repeats=repeats)
        return _landed(run, settings, tell, lambda over: region_plans.solved(run, pieces, settings, over))


def make_first(model: torch.nn.Module, batch: Any, settings: Settings, tell: Any, not_graph: CaptureError) -> Plan:
    """A plan of blocks, or of regions where no block can be captured or blocks do not fit the budget.

    Arguments:
        not_graph: why the whole step cannot be captured.
    """
    try:
        plan = _first(model, batch, settings, tell)
    except CaptureError as error:
        if isinstance(error, LossError) or type(error) is not type(not_graph):
            raise
        raise not_graph from not_graph.__cause__
    except KeeplessError:
        raise
    except Exception:
        if isinstance(not_graph, BatchError):  # the forward does fail on this batch, and not on fake tensors only
            raise not_graph from not_graph.__cause__
        raise
    plan.signature = {**plan.signature, "not_graph": str(not_graph)}
    return plan


def _first(model: torch.nn.Module, batch: Any, settings: Settings, tell: Any) -> Plan:
    try:
        plan = make(model, batch, settings, tell, BLOCKS)
    except InfeasibleBudget as error:
        try:
            return _by_regions(model, batch, settings, tell, str(error))
        except InfeasibleBudget as second:
            raise (error if error.smallest_budget <= second.smallest_budget else second) from None
    except LossError:
        raise
    except (CaptureError, MeasureError) as error:
        return _by_regions(model, batch, settings, tell, str(error))
    if managed_share(plan.graph) >= _ENOUGH_MANAGED or plan.signature.get("left_out"):
        return plan  # only it looks after blocks that another step may call
    try:
        other = _by_regions(model, batch, settings, tell, "Recomputing whole module calls costs less here.")
    except InfeasibleBudget:
        return plan
    spent = [(one.predicted_seconds - one.baseline_seconds, one.smallest_budget) for one in (plan, other)]
    return plan if spent[0] <= spent[1] else other


def _by_regions(model: torch.nn.Module, batch: Any, settings: Settings, tell: Any, not_blocks: str) -> Plan:
    if settings.solver not in ("keepless", NAME):
        settings = replace(settings, solver="keepless")
    plan = make(model, batch, settings, tell, EAGER)
    plan.signature = {**plan.signature, "not_blocks": not_blocks}
    return plan


@contextlib.contextmanager
def _trials(model: torch.nn.Module, device: torch.device, inputs: Inputs) -> Iterator[Any]:
    with recording(), without_plan(model), untouched(model, device, tensors_of(inputs)) as before, as_written():
        try:
            yield before
        except RecursionError as error:
            raise MeasureError(
                f"Python's recursion limit of {sys.getrecursionlimit()} does not let this model's modules, nested as "
                "deeply as they are, be recomputed in one another: raise it with sys.setrecursionlimit."
            ) from error


def _landed(run: Runner, settings: Settings, tell: Any, solve: Callable[[int], Plan]) -> Plan:
    """The plan, after a step of it has stayed within the budget."""
    over = spare = 0
    tell("solve", 0, 1)
    by_data = data_dependent_ops(run)
    for _ in range(_ROUNDS):
        run.prepare()  # a plan names what the model is like before a forward
        plan = solve(over + spare)
        if by_data:
            if not spare:
                spare = headroom_of(plan)
                plan = solve(over + spare)
            plan.smallest_budget += spare
            plan.budget = replace(plan.budget, reserve=plan.budget.reserve + spare)  # landing leaves it free, too
            plan.signature = {**plan.signature, "data_sizes": [by_data, spare]}
        plan.capture = plan.capture or settings
        resident = plan.graph.start_nbytes
        planned = apply(run.model, plan)
        planned.on_miss = _never
        try:
            run.prepare()
            changes = _tried(run, plan, settings)  # and regions are watched the first time
            plan.measured_peak = resident + run.measure()
        finally:
            planned.take_out()
        if plan.measured_peak <= settings.budget - spare:
            plan.signature = {**plan.signature, CHANGES: changes}
            if run.steps_before:
                plan.signature = {**plan.signature, STEPS_BEFORE: run.steps_before}
            tell("solve", 1, 1)
            return plan
        over += plan.measured_peak - (settings.budget - spare)
    raise InfeasibleBudget(
        f"A planned step rose to {plan.measured_peak} bytes, above {settings.budget - spare} bytes, the budget less "
        f"what is kept free for other data, and did so again when {over} bytes less were planned for. Give a budget of "
        f"{settings.budget + over} bytes.",
        smallest_budget=settings.budget + over,
        bound=plan.smallest_bound,
        blocking="",
    )


def _tried(run: Runner, plan: Plan, settings: Settings) -> str:
    """Runs a planned step for the first time, and gives what its forward changes, see `_watching_changes`.

    Raises:
        CaptureError: captured blocks make it fail, or give it another loss than the model's own code does.
    """
    if plan.engine != BLOCKS:
        return _watching_changes(run)[1]
    try:
        loss, changes = _watching_changes(run)
    except Exception as error:  # whatever the model's code raises where something of it is missing
        if isinstance(error, (KeeplessError, RecursionError)) or covers(error):
            raise
        raise CaptureError(FAILS.format(f"{type(error).__name__}: {error}")) from error
    own = None if settings.rewrites else run.own_loss_beside(loss)
    if own is not None:
        raise CaptureError(OTHER_LOSS.format(float(loss), own))
    return changes


def _watching_changes(run: Runner) -> tuple[torch.Tensor, str]:
    """Runs a step, and gives its loss, and what its forward changes beside random numbers; empty where it is nothing.

    What only a first forward does (libraries hang hooks on modules then) counts for nothing.
    """
    streams = streams_of(run.device)
    loss, found = _changed_in_forward(run, run.before, streams)
    if found:
        again = Before(run.model, run.device, tensors_of(run.inputs))
        try:
            with torch.no_grad():
                run.model(*run.inputs.args, **run.inputs.kwargs)
        except Exception:  # it needs gradients itself, as `retain_grad` does
            run.before.without_gradients()
            return loss, _changed_in_forward(run, again, streams)[1]
        found = again.changed(streams)
    return loss, found


def _changed_in_forward(run: Runner, before: Before, streams: Sequence[Stream]) -> tuple[torch.Tensor, str]:
    """The loss of a step, and what stands otherwise than before when its forward has ended."""
    found = ""

    def mark(phase: str) -> None:
        nonlocal found
        if phase == Phase.FORWARD.value:
            found = before.changed(streams)

    loss = run.forward_backward(mark)
    return loss, found


def apply(
    model: torch.nn.Module, plan: Plan, survivor: CallSurvivor | None = None, guard: Attached | None = None
) -> PlannedModules:
    """Puts a plan of module calls into a model that has none. Calls of other shapes are planned on the spot.

    Arguments:
        survivor: how it goes on where there is no memory.
        guard: in place as long as the plan is.

    Raises:
        PlanError: the plan was made for another model.
    """
    model = uncompiled(model)
    check_signature(plan.signature, model_signature(model), "model")
    check_alone(model)
    chosen = _chosen(plan)
    planned = PlannedModules(model, None)
    planned.survivor, planned.guard = survivor, guard
    settings = settings_of(plan)

    def on_miss(here: PlannedModules, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Chosen:
        if not any(p.requires_grad for p in model.parameters()):
            return Chosen(frozenset())
        stand = any(p.grad is not None for p in model.parameters())
        own = replace(settings, accumulate=settings.accumulate or stand)
        if not settings.own_loss:
            own = replace(own, loss_fn=_any_loss, own_loss=False)
        try:
            return _chosen(make(model, Inputs(*args, **kwargs), own, _silent, plan.engine, like=plan))
        except InfeasibleBudget as error:
            raise InfeasibleBudget(
                f"This call is not the step that the model was planned for and needs a plan of its own. {error}",
                smallest_budget=error.smallest_budget,
                bound=error.bound,
                blocking=error.blocking,
            ) from None

    try:
        keys = _keys(model, plan)
    except (TypeError, ValueError, AttributeError) as error:
        raise PlanError("The plan's description of its batch is damaged. Plan again.") from error
    try:
        planned.put_in()
        for key in keys:
            planned.add(key, chosen)
        planned.on_miss = on_miss
    except BaseException:
        planned.take_out()
        raise
    return planned


def _chosen(plan: Plan) -> Chosen:
    """The calls that a plan recomputes or captures."""
    if plan.engine == BLOCKS:
        return block_plans.chosen_of(plan)
    return Chosen(region_plans.recomputed_sites(plan), plan.baseline_peak, plan=plan)


def settings_of(plan: Plan) -> Settings:
    """What a plan was asked for; of one from a file, as far as it says."""
    known = plan.capture.settings if isinstance(plan.capture, block_plans.Known) else plan.capture
    return known if isinstance(known, Settings) else settings_from(plan, own_loss=bool(plan.signature.get("own_loss")))


def _keys(model: torch.nn.Module, plan: Plan) -> list[Key]:
    """The kinds of steps that a plan is for: with gradients that stand already, the first step without, too."""
    signature = plan.signature
    arguments = signature.get("arguments")
    leaves = tuple(map(_leaf_key, arguments)) if isinstance(arguments, list) else ()
    call = (str(signature.get("structure"))[:STRUCTURE], *leaves)
    stands = (False, True) if signature.get("accumulate") else (False,)
    return [(*model_key(model), signature.get("autocast", autocast_now(model)), stand, *call) for stand in stands]


def _leaf_key(row: Any) -> Any:
    if isinstance(row, list):
        dtype, shape, _, grad = row
        return tuple(shape), dtype, grad
    try:
        float(row)
    except ValueError:
        return row[:CONSTANT]
    return row if row.lstrip("-").isdigit() else "float"


def _any_loss(output: Any, batch: Any) -> torch.Tensor:
    """Stands for a loss whose targets are not known: every output gets a gradient."""
    leaves = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    if not leaves:
        raise ParameterError("No output of the model depends on a parameter that requires a gradient.")
    return torch.stack([leaf.float().mean() for leaf in leaves]).sum()


def _never(*_: Any) -> Chosen:
    raise MeasureError("The model is not the same before each forward: its modes, or which parameters are trained.")


def _silent(stage: str, done: int, total: int) -> None:
    pass
