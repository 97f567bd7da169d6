"""From steps that were run piece by piece to the graph of module calls and its costs."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass, replace

import torch

from keepless.control.captured import Settings
from keepless.control.runner import Runner, autocast_over
from keepless.cost import CostModel, Origin
from keepless.eager import checkpoint_counters, forget_regions
from keepless.errors import LossError
from keepless.ir import Graph, Phase
from keepless.measure.parts import Part, memory_parts
from keepless.modules.pieces import Cut, cut
from keepless.modules.probe import Probe
from keepless.modules.stepgraph import StepGraph
from keepless.modules.survey import Survey, survey
from keepless.passes import evaluate
from keepless.solve.holds import spread_over, with_holds
from keepless.solve.regions import RegionTree

Tell = Callable[[int, int], None]

_REPEATS = ((0.1, 5), (1.0, 3), (float("inf"), 2))
"""Timed steps by the seconds of one."""
_FAR = 8
"""A recompute is found in the predicted order no further ahead than so many backward ops."""
_PASSES = 4
"""Steps that are run but not timed, mostly: the survey, two to warm up, one for bytes."""
_MOST_WARM_UPS = 4
_MOST_SINGLE = 3
"""Calls of one kind that are left out one by one, a step for each."""


@dataclass(frozen=True)
class MeasuredModules:
    """A step as a graph of pieces, its costs, and the cut that it comes from.

    Arguments:
        tree: the regions in the graph's ops; where calls are to be captured, in pieces.
        gradients: name of a parameter -> the backward op in which its gradient first stands.
        received: region -> flat positions of its outputs that get a gradient, of calls that were noted, and that
            gradient's order in memory (`Probe.received`).
        failed: positions in the survey's calls of those that cannot be recomputed.
    """

    graph: Graph
    cost: CostModel
    tree: RegionTree
    cut: Cut
    gradients: dict[str, int]
    received: dict[int, dict[int, tuple[int, ...] | None]]
    failed: frozenset[int]


Choose = Callable[[Survey, Container[int]], Cut]
"""The calls of a survey that are regions, without some of them."""


def measure_modules(
    run: Runner,
    settings: Settings,
    tell: Tell,
    choose: Choose = cut,
    noted: Collection[str] = (),
    most_repeats: int = 5,
) -> MeasuredModules:
    """Surveys a model and measures every piece of its step, in steps of which all regions are recomputed.

    Arguments:
        choose: the regions.
        noted: paths of modules of whose calls the survey notes how they look.
        most_repeats: timed steps, at most.

    Raises:
        LossError: the step has no scalar loss with a gradient.
        MeasureError: the forward makes other calls from one time to the next.
    """
    model = run.model
    forget_regions()  # known from other sets of regions around them, they are recomputed with more care, and bytes
    tell(0, 1)
    run.prepare()
    own_loss = run.loss_of if run.loss_fn is None else None
    found = survey(model, run.inputs.args, run.inputs.kwargs, own_loss=own_loss, again=run.prepare, noted=noted)
    run.steps_before = found.leftovers.num_steps
    probe, once, failed = _recomputable(run, found, choose)
    pieces = probe.cut
    with probe.regionwise():
        repeats = min(most_repeats, next(count for limit, count in _REPEATS if once < limit))
        total = _PASSES + 2 * repeats
        tell(3, total)
        run.prepare()
        parts = memory_parts(lambda mark: _marked(run, probe, mark), run.device)
        tell(4, total)
        whole: list[dict[int, float]] = []
        for number in range(repeats):
            run.prepare()
            whole.append(_timed(run, probe, lambda: run.note_loss(_step(run, probe))))
            tell(5 + number, total)
    gradients = dict(probe.gradients)
    forwards: list[dict[int, float]] = []
    with probe.plainly(found.kept_everything):
        for number in range(repeats):
            run.prepare()
            forwards.append(_timed(run, probe, lambda: _forward(run, probe)))
            tell(5 + repeats + number, total)
    steps = StepGraph(model, pieces, gradients, settings.shape, found.loss, holds=not noted)
    graph, tree = steps.build(), pieces.tree
    seconds, spread = _seconds(graph, pieces, forwards, whole, settings)
    place: Sequence[int] = range(len(graph.ops))
    if not noted:
        held = [steps.held_by(number) for number in range(len(tree.regions))]
        state = torch.get_rng_state().nbytes if run.device.type == "cpu" else 0
        graph, tree, place = with_holds(graph, tree, held, list(map(str, pieces.sites)), state)
    scratch = _scratch(_without(graph, steps.before), tree, place, parts)
    if settings.optimizer is not None:
        scratch[-1] = settings.optimizer.scratch_nbytes
    seconds = spread_over(seconds, place, len(graph.ops))
    cost = CostModel(tuple(seconds), tuple(scratch), {}, Origin.MEASURED, spread)
    return MeasuredModules(graph, cost, tree, pieces, gradients, dict(probe.received), failed)


def _recomputable(run: Runner, found: Survey, choose: Choose) -> tuple[Probe, float, frozenset[int]]:
    """A probe that is warmed up, and the seconds of a step; its regions are calls that can be recomputed.

    Some cannot: code after the call changes its inputs in place, say. After some of those, all of a kind are left out.
    """
    without: set[int] = set()
    while True:
        probe = Probe(run.model, choose(found, without))
        try:
            with probe.regionwise():
                return probe, _warmed_up(run, probe), frozenset(without)
        except RuntimeError:
            if probe.failed is None:
                raise
        number = probe.cut.regions[probe.failed]
        kind = found.calls[number].kind
        without.add(number)
        if sum(found.calls[i].kind == kind for i in without) > _MOST_SINGLE:
            without.update(i for i, call in enumerate(found.calls) if call.kind == kind)


def _warmed_up(run: Runner, probe: Probe) -> float:
    """Runs steps until regions are known, which the first ones are watched for; the seconds of the last."""
    for _ in range(_MOST_WARM_UPS):
        watched = checkpoint_counters().watched
        start = time.perf_counter()
        run.prepare()
        run.note_loss(_step(run, probe))
        if checkpoint_counters().watched == watched:
            break
    return time.perf_counter() - start


def _step(run: Runner, probe: Probe) -> torch.Tensor:
    probe.begin()
    output = run.model(*run.inputs.args, **run.inputs.kwargs)
    probe.loss()
    loss = run.loss_of(output)
    check_loss(loss)
    if run.settings.release_outputs:
        del output
    with autocast_over(run.device):
        loss.backward()  # type: ignore[no-untyped-call]
    return loss


def _forward(run: Runner, probe: Probe) -> None:
    probe.begin()
    run.model(*run.inputs.args, **run.inputs.kwargs)
    probe.loss()


def check_loss(loss: object) -> None:
    """Refuses what has no backward.

    Raises:
        LossError: it is no scalar tensor with a gradient.
    """
    if not isinstance(loss, torch.Tensor):
        raise LossError(f"The loss is a {type(loss).__name__}, not a tensor: give loss_fn=.")
    if loss.numel() != 1:
        raise LossError(f"The loss has shape {list(loss.shape)}: a scalar is needed, or give loss_fn=.")
    if not loss.requires_grad:
        raise LossError("The loss does not depend on any parameter that requires a gradient.")


def _marked(run: Runner, probe: Probe, mark: Callable[[int], None]) -> None:
    before, probe.mark = probe.mark, mark
    try:
        _step(run, probe)
        mark(-1)
    finally:
        probe.mark = before


def _timed(run: Runner, probe: Probe, call: Callable[[], object]) -> dict[int, float]:
    """Seconds by op, replays and all: of forward ops those of a forward alone are asked for."""
    events: list[tuple[int, float]] = []
    clock, append = time.perf_counter, events.append
    device = run.device

    def mark(op: int) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        append((op, clock()))

    before, probe.mark = probe.mark, mark
    try:
        call()
        mark(-1)
    finally:
        probe.mark = before
    found: dict[int, float] = {}
    for (op, begin), (_, end) in itertools.pairwise(events):
        found[op] = found.get(op, 0.0) + end - begin
    return found


def _seconds(
    graph: Graph,
    pieces: Cut,
    forwards: Sequence[dict[int, float]],
    whole: Sequence[dict[int, float]],
    settings: Settings,
) -> tuple[list[float], float]:
    """Median seconds by op, and their spread."""
    found: list[float] = []
    spreads: list[float] = []
    for op in graph.ops:
        if op.phase is Phase.OPTIMIZER:
            found.append((settings.optimizer.seconds_estimate or 0.0) if settings.optimizer else 0.0)
            continue
        rows = forwards if op.id < pieces.num_pieces else whole
        values = sorted(row.get(op.id, 0.0) for row in rows)
        found.append(statistics.median(values))
        if values[0] > 0:
            spreads.append(values[-1] / values[0] - 1)
    return found, statistics.median(spreads) if spreads else 0.0


def _without(graph: Graph, values: Container[int]) -> Graph:
    """The graph of a step that does not have these values: a first one."""
    return replace(graph, values=tuple(replace(v, nbytes=0) if v.id in values else v for v in graph.values))


def _scratch(graph: Graph, tree: RegionTree, numbers: Sequence[int], parts: Sequence[Part]) -> list[int]:
    """Bytes per op that the graph's values do not explain: those by which the measured step rose above them.

    The parts are followed along the order that the graph predicts. A part that is not where it should be counts for the
    op that the step had come to.

    Arguments:
        numbers: piece, as parts are labelled -> op of the graph.
    """
    everything = frozenset(range(len(tree.regions)))
    order = tree.order(everything, len(graph.ops))
    nothing = CostModel((0.0,) * len(graph.ops), (0,) * len(graph.ops))
    profile = evaluate(graph, nothing, order, profile=True).profile
    assert profile is not None
    levels = profile - graph.start_nbytes
    scratch = [0] * len(graph.ops)
    place = 0
    for part in parts:
        if part.label >= 0:
            place = _next_place(order, place, numbers[part.label], tree.num_forward)
        op = order[place]
        scratch[op] = max(scratch[op], part.peak - int(levels[place]))
    return scratch


def _next_place(order: Sequence[int], place: int, op: int, loss: int) -> int:
    passed = 0
    for index in range(place, len(order)):
        if order[index] == op:
            return index
        passed += order[index] > loss
        if op < loss and passed > _FAR:
            break
    return place
