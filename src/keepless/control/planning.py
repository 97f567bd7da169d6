"""From a model, a batch and a budget to a plan: capture, measure, solve, predict.

Nothing of the user's changes, and nothing larger than one op's inputs and outputs is allocated.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from keepless.capture import FlatInputs, Inputs, flatten_inputs, lower, planned_device, trace_step
from keepless.capture.ordering import Orders
from keepless.capture.questions import MOST_GIVEN
from keepless.capture.target import TargetFaking
from keepless.capture.trace import Traced
from keepless.control.allocating import allocation_of, within_card
from keepless.control.captured import Capture, Captures, Measured, Settings, beyond_peak
from keepless.control.checks import check_module, check_optimizer
from keepless.control.elsewhere import faking_for, loss_work, step_elsewhere, target_of
from keepless.control.loss_state import loss_untouched
from keepless.control.offers import with_offers
from keepless.control.options import Progress as Progress
from keepless.control.options import StepOptions, check_rewrites
from keepless.control.parts import module_plans, module_steps
from keepless.control.parts.block_plans import BLOCKS
from keepless.control.parts.region_plans import EAGER
from keepless.control.plan_book.templates import Templates
from keepless.control.positions import check_positions
from keepless.control.reserve import budget_with_reserve, explain_infeasible, with_reserve
from keepless.control.room import room_for_trials
from keepless.control.signature import batch_signature, model_signature, optimizer_facts
from keepless.control.takeover import note, turned_off
from keepless.control.trials import cost_model, measure_costs, measure_loss, untouched
from keepless.control.works import works_of
from keepless.cost import DeviceSpec
from keepless.errors import (
    ArgumentError,
    BatchError,
    CaptureError,
    CheckpointingError,
    InfeasibleBudget,
    LossError,
    MeasureError,
    PositionError,
    RewriteError,
)
from keepless.files import remove_abandoned
from keepless.ir import Budget, Graph, Kind, parse_bytes
from keepless.ir.text import fingerprint
from keepless.machine import OPTIMIZER_IN_BACKWARD, Baseline, Plan, make_plan, read_rewrites
from keepless.measure import (
    CostCache,
    describe_device,
    device_nbytes,
    innermost,
    optimizer_footprint,
    optimizer_updates,
)
from keepless.measure.card import CardAllocator, allocator_elsewhere, card_allocator
from keepless.modules.blocks import Blocks
from keepless.passes import evaluate
from keepless.solve import SOLVERS, Solution, Solver, named_solver, smallest, solve
from keepless.solve.regions import NAME

AUTO, GRAPH = "auto", "graph"
ENGINES = (AUTO, GRAPH, BLOCKS, EAGER)
"""What runs a plan: the captured step, captured blocks within the model's own code, or that code alone with module
calls that are recomputed. "auto" is the first of them that can."""


def read_budget(budget: object, device: torch.device, on: DeviceSpec | None = None) -> int:
    """Bytes of a user's budget on a device; a share of one that is not here is a share of what it has for tensors.

    Raises:
        BudgetError: it cannot be read.
    """
    if on is not None:
        return parse_bytes(budget, device_nbytes=on.usable_nbytes)
    return parse_bytes(budget, device_nbytes=device_nbytes(device) if isinstance(budget, float) else None)


def make(
    model: torch.nn.Module,
    batch: Any,
    budget: object,
    optimizer: torch.optim.Optimizer | None,
    options: StepOptions,
    *,
    progress: Progress | None = None,
    engine: str = AUTO,
    blocks: Blocks | None = None,
) -> Plan:
    """See `keepless.plan`."""
    check_module(model)
    with turned_off(model, options.takeover), loss_untouched(options.loss_fn, model):
        plan = _make(model, batch, budget, optimizer, options, progress, engine, blocks)
    note(plan.signature, options.takeover)
    return plan


def _make(
    model: torch.nn.Module,
    batch: Any,
    budget: object,
    optimizer: torch.optim.Optimizer | None,
    options: StepOptions,
    progress: Progress | None,
    engine: str,
    blocks: Blocks | None,
) -> Plan:
    rewrites = read_rewrites(options.rewrites)
    elsewhere = options.elsewhere
    options = replace(options, on=elsewhere)  # a file is read once
    if elsewhere is not None:
        if engine not in (AUTO, GRAPH) or blocks is not None:
            raise ArgumentError("on= plans a captured step, op by op: leave engine= and blocks= out.")
        engine = GRAPH
    if engine not in ENGINES:
        raise ArgumentError(f"There is no engine {engine!r}. Engines: {', '.join(ENGINES)}.")
    if blocks is not None:
        if engine not in (AUTO, BLOCKS):
            raise ArgumentError(f"blocks= is for the block engine, and engine={engine!r} is asked for.")
        engine = BLOCKS
    if rewrites and engine in (BLOCKS, EAGER):
        raise RewriteError(
            f"rewrites={rewrites}: rewrites change the captured step, and engine={engine!r} runs the model's code."
        )
    if engine in (BLOCKS, EAGER):
        model = module_steps.uncompiled(model)
    if options.solver != NAME:
        named_solver(options.solver)
    device = planned_device(model) if any(True for _ in model.parameters()) else torch.device("cpu")
    settings = read_settings(model, read_budget(budget, device, elsewhere), optimizer, options)
    tell = progress or _silent
    if engine in (BLOCKS, EAGER):
        return module_plans.make(model, batch, settings, tell, engine, blocks)
    try:
        return make_with(model, batch, settings, progress, optimizer)
    except CaptureError as error:
        if isinstance(error, (LossError, CheckpointingError, PositionError)):  # the same for every engine
            raise
        if rewrites:
            raise RewriteError(
                f"rewrites={rewrites} need the whole step as one graph, and it cannot be captured: {error}"
            ) from error
        if engine == AUTO:
            return module_plans.make_first(model, batch, settings, tell, error)
        if isinstance(error, BatchError) or elsewhere is not None:
            raise
        raise type(error)(
            f'{error} Or let it be planned by its blocks, or by module calls, as it is: engine="auto".'
        ) from error


def read_settings(
    model: torch.nn.Module, nbytes: int, optimizer: torch.optim.Optimizer | None, options: StepOptions
) -> Settings:
    """The settings of a caller's options.

    Arguments:
        nbytes: the budget; 0 where there is none.

    Raises:
        ParameterError: the optimizer steps something else.
        RewriteError: a rewrite is unknown, or does not go with the other options, or with the optimizer.
        BudgetError: `outside` cannot be read.
        DeviceError: `on` is not known.
    """
    on, rewrites = options.elsewhere, read_rewrites(options.rewrites)
    remove_abandoned()
    footprint = None
    if optimizer is not None:
        check_optimizer(optimizer, model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        footprint = optimizer_footprint(optimizer, list(trained.values()), device="" if on is None else on.type)
        if OPTIMIZER_IN_BACKWARD in rewrites and not options.accumulate:
            footprint = replace(footprint, updates=optimizer_updates(optimizer, trained, footprint))
    check_rewrites(rewrites, has_optimizer=optimizer is not None, accumulate=options.accumulate)
    return Settings(
        nbytes,
        footprint,
        options.loss_fn,
        options.accumulate,
        options.release_outputs,
        0 if options.outside == 0 else parse_bytes(options.outside, name="outside="),
        options.solver,
        options.seed,
        CostCache() if options.cache else None,
        own_loss=options.loss_fn is None,
        card=_card(model, on),
        rewrites=rewrites,
        optimizer_kind=type(innermost(optimizer)).__name__ if optimizer is not None else "",
        on=on,
        eager_ops=options.eager_ops,
    )


def _card(model: torch.nn.Module, on: DeviceSpec | None) -> CardAllocator | None:
    """The allocator of the device that it is planned for."""
    if on is not None and on.type != "cuda":
        return None
    if on is not None:
        return allocator_elsewhere(on)
    return card_allocator(planned_device(model)) if any(True for _ in model.parameters()) else None


def make_with(
    model: torch.nn.Module,
    batch: Any,
    settings: Settings,
    progress: Progress | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Plan:
    """A plan for settings that are already read.

    Arguments:
        optimizer: the caller's, to say what its rewrite would gain where nothing fits.
    """
    tell = progress or _silent
    measured = measure_step(model, batch, settings, tell)
    tell("solve", 0, 1)
    try:
        plan = solve_measured(measured, settings)
    except InfeasibleBudget as error:
        flat = flatten_inputs(Inputs.of(batch))
        raise with_offers(error, model, flat, batch, measured, settings, optimizer) from None
    tell("solve", 1, 1)
    if measured.is_here:
        plan.capture = Captures(replace(measured.capture, settings=settings_of_plan(settings, plan)))
    return plan


def measure_step(
    model: torch.nn.Module,
    batch: Any,
    settings: Settings,
    progress: Progress | None = None,
    *,
    are_positions_checked: bool = True,
) -> Measured:
    """The captured and measured step for settings that are already read; their solver does not matter.

    Ops for which the budget has no room are not run (`control.room`).

    Raises:
        PositionError: the step reads a table beyond its end, where that is checked.
    """
    tell = progress or _silent
    flat = flatten_inputs(Inputs.of(batch))
    if settings.on is not None:
        measured = _measure_elsewhere(model, flat, batch, settings, settings.on, tell)
        if are_positions_checked:
            check_positions(measured.capture.binding)
        return measured
    with untouched(model):
        tell("capture", 0, 1)
        capture, given = capture_call(model, flat, batch, settings, None)
        tell("capture", 1, 1)
        binding = capture.binding
        if are_positions_checked:
            check_positions(binding)
        room = room_for_trials(model, flat.tensors, settings.budget, binding.device)
        with measuring():
            costs = measure_costs(
                binding, settings.cache, lambda done, total: tell("measure", done, total), model=model, room=room
            )
        loss = measure_loss(binding, settings.loss_fn, batch, room) if settings.loss_fn is not None else None
    cost = cost_model(binding, costs, optimizer=settings.optimizer, loss=loss, accumulate=settings.accumulate)
    unrun = sum(cost.n == 0 for cost in (*costs.values(), loss) if cost is not None)
    return Measured(capture, cost, {**model_signature(model), **batch_signature(flat), **given}, num_unrun=unrun)


def _measure_elsewhere(
    model: torch.nn.Module, flat: FlatInputs, batch: Any, settings: Settings, device: DeviceSpec, tell: Progress
) -> Measured:
    """The captured step on a device that is not here, with analytic costs."""
    target = target_of(model, device)
    with untouched(model):
        tell("capture", 0, 1)
        capture, given = capture_call(model, flat, batch, settings, None, faking=faking_for(target))
        tell("capture", 1, 1)
        binding = capture.binding
        loss = None if settings.loss_fn is None else loss_work(binding, settings.loss_fn, batch)
    works = works_of(binding, optimizer=settings.optimizer, loss=loss)
    there, cost, facts = step_elsewhere(model, binding, device, target, works)
    return Measured(capture, cost, {**model_signature(model), **batch_signature(flat), **given, **facts}, there)


def _silent(stage: str, done: int, total: int) -> None:
    pass


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Ops that fail are the batch's fault: fake tensors let pass what kernels do not, mixed dtypes mostly."""
    try:
        yield
    except MeasureError as error:
        raise BatchError(f"An op of the captured step fails on real tensors of this batch's kind. {error}") from error


def capture_call(
    model: torch.nn.Module,
    flat: FlatInputs,
    batch: Any,
    settings: Settings,
    grad_outputs: tuple[int, ...] | None,
    templates: Templates | None = None,
    faking: TargetFaking | None = None,
    orders: Orders | None = None,
) -> tuple[Capture, dict[str, object]]:
    """Captures one call of a model, and what its plan's signature says of it.

    Arguments:
        grad_outputs: flat positions of the outputs that receive gradients; None to find them by the loss.
        templates: traces of the model with symbolic sizes, one of which may serve.
        faking: how fakes are made, for a device that is not here.
        orders: of gradients that come in another layout than their outputs, beside those that are found (`trace_step`).
    """
    check_rewrites(settings.rewrites, has_optimizer=settings.shape.has_optimizer, accumulate=settings.accumulate)
    plainly: Callable[..., Traced] = functools.partial(trace_step, faking=faking, orders=orders)
    # What is traced with symbols knows of no other layout.
    trace = templates.trace if templates is not None and not orders else plainly
    call = {"batch": batch, "loss_fn": settings.loss_fn, "grad_outputs": grad_outputs, "eager_ops": settings.eager_ops}
    traced = trace(model, flat, **call)
    shape = settings.shape
    binding = lower(traced, flat, model, shape)
    if (asking := traced.asking) is not None and asking.nbytes > widest_nbytes(binding.graph):
        traced = plainly(model, flat, **call, asks=False)  # each step would ask beside what its plan counts
        binding = lower(traced, flat, model, shape)
    facts: dict[str, object] = {
        "grad_outputs": list(traced.grad_outputs),
        "grad_orders": [[position, *order] for position, order in traced.orders.items()],
        "loss_position": traced.loss_position,
        "as_compiled": traced.as_compiled,
        "answers": list(traced.answers),
        "torch": torch.__version__,
        "device_facts": {key: str(value) for key, value in describe_device(binding.device).items()},
        "fingerprint": fingerprint(binding.graph),
        "accumulate": settings.accumulate,
        "release_outputs": settings.release_outputs,
        "state_nbytes": shape.state_nbytes,
        "outside_nbytes": shape.outside_nbytes,
        "has_optimizer": shape.has_optimizer,
        "solver": settings.solver if isinstance(settings.solver, str) else type(settings.solver).__name__,
        **optimizer_facts(model, settings),
    }
    if settings.rewrites:
        facts |= {"rewrites": list(settings.rewrites), "optimizer": settings.optimizer_kind}
    return Capture(
        binding, flat.without_tensors(), settings, traced.as_compiled, weakref.ref(model), refs_of(model)
    ), facts


def widest_nbytes(graph: Graph) -> int:
    """Bytes of the largest activation: each plan holds it at some time, beside what stands where the step begins."""
    return max((value.nbytes for value in graph.values if value.kind is Kind.ACTIVATION), default=MOST_GIVEN)


def refs_of(model: torch.nn.Module) -> tuple[weakref.ref[torch.nn.Module], ...]:
    """A model's modules, weakly."""
    return tuple(map(weakref.ref, model.modules()))


def solve_measured(measured: Measured, settings: Settings) -> Plan:
    """The solver's plan for a measured step.

    Raises:
        InfeasibleBudget: nothing fits; says what would.
    """

    def make(over: int) -> Plan:
        graph, cost = measured.graph, measured.cost
        budget = budget_with_reserve(settings.budget, over)
        try:
            found = solve(graph, cost, budget, solver=settings.solver, seed=settings.seed)
        except InfeasibleBudget as error:
            low = smallest(graph, cost)
            own = _own_lowest(settings.solver, error)
            raise explain_infeasible(
                graph, cost, settings.budget, low.program, low.peak, error.bound, own, measured.num_unrun
            ) from None
        return plan_of(measured, found, budget)

    if settings.card is None:
        return make(0)
    card = settings.card
    return within_card(make, lambda: lowest_plan(measured, settings.budget, card), settings.budget, card)


def lowest_plan(measured: Measured, nbytes: int, card: CardAllocator | None = None) -> Plan:
    """The plan of the smallest peak that the default planner finds, whatever its time; for what it needs where that is
    more than the budget: how much a card has to give for it is known only from its program.

    Arguments:
        card: its allocator, where the budget bounds what that reserves.

    Raises:
        InfeasibleBudget: it is above the budget, and ops that were not run may need more yet.
    """
    graph, cost = measured.graph, measured.cost
    low = smallest(graph, cost)
    needed = with_reserve(low.peak)
    if needed > nbytes and measured.num_unrun:
        stated = low.peak if card is None else allocation_of(graph, low.program, cost, card).reserved
        raise explain_infeasible(
            graph, cost, nbytes, low.program, stated, low.smallest_bound, num_unrun=measured.num_unrun
        )
    limit = max(nbytes, needed)
    return plan_of(measured, low, Budget({"device": limit}, reserve=limit - low.peak))


def settings_of_plan(settings: Settings, plan: Plan) -> Settings:
    """The settings by which other calls of a planned model are planned: for as much beside tensors as this plan."""
    return replace(settings, over=beyond_peak(plan))


def _own_lowest(solver: str | Solver, error: InfeasibleBudget) -> tuple[str, int] | None:
    """A solver's name and the lowest peak that it found; None for the default planner."""
    if named_solver(solver) is SOLVERS["keepless"]:
        return None
    return repr(solver) if isinstance(solver, str) else type(solver).__name__, error.smallest_budget


def plan_of(measured: Measured, found: Solution, budget: Budget) -> Plan:
    """The plan of a solution: verified again, its timeline predicted.

    Raises:
        ProgramError: the program breaks a rule or does not fit the budget.
    """
    graph, cost = measured.graph, measured.cost
    everything = evaluate(graph, cost, range(len(graph.ops)))
    return make_plan(
        graph,
        found.program,
        cost,
        budget,
        found.certificate,
        baseline=Baseline(with_reserve(everything.peak), everything.seconds),
        signature=measured.signature,
        smallest_budget=with_reserve(found.smallest_nbytes),
        smallest_bound=found.smallest_bound,
    )
