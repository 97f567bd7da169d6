"""Plans of module calls: for any module, measured by running it, and run by the eager engine.

The step is surveyed, measured in steps of which every region is recomputed (the smallest that there are), planned for,
and run once by its plan before it is given out: where that step rose above the budget, it is planned again for less.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from keepless import _compat
from keepless.capture import Inputs, flatten_inputs, planned_device
from keepless.capture.checkpointed import checkpointed_places, refuse_checkpointing
from keepless.control.captured import Settings, settings_from
from keepless.control.module_costs import MeasuredModules, measure_modules
from keepless.control.reserve import budget_with_reserve, explain_infeasible, with_reserve
from keepless.control.runner import Runner
from keepless.control.signature import batch_signature, check_signature, model_signature
from keepless.errors import CaptureError, InfeasibleBudget, MeasureError, ParameterError, PlanError, SolverError
from keepless.ir import Certificate, Status
from keepless.ir.text import fingerprint
from keepless.machine import Baseline, Plan, make_plan
from keepless.measure import describe_device
from keepless.measure.steps import increments
from keepless.modules.planned import (
    CONSTANT,
    STRUCTURE,
    Chosen,
    Key,
    PlannedModules,
    RegionForward,
    autocast_now,
    model_key,
)
from keepless.modules.sites import Site, tensors_in
from keepless.modules.untouched import untouched
from keepless.passes import evaluate, from_order, reuse_storage
from keepless.solve.floor import floor_bound
from keepless.solve.regions import NAME, Region, Regions, RegionTree
from keepless.solve.solution import solution

EAGER = "eager"
_ROUNDS = 3
"""How often a plan whose step rose above its budget is planned again for less."""


def is_eager(plan: Plan) -> bool:
    """Whether a plan is one of module calls."""
    return plan.signature.get("engine") == EAGER


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module that torch.compile wrapped; a module that it did not wrap, as it is."""
    inner = model.__dict__.get("_modules", {}).get("_orig_mod")
    return inner if isinstance(inner, torch.nn.Module) else model


def make(model: torch.nn.Module, batch: Any, settings: Settings, tell: Any) -> Plan:
    """A plan of module calls. See `keepless.plan`."""
    if settings.solver not in ("keepless", NAME):
        raise SolverError(
            f"The eager engine recomputes module calls as a whole and plans with a search of its own; solver="
            f"{settings.solver!r} plans single ops, for the graph engine."
        )
    model = uncompiled(model)
    _check(model)
    _check_alone(model)
    device = planned_device(model)
    inputs, batch = standing_alone(batch)
    with (
        recording(),
        untouched(model, device, tensors_of(inputs)) as before,
        _as_written(),
        without_plan(model),
    ):
        run = Runner(model, inputs, batch, settings.loss_fn, settings, device, before)
        try:
            measured = measure_modules(run, settings, lambda done, total: tell("measure", done, total))
            tell("solve", 0, 1)
            plan = _landed(run, measured, settings)
            tell("solve", 1, 1)
        except RecursionError as error:
            raise MeasureError(
                f"Python's recursion limit of {sys.getrecursionlimit()} does not let this model's modules, nested as "
                "deeply as they are, be recomputed in one another: raise it with sys.setrecursionlimit."
            ) from error
    return plan


def tensors_of(batch: Any) -> list[torch.Tensor]:
    """The tensors of a call."""
    inputs = Inputs.of(batch)
    leaves = _compat.tree_leaves((inputs.args, inputs.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def standing_alone(batch: Any) -> tuple[Inputs, Any]:
    """The call of a batch, and the batch: tensors that come from a graph of the caller's are cut off from it, so that
    a trial's backward ends there.
    """
    known: dict[int, torch.Tensor] = {}

    def alone(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.is_leaf or not leaf.requires_grad:
            return leaf
        return known.setdefault(id(leaf), leaf.detach().requires_grad_())

    inputs = Inputs.of(batch)
    args, kwargs = _compat.tree_map(alone, (inputs.args, inputs.kwargs))
    own = Inputs(*args, **kwargs)
    return own, own if batch is inputs else _compat.tree_map(alone, batch)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd records inside the block, whatever stands around it."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _check(model: torch.nn.Module) -> None:
    tensors = [*model.parameters(), *model.buffers()]
    if any(map(torch.nn.parameter.is_lazy, tensors)):
        raise CaptureError(
            "The model has lazy parameters, whose shapes are not known yet: call it once on a batch before planning."
        )
    if any(tensor.is_meta for tensor in tensors):
        raise CaptureError(
            "The eager engine measures by running the model, and this one is on the meta device: give it weights, or "
            "plan with the graph engine."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ParameterError("No parameter of the model requires a gradient: there is nothing to train.")
    refuse_checkpointing(checkpointed_places(model))
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise CaptureError(f"The model is on several devices ({', '.join(devices)}); a plan is for one.")


def _check_alone(model: torch.nn.Module) -> None:
    """Refuses a model of which a part has a plan, its own or that of a model around both: two plans in one module
    would recompute each other's recomputes.

    Raises:
        PlanError: names the part.
    """
    for path, module in model.named_modules():
        standing = module.__dict__.get("forward")
        if isinstance(standing, PlannedModules) and path:
            raise PlanError(
                f"The module {path!r} inside this model has a plan of its own: call keepless.remove on it first, or "
                "plan it alone."
            )
        if isinstance(standing, RegionForward) and standing.planned is not planned_modules(model):
            raise PlanError(
                f"The module {path or type(module).__name__!r} runs by the plan of a model around it: call "
                "keepless.remove on that model first."
            )


@contextlib.contextmanager
def _as_written() -> Iterator[None]:
    """Compiled modules run the code that they were compiled from: their calls are seen only there."""
    with torch.compiler.set_stance("force_eager"):
        yield


def planned_modules(model: torch.nn.Module) -> PlannedModules | None:
    """The plan of module calls that stands in a model, if any."""
    found = uncompiled(model).__dict__.get("forward")
    return found if isinstance(found, PlannedModules) else None


@contextlib.contextmanager
def without_plan(model: torch.nn.Module) -> Iterator[None]:
    """The model runs its own code inside the block; a plan that stands in it is put back afterwards."""
    planned = planned_modules(model)
    if planned is None:
        yield
        return
    planned.take_out()
    try:
        yield
    finally:
        planned.put_in()


def _landed(run: Runner, measured: MeasuredModules, settings: Settings) -> Plan:
    """The plan, after a step of it has stayed within the budget."""
    over = 0
    for _ in range(_ROUNDS):
        run.prepare()  # a plan names what the model is like before a forward
        plan = _solved(run, measured, settings, over)
        resident = sum(plan.graph.values[v].nbytes for v in plan.graph.inputs)
        planned = apply(run.model, plan)
        planned.on_miss = _never
        try:
            run.prepare()
            run.forward_backward()  # regions are watched the first time
            run.prepare()
            plan.measured_peak = resident + increments(run.forward_backward, run.device)
        finally:
            planned.take_out()
        if plan.measured_peak <= settings.budget:
            return plan
        over += plan.measured_peak - settings.budget
    raise InfeasibleBudget(
        f"A planned step rose to {plan.measured_peak} bytes, above the budget of {settings.budget}, and did so again "
        f"when {over} bytes less were planned for. Give a budget of {settings.budget + over} bytes.",
        smallest_budget=settings.budget + over,
        bound=plan.smallest_bound,
        blocking="",
    )


def _solved(run: Runner, measured: MeasuredModules, settings: Settings, over: int) -> Plan:
    graph, cost, cut = measured.graph, measured.cost, measured.cut
    budget = budget_with_reserve(settings.budget)
    limit = budget.device - over
    solver = Regions(cut.tree)
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
        order = cut.tree.order(lowest, len(graph.ops))
        least = solution(graph, cost, order, Certificate(NAME, Status.FEASIBLE))
        raise explain_infeasible(graph, cost, settings.budget, least.program, low + over, bound)
    everything = evaluate(graph, cost, range(len(graph.ops)))
    flat = flatten_inputs(run.inputs)
    tree = cut.tree
    facts: dict[str, object] = {
        "engine": EAGER,
        "autocast": autocast_now(run.model),
        "torch": torch.__version__,
        "device_facts": {key: str(value) for key, value in describe_device(run.device).items()},
        "fingerprint": fingerprint(graph),
        "accumulate": settings.accumulate,
        "release_outputs": settings.release_outputs,
        "state_nbytes": settings.shape.state_nbytes,
        "outside_nbytes": settings.outside,
        "has_optimizer": settings.optimizer is not None,
        "own_loss": settings.own_loss,
        "solver": NAME,
        "regions": [[site.path, site.number, r.first, r.last] for site, r in zip(cut.sites, tree.regions, strict=True)],
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


def recomputed_sites(plan: Plan) -> frozenset[Site]:
    """The module calls that a plan recomputes.

    Raises:
        PlanError: the plan's calls are not those of its program.
    """
    signature = plan.signature
    rows, saving, chosen = (signature.get(name) for name in ("regions", "saving", "recomputed"))
    try:
        assert isinstance(rows, list)
        assert isinstance(saving, list)
        assert isinstance(chosen, list)
        sites = [Site(str(path), int(number)) for path, number, _, _ in rows]
        regions = tuple(Region(int(first), int(last)) for _, _, first, last in rows)
        count = plan.graph.loss_op
        assert count is not None
        tree = RegionTree(regions, count, frozenset(map(int, saving)))
        numbers = frozenset(map(int, chosen))
        order = tree.order(numbers, len(plan.graph.ops))
        program = reuse_storage(plan.graph, from_order(plan.graph, order))
        found = frozenset(sites[number] for number in numbers)
    except (AssertionError, TypeError, ValueError, IndexError) as error:
        raise PlanError("The plan's list of recomputed module calls is damaged. Plan again.") from error
    if program.instrs != plan.program.instrs:
        raise PlanError("The plan's recomputed module calls are not what its program recomputes. Plan again.")
    return found


def apply(model: torch.nn.Module, plan: Plan) -> PlannedModules:
    """Puts a plan of module calls into a model that has none. Calls of other shapes are planned on the spot.

    Raises:
        PlanError: the plan was made for another model.
    """
    model = uncompiled(model)
    check_signature(plan.signature, model_signature(model), "model")
    _check_alone(model)
    sites = recomputed_sites(plan)
    planned = PlannedModules(model, None)
    settings = settings_of(plan)

    def on_miss(here: PlannedModules, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Chosen:
        if not any(p.requires_grad for p in model.parameters()):
            return Chosen(frozenset())
        stand = any(p.grad is not None for p in model.parameters())
        own = replace(settings, accumulate=settings.accumulate or stand)
        if not settings.own_loss:
            own = replace(own, loss_fn=_any_loss, own_loss=False)
        try:
            made = make(model, Inputs(*args, **kwargs), own, _silent)
            return Chosen(recomputed_sites(made), made.baseline_peak)
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
    planned.put_in()
    for key in keys:
        planned.add(key, Chosen(sites, plan.baseline_peak))
    planned.on_miss = on_miss
    return planned


def settings_of(plan: Plan) -> Settings:
    """What a plan was asked for; of one from a file, as far as it says."""
    known = plan.capture
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
