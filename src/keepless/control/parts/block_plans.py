"""Plans of blocks: module calls that run as captured segments, planned op by op across all of them.

What stands between the blocks runs as it is and is measured; a block that cannot be captured is a region, kept or
recomputed as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from keepless.binding import Binding
from keepless.capture import CAST_ONCE, Inputs, StandingForward, StepShape, flatten_inputs
from keepless.capture.ordering import Orders
from keepless.control.allocating import within_card
from keepless.control.captured import Settings
from keepless.control.parts.blocks import Library, kind_of
from keepless.control.parts.module_costs import measure_modules
from keepless.control.reserve import budget_with_reserve, explain_infeasible, with_reserve
from keepless.control.room import room_for_trials
from keepless.control.runner import Runner
from keepless.control.signature import batch_signature, model_signature, module_facts
from keepless.control.trials import cost_model, measure_costs
from keepless.cost import CostModel
from keepless.errors import BatchError, CaptureError, InfeasibleBudget, MeasureError, ParameterError, PlanError
from keepless.execute import Entry, make_entry
from keepless.ir import Graph, Program, Run
from keepless.ir.text import fingerprint
from keepless.machine import Baseline, Plan, make_plan, verify
from keepless.measure import OpCost
from keepless.modules import composite
from keepless.modules.blocks import Blocks, find_blocks, parts_of
from keepless.modules.chosen import Chosen
from keepless.modules.composite import Composer, Composite, Costed
from keepless.modules.pieces import Cut, cut_at
from keepless.modules.segments import Segment
from keepless.modules.sites import Site
from keepless.modules.survey import Call, Noted, Survey, saved_nbytes, shared_inputs
from keepless.passes import evaluate, from_order, reuse_storage
from keepless.solve import SOLVERS, named_solver, smallest, solve
from keepless.solve.transfer import Known as Transferred
from keepless.solve.transfer import transfer

BLOCKS = "blocks"


Edges = tuple[tuple[int, ...], frozenset[int], Orders]


@dataclass(frozen=True)
class MeasuredBlocks:
    """A step of which some calls are captured.

    Arguments:
        bindings: of the captured calls.
        edges: flat positions of their outputs that get a gradient, and of inputs that code behind them reads, too; and
            orders of gradients that come in another layout than their outputs.
        reasons: why other calls are none.
        around: why calls around these are none.
        unseen: paths of blocks that the step did not call.
        unseen_nbytes: what calls of these would add to the peak, if they are like the largest that it did call: the
            inputs of all, and what one of them saves.
        left_out: how many blocks the step did not call; parts of blocks do not count.
        num_unrun: distinct ops that were not run, as the budget has no room for them.
    """

    step: Composite
    library: Library
    bindings: dict[Site, Binding]
    edges: dict[Site, Edges]
    reasons: dict[Site, str]
    around: dict[Site, str]
    unseen: tuple[str, ...]
    unseen_nbytes: int
    left_out: int = 0
    num_unrun: int = 0


@dataclass(frozen=True)
class Known:
    """The torch side of a plan of blocks: kept with it while the process lives, never saved."""

    settings: Settings
    library: Library


_DEPTH = 3
"""So many levels below a block that cannot be captured its parts are tried."""


def measure(
    run: Runner, settings: Settings, tell: Any, blocks: Blocks | None, most_repeats: int
) -> list[MeasuredBlocks]:
    """Surveys a model, captures its blocks, and measures their ops and what stands between them.

    Where blocks cannot be captured there are several ways: each of them a region, or what can be captured of their
    parts, level by level. The first needs less memory, the others leave more choices: all are given.

    Raises:
        CaptureError: no block can be captured; says why.
    """
    model = run.model
    paths = find_blocks(model, blocks)
    if not paths:
        raise CaptureError("The model has no parts: there is no block to capture.")
    bench = _Bench(run, settings, tell, Library(block_shape(settings.accumulate)), most_repeats)
    found = [bench.measured(paths)]
    for _ in range(_DEPTH if blocks is None else 0):
        failed = {site.path for site in found[-1].reasons}
        inner = {path: parts_of(model, path) for path in failed}
        if not any(inner.values()):
            break
        paths = tuple(part for path in paths for part in (inner.get(path) or (path,)))
        found.append(bench.measured(paths, found[-1].reasons))
    captured = [replace(one, left_out=len(found[0].unseen)) for one in found if one.bindings]
    if not captured:
        first = next(iter(found[0].reasons.items()), None)
        why = f"{first[0]}: {first[1]}" if first else "none saves anything that a backward needs"
        raise CaptureError(f"No block of the model can be captured ({why}).")
    return captured


@dataclass
class _Bench:
    """Where blocks are measured: captures and costs serve for several ways to take a model apart."""

    run: Runner
    settings: Settings
    tell: Any
    library: Library
    most_repeats: int
    known: dict[str, OpCost] = field(default_factory=dict)

    def measured(
        self, paths: tuple[str, ...], known_reasons: Mapping[Site, str] = MappingProxyType({})
    ) -> MeasuredBlocks:
        run, settings = self.run, self.settings
        model = run.model

        def told(done: int, total: int) -> None:
            self.tell("measure", done, total)

        def choose(found: Survey, without: Container[int]) -> Cut:
            return cut_at(found, paths, without)

        pieces = measure_modules(run, settings, told, choose, set(paths), self.most_repeats)
        run.prepare()
        bindings: dict[Site, Binding] = {}
        edges: dict[Site, Edges] = {}
        reasons: dict[Site, str] = {}
        captured: dict[int, Costed] = {}
        survey = pieces.cut.survey
        calls = [survey.calls[number] for number in pieces.cut.regions]
        routed = _routed(model, calls)
        cast_once = {name: p for name, p in model.named_parameters() if name in survey.cast_once}
        for number, call in enumerate(calls):
            self.tell("capture", number, len(calls))
            try:
                module, flat = model.get_submodule(call.site.path), _flat(call.noted)
                if call.site in routed:
                    raise CaptureError(ROUTED)
                once = next((n for n, p in cast_once.items() if any(p is own for own in module.parameters())), None)
                if once is not None:
                    raise CaptureError(CAST_ONCE.format(once))
                received = pieces.received.get(number, {})
                positions = tuple(sorted(received))
                orders = {position: order for position, order in received.items() if order is not None}
                shared = shared_inputs(survey, call)
                with autocast_of(call, run.device.type):
                    binding = self.library.binding(module, flat, positions, shared, orders)
                captured[number] = Costed(binding, self._cost(binding, module))
            except (CaptureError, BatchError, ParameterError, MeasureError) as error:
                reasons[call.site] = str(error)
                continue
            bindings[call.site], edges[call.site] = binding, (positions, shared, orders)
        self.tell("capture", len(calls), len(calls))
        step = Composer(
            model, pieces.cut, pieces.gradients, settings.shape, survey.loss, pieces.cost, captured
        ).compose()
        around = {site: reason for site, reason in known_reasons.items() if site.path not in paths}
        called = {call.site.path for call in survey.calls}
        unseen = tuple(path for path in paths if path not in called)
        extra = 0
        if unseen:
            given = [survey.nbytes({s for s in call.inputs if survey.made[s] >= 0}) for call in calls]
            largest = max((saved_nbytes(survey, call) for call in calls), default=0)
            extra = len(unseen) * max(given, default=0) + largest
        keys = {op.key for binding in bindings.values() for op in binding.graph.ops}
        unrun = sum(cost.n == 0 for key, cost in self.known.items() if key in keys)
        return MeasuredBlocks(step, self.library, bindings, edges, reasons, around, unseen, extra, num_unrun=unrun)

    def _cost(self, binding: Binding, module: torch.nn.Module) -> CostModel:
        run, known = self.run, self.known
        room = room_for_trials(run.model, flatten_inputs(run.inputs).tensors, self.settings.budget, binding.device)
        known.update(measure_costs(binding, self.settings.cache, model=module, room=room, known=known))
        own = {op.key: known[op.key] for op in binding.graph.ops if op.key in known}
        accumulate = self.settings.accumulate
        return cost_model(binding, own, optimizer=None, loss=None, accumulate=accumulate, holds_state=False)


ROUTED = (
    "It gets another number of rows than modules alike beside it, as experts do to which a router sends rows: the next "
    "step's number will be another one."
)


def _routed(model: torch.nn.Module, calls: Sequence[Call]) -> set[Site]:
    """Calls of modules that are alike and stand side by side, and get matrices of different heights."""
    groups: dict[Any, dict[Site, tuple[int, ...]]] = {}
    for call in calls:
        flat = call.noted.flat if call.noted is not None else None
        parent, _, name = call.site.path.rpartition(".")
        if flat is not None and name.isdigit():
            heights = tuple(facts[1][0] for facts in flat.facts.values() if len(facts[1]) == 2)
            kind = kind_of(model.get_submodule(call.site.path))
            groups.setdefault((parent, kind), {})[call.site] = heights
    return {site for sites in groups.values() if len(set(sites.values())) > 1 for site in sites}


def block_shape(accumulate: bool) -> StepShape:
    """A block's part of a step: what it gives out is others' to hold, and others may read its parameters."""
    return StepShape(accumulate=accumulate, release_outputs=True, shared_parameters=True)


def autocast_of(call: Call, device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast as it was around a call."""
    assert call.noted is not None
    enabled, dtype, cached = call.noted.autocast
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached)


def _flat(noted: Noted | None) -> Any:
    if noted is None or noted.flat is None:
        raise CaptureError("" if noted is None else noted.reason)
    return noted.flat


def solved(
    run: Runner, ways: Sequence[MeasuredBlocks], settings: Settings, over: int, like: Plan | None = None
) -> Plan:
    """The fastest plan of blocks for a budget less `over` bytes, of all ways to take the model apart.

    Arguments:
        like: a plan of another kind of step, from which decisions are carried over where they fit.

    Raises:
        InfeasibleBudget: none was found.
    """
    plans: list[Plan] = []
    errors: list[InfeasibleBudget] = []
    try:
        for measured in ways:
            try:
                plans.append(_solved(run, measured, settings, over, like))
            except InfeasibleBudget as error:
                errors.append(error)
        if not plans:
            raise min(errors, key=lambda error: error.smallest_budget)
    finally:
        errors.clear()  # their tracebacks hold this frame, and the batch
    best = min(plans, key=lambda plan: plan.predicted_seconds - plan.baseline_seconds)  # all keep alike
    best.smallest_budget = min(plan.smallest_budget for plan in plans)
    return best


def _solved(run: Runner, measured: MeasuredBlocks, settings: Settings, over: int, like: Plan | None) -> Plan:
    if settings.card is None:
        return _solved_less(run, measured, settings, over, like)
    card = settings.card.with_handles(2)
    return within_card(
        lambda more: _solved_less(run, measured, settings, over + more, like), None, settings.budget, card
    )


def _solved_less(run: Runner, measured: MeasuredBlocks, settings: Settings, over: int, like: Plan | None) -> Plan:
    step = measured.step
    graph, cost = step.graph, step.cost
    budget = budget_with_reserve(settings.budget)
    over += measured.unseen_nbytes
    inner = replace(budget, reserve=min(budget.reserve + over, settings.budget - 1))
    try:
        found = None
        if like is not None and named_solver(settings.solver) is SOLVERS["keepless"]:
            order = tuple(instr.op for instr in like.program if isinstance(instr, Run))
            found = transfer(graph, cost, inner.device, [Transferred(like.graph, order)])
        if found is None or found.peak > inner.device:
            found = solve(graph, cost, inner, solver=settings.solver, seed=settings.seed)
    except InfeasibleBudget as error:
        low = smallest(graph, cost)
        raise explain_infeasible(
            graph, cost, settings.budget, low.program, low.peak + over, error.bound, num_unrun=measured.num_unrun
        ) from None
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
                *map(sorted, measured.edges[s.site][:2]),
                fingerprint(measured.bindings[s.site].graph),
                [[position, *order] for position, order in sorted(measured.edges[s.site][2].items())],
            ]
            for s in step.segments
        ],
        "regions": [[site.path, site.number, op] for site, op in step.regions.items()],
        "reasons": [[site.path, site.number, reason] for site, reason in measured.reasons.items()],
        "unseen": list(measured.unseen),
        "left_out": measured.left_out,
        "around": [[site.path, site.number, reason] for site, reason in measured.around.items()],
    }
    plan = make_plan(
        graph,
        found.program,
        cost,
        budget,
        found.certificate,
        baseline=Baseline(with_reserve(everything.peak + measured.unseen_nbytes), everything.seconds),
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
        rows, segments = signature["segments"], _segments_of(plan)
        assert isinstance(rows, list)
        order = [instr.op for instr in plan.program if isinstance(instr, Run)]
        orders = composite.own_orders(segments, graph, order)
        costs = composite.own_costs(segments, graph, plan.cost)
        sites = _recomputed(plan, plan.program)
        runs = {
            segment.site: Segment(
                _Bind(
                    library,
                    orders[segment.site],
                    tuple(map(int, row[6])),
                    frozenset(map(int, row[7])),
                    str(row[8]),
                    costs[segment.site],
                    {int(position): tuple(map(int, order)) for rows in row[9:] for position, *order in rows},
                )
            )
            for segment, row in zip(segments, rows, strict=True)
        }
        unseen = signature["unseen"]
        assert isinstance(unseen, list)
    except (AssertionError, KeyError, TypeError, ValueError, IndexError) as error:
        raise PlanError("The plan's list of captured module calls is damaged. Plan again.") from error
    return Chosen(sites, plan.baseline_peak, runs, frozenset(map(str, unseen)), plan)


def regions_of(plan: Plan) -> frozenset[Site]:
    """The calls of a plan of blocks that can be recomputed as a whole."""
    rows = plan.signature["regions"]
    assert isinstance(rows, list)
    return frozenset(Site(str(path), int(number)) for path, number, _ in rows)


def tightened(chosen: Chosen, program: Program) -> Chosen:
    """What runs by another program in the ops of its plan.

    Raises:
        ProgramError: the part of a captured call breaks a rule.
    """
    plan = chosen.plan
    assert plan is not None
    segments = _segments_of(plan)
    orders = composite.own_orders(segments, plan.graph, [instr.op for instr in program if isinstance(instr, Run)])
    runs = {site: segment.by(orders[site]) for site, segment in chosen.segments.items()}
    return replace(chosen, sites=chosen.sites | _recomputed(plan, program), segments=runs, program=program)


def _segments_of(plan: Plan) -> list[composite.Segment]:
    rows = plan.signature["segments"]
    assert isinstance(rows, list)
    return [
        composite.Segment(Site(str(path), int(number)), (int(first), int(last)), (int(back), int(end)))
        for path, number, first, last, back, end, *_ in rows
    ]


def _recomputed(plan: Plan, program: Program) -> frozenset[Site]:
    """The calls that a program recomputes as a whole."""
    regions = plan.signature["regions"]
    assert isinstance(regions, list)
    again = {instr.op for instr in program if isinstance(instr, Run) and instr.replay}
    return frozenset(Site(str(path), int(number)) for path, number, op in regions if int(op) in again)


@dataclass(frozen=True)
class _Bind:
    """Makes the entry of one captured call."""

    library: Library
    order: list[int]
    received: tuple[int, ...]
    shared: frozenset[int]
    fingerprint: str
    cost: CostModel
    orders: Orders

    def __call__(self, standing: StandingForward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Entry | str:
        module = standing.module
        try:
            flat = flatten_inputs(Inputs(*args, **kwargs))
            binding = self.library.binding(module, flat, self.received, self.shared, self.orders)
        except (CaptureError, BatchError, ParameterError) as error:
            return str(error)
        if fingerprint(binding.graph) != self.fingerprint:
            return "its captured graph is not the one that was planned"
        return make_entry(module, flat.without_tensors(), binding, self.program(binding.graph), cost=self.cost)

    def by(self, order: list[int]) -> _Bind:
        return replace(self, order=order)

    def program(self, graph: Graph) -> Program:
        return own_program(graph, self.order)


def own_program(graph: Graph, order: list[int]) -> Program:
    """The program of one captured call, verified.

    Raises:
        ProgramError: it breaks a rule.
    """
    program = reuse_storage(graph, from_order(graph, order))
    verify(graph, program)
    return program
