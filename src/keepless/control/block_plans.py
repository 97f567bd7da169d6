"""Plans of blocks: module calls that run as captured segments, planned op by op across all of them.

What stands between the blocks runs as it is and is measured; a block that cannot be captured is a region, kept or
recomputed as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from keepless.binding import Binding
from keepless.capture import Inputs, StandingForward, StepShape, flatten_inputs
from keepless.control.blocks import Library
from keepless.control.captured import Settings
from keepless.control.module_costs import measure_modules
from keepless.control.reserve import budget_with_reserve, explain_infeasible, with_reserve
from keepless.control.runner import Runner
from keepless.control.signature import batch_signature, model_signature, module_facts
from keepless.control.trials import cost_model, op_trials
from keepless.errors import BatchError, CaptureError, InfeasibleBudget, MeasureError, ParameterError, PlanError
from keepless.execute import Entry, make_entry
from keepless.ir import Graph, Program, Run
from keepless.ir.text import fingerprint
from keepless.machine import Baseline, Plan, make_plan, verify
from keepless.measure import OpCost, measure_ops
from keepless.modules import composite
from keepless.modules.blocks import Blocks, find_blocks
from keepless.modules.composite import Composer, Composite, Costed
from keepless.modules.pieces import cut_at
from keepless.modules.planned import Chosen
from keepless.modules.segments import Segment
from keepless.modules.sites import Site
from keepless.modules.survey import Noted, shared_inputs
from keepless.passes import evaluate, from_order, reuse_storage
from keepless.solve import smallest, solve

BLOCKS = "blocks"


@dataclass(frozen=True)
class MeasuredBlocks:
    """A step of which some calls are captured.

    Arguments:
        bindings: of the captured calls.
        edges: flat positions of their outputs that get a gradient, and of inputs that code behind them reads, too.
        reasons: why other calls are none.
    """

    step: Composite
    library: Library
    bindings: dict[Site, Binding]
    edges: dict[Site, tuple[tuple[int, ...], frozenset[int]]]
    reasons: dict[Site, str]


@dataclass(frozen=True)
class Known:
    """The torch side of a plan of blocks: kept with it while the process lives, never saved."""

    settings: Settings
    library: Library


def measure(run: Runner, settings: Settings, tell: Any, blocks: Blocks | None) -> MeasuredBlocks:
    """Surveys a model, captures its blocks, and measures their ops and what stands between them.

    Raises:
        CaptureError: no block can be captured; says why.
    """
    model = run.model
    paths = find_blocks(model, blocks)
    if not paths:
        raise CaptureError("The model has no parts: there is no block to capture.")

    def told(done: int, total: int) -> None:
        tell("measure", done, total)

    pieces = measure_modules(run, settings, told, lambda found, without: cut_at(found, paths, without), set(paths))
    run.prepare()
    library = Library(block_shape(settings.accumulate))
    bindings: dict[int, Binding] = {}
    edges: dict[Site, tuple[tuple[int, ...], frozenset[int]]] = {}
    reasons: dict[Site, str] = {}
    known: dict[str, OpCost] = {}
    captured: dict[int, Costed] = {}
    calls = [pieces.cut.survey.calls[number] for number in pieces.cut.regions]
    for number, call in enumerate(calls):
        tell("capture", number, len(calls))
        module = model.get_submodule(call.site.path)
        positions = tuple(sorted(pieces.received.get(number, ())))
        try:
            shared = shared_inputs(pieces.cut.survey, call)
            binding = library.binding(module, _flat(call.noted), positions, shared)
            fresh = {trial.key: trial for trial in op_trials(binding) if trial.key not in known}
            known.update(measure_ops(list(fresh.values()), cache=settings.cache, device=binding.device))
        except (CaptureError, BatchError, ParameterError, MeasureError) as error:
            reasons[call.site] = str(error)
            continue
        own = {op.key: known[op.key] for op in binding.graph.ops if op.key in known}
        cost = cost_model(binding, own, optimizer=None, loss=None, accumulate=settings.accumulate)
        bindings[number], edges[call.site] = binding, (positions, shared)
        captured[number] = Costed(binding, cost)
    tell("capture", len(calls), len(calls))
    if not captured:
        first = next(iter(reasons.items()), None)
        why = f"{first[0]}: {first[1]}" if first else "none saves anything that a backward needs"
        raise CaptureError(f"No block of the model can be captured ({why}).")
    found = Composer(
        model, pieces.cut, pieces.gradients, settings.shape, pieces.cut.survey.loss, pieces.cost, captured
    ).compose()
    sites = {calls[number].site: binding for number, binding in bindings.items()}
    return MeasuredBlocks(found, library, sites, edges, reasons)


def block_shape(accumulate: bool) -> StepShape:
    """A block's part of a step: what it gives out is others' to hold."""
    return StepShape(accumulate=accumulate, release_outputs=True)


def _flat(noted: Noted | None) -> Any:
    if noted is None or noted.flat is None:
        raise CaptureError("" if noted is None else noted.reason)
    return noted.flat


def solved(run: Runner, measured: MeasuredBlocks, settings: Settings, over: int) -> Plan:
    """The plan of blocks for a budget less `over` bytes.

    Raises:
        InfeasibleBudget: none was found.
    """
    step = measured.step
    graph, cost = step.graph, step.cost
    budget = budget_with_reserve(settings.budget)
    inner = replace(budget, reserve=min(budget.reserve + over, settings.budget - 1))
    try:
        found = solve(graph, cost, inner, solver=settings.solver, seed=settings.seed)
    except InfeasibleBudget as error:
        low = smallest(graph, cost)
        raise explain_infeasible(graph, cost, settings.budget, low.program, low.peak + over, error.bound) from None
    everything = evaluate(graph, cost, range(len(graph.ops)))
    solver = settings.solver if isinstance(settings.solver, str) else type(settings.solver).__name__
    facts: dict[str, object] = {
        **module_facts(run.model, run.device, settings, graph),
        "engine": BLOCKS,
        "solver": solver,
        "segments": [
            [
                s.site.path,
                s.site.number,
                *s.forward,
                *s.backward,
                *map(sorted, measured.edges[s.site]),
                fingerprint(measured.bindings[s.site].graph),
            ]
            for s in step.segments
        ],
        "regions": [[site.path, site.number, op] for site, op in step.regions.items()],
        "reasons": [[site.path, site.number, reason] for site, reason in measured.reasons.items()],
    }
    plan = make_plan(
        graph,
        found.program,
        cost,
        budget,
        found.certificate,
        baseline=Baseline(with_reserve(everything.peak), everything.seconds),
        signature={**model_signature(run.model), **batch_signature(flatten_inputs(run.inputs)), **facts},
        smallest_budget=with_reserve(found.smallest_nbytes + over),
        smallest_bound=found.smallest_bound,
    )
    plan.capture = Known(settings, measured.library)
    return plan


def chosen_of(plan: Plan) -> Chosen:
    """The calls that a plan captures, each with its own program, and those that it recomputes.

    Raises:
        PlanError: the plan's list of calls is damaged.
    """
    graph, signature = plan.graph, plan.signature
    known = plan.capture
    library = known.library if isinstance(known, Known) else Library(block_shape(bool(signature.get("accumulate"))))
    try:
        rows, regions = signature["segments"], signature["regions"]
        assert isinstance(rows, list)
        assert isinstance(regions, list)
        segments = [
            composite.Segment(Site(str(path), int(number)), (int(first), int(last)), (int(back), int(end)))
            for path, number, first, last, back, end, *_ in rows
        ]
        order = [instr.op for instr in plan.program if isinstance(instr, Run)]
        orders = composite.own_orders(segments, graph, order)
        again = {instr.op for instr in plan.program if isinstance(instr, Run) and instr.replay}
        sites = frozenset(Site(str(path), int(number)) for path, number, op in regions if int(op) in again)
        runs = {
            segment.site: Segment(
                _Bind(library, orders[segment.site], tuple(map(int, row[6])), frozenset(map(int, row[7])), str(row[8]))
            )
            for segment, row in zip(segments, rows, strict=True)
        }
    except (AssertionError, KeyError, TypeError, ValueError, IndexError) as error:
        raise PlanError("The plan's list of captured module calls is damaged. Plan again.") from error
    return Chosen(sites, plan.baseline_peak, runs)


@dataclass(frozen=True)
class _Bind:
    """Makes the entry of one captured call."""

    library: Library
    order: list[int]
    received: tuple[int, ...]
    shared: frozenset[int]
    fingerprint: str

    def __call__(self, standing: StandingForward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Entry | str:
        module = standing.module
        try:
            flat = flatten_inputs(Inputs(*args, **kwargs))
            binding = self.library.binding(module, flat, self.received, self.shared)
        except (CaptureError, BatchError, ParameterError) as error:
            return str(error)
        if fingerprint(binding.graph) != self.fingerprint:
            return "its captured graph is not the one that was planned"
        return make_entry(module, flat.without_tensors(), binding, own_program(binding.graph, self.order))


def own_program(graph: Graph, order: list[int]) -> Program:
    """The program of one captured call, verified.

    Raises:
        ProgramError: it breaks a rule.
    """
    program = reuse_storage(graph, from_order(graph, order))
    verify(graph, program)
    return program
