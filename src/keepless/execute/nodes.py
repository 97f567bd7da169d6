"""A planned step as a chain of autograd nodes, one per backward segment.

::

    loss <- Head <- Tail 1 <- Tail 2 <- ... <- Tail n
                      |         |                 |
                   params     params           params     (the gradients that this segment makes)

The nodes pass an empty token. Autograd runs Head when the gradient of the loss arrives, then the tails in order; each
sends the generator on to its next `yield` and returns the gradients found there, so `.grad` accumulation, gradient
hooks and optimizers in the backward happen segment by segment.

What a node does when the same step is asked for again (`retain_graph`, double backward, another pattern of output
gradients): it replays the user's own forward under autograd, with the generator state and the buffers of the first
time, and differentiates that. See `Step.replay`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from keepless import _compat
from keepless._compat import graphs
from keepless._compat.backwards import without_hooks
from keepless.capture.ordering import has_other_layout
from keepless.errors import ReplayError, StepError
from keepless.execute.arena import Arena, Lease
from keepless.execute.codegen import Compiled, forget_frame, stale
from keepless.execute.recovery import Rescue, go_on, tangents_at

_USED_TWICE = (
    "Trying to backward through a planned step a second time, but it was freed after the first. Specify "
    "retain_graph=True where you call .backward() or autograd.grad() the first time."
)


Replayed = tuple[Sequence[torch.Tensor], Mapping[int, torch.Tensor]]
"""Flat tensor outputs, and the tensors that stood in the place of inputs, by these inputs' ids."""

ReplayForward = Callable[[bool], Replayed]
"""Runs the user's forward again; told whether to cut it off from the graph that its inputs come from."""


@dataclass
class Counters:
    """What a planned model did, and what it did beside its plan, for the report.

    Attributes:
        steps: planned steps that began.
        replays: forwards that ran again for a second or double backward.
        unplanned_calls: that ran the model's own forward.
        hits: steps that a plan was there for.
        captures: steps that were captured and planned on the spot.
        specialised: of these, the ones that came from a trace with symbolic sizes and were not traced in full.
        transfers: captured steps whose program was carried over from a known plan.
        solved: programs that a search in the background found and that took an entry's place.
        evicted: captured steps that were forgotten, as there were too many.
        ooms: allocations that failed in planned steps.
        tightened: programs that took an entry's place because of that.
        without_arena: steps that ran without the arena, as another step had it, or as there was no memory for it.
    """

    steps: int = 0
    replays: int = 0
    unplanned_calls: int = 0
    hits: int = 0
    captures: int = 0
    specialised: int = 0
    transfers: int = 0
    solved: int = 0
    evicted: int = 0
    ooms: int = 0
    tightened: int = 0
    without_arena: int = 0


@dataclass
class Recipe:
    """Everything that the nodes of one planned call share, the same for every call.

    Arguments:
        compiled: the generated step.
        differentiable: positions in O of the outputs that receive gradients.
        plain: positions in O of the outputs that never require a gradient.
        num_outputs: how many tensors O gets.
        targets: per gradient (as in `Binding.grads`), its position among `Step.leaves`.
        names: readable names of the argument slots, for error messages.
        device_type: of the step.
        aside_outputs: positions in O of outputs without a planned gradient; empty where `aside_leaves` is.
        aside_leaves: positions among the arguments of leaves that only such outputs reach.
        rewritten: positions among the arguments of buffers that the forward changes and a replay may find changed.
        has_rng: whether the forward draws random numbers.
        get_state, set_state: of the generator.
        rescue: how the step survives where there is no memory; None where it does not.
        keeps_tangents: whether the gradients that come from outside are held to the end, for that.
        arena: where most of the step's values are made, and the generated step that does so; None without one.
        layouts: per differentiable output, what its gradient is like: others are not what was captured.
        tells_of_layout: such others are warned about, once.
    """

    compiled: Compiled
    differentiable: tuple[int, ...]
    plain: tuple[int, ...]
    num_outputs: int
    targets: tuple[int, ...]
    names: tuple[str, ...]
    device_type: str
    aside_outputs: tuple[int, ...]
    aside_leaves: tuple[int, ...]
    rewritten: frozenset[int]
    has_rng: bool
    get_state: Callable[[], torch.Tensor]
    set_state: Callable[[torch.Tensor], None]
    counters: Counters = field(default_factory=Counters)
    rescue: Rescue | None = None
    keeps_tangents: bool = False
    arena: tuple[Arena, Compiled] | None = None
    layouts: tuple[torch.Tensor, ...] = ()
    tells_of_layout: bool = True

    def tell_of_layout(self) -> None:
        """Warns at the first gradient in another layout than was captured."""
        if self.tells_of_layout:
            self.tells_of_layout = False
            warnings.warn(
                "A gradient from outside of the planned model has another memory layout than it was planned for: such "
                "steps run the model's own forward again, outside of the budget. Plan with the loss that is trained.",
                stacklevel=2,
            )


class Step:
    """One call of a planned model, from its forward to the end of its backward."""

    __slots__ = (
        "arguments",
        "done",
        "gen",
        "grads",
        "kept",
        "lease",
        "leaves",
        "next_segment",
        "outputs",
        "recipe",
        "replay_forward",
        "replayed",
        "rng",
        "tangents",
        "versions",
    )

    def __init__(
        self,
        recipe: Recipe,
        arguments: tuple[torch.Tensor, ...],
        leaves: Sequence[torch.Tensor],
        replay_forward: ReplayForward,
    ) -> None:
        self.recipe = recipe
        self.arguments = arguments
        self.leaves = leaves
        self.replay_forward = replay_forward
        self.outputs: list[torch.Tensor] = []
        self.grads: list[torch.Tensor] = []
        self.tangents: tuple[Any, ...] | None = None
        self.versions: tuple[int, ...] = ()
        self.next_segment = 0
        self.done = False
        self.kept = False
        self.replayed: tuple[Any, ...] | None = None
        self.rng = recipe.get_state() if recipe.has_rng else None
        self.lease: Lease | None = None
        compiled = recipe.compiled
        if recipe.arena is not None:
            self.lease = recipe.arena[0].lease()
            compiled = recipe.arena[1] if self.lease is not None else compiled
            recipe.counters.without_arena += self.lease is None
        self.gen: Any = compiled.function(arguments, self.outputs, self.grads)

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Runs up to the outputs."""
        try:
            self.advance()
        except BaseException as error:
            forget_frame(error)
            self.release()
            raise
        outputs = tuple(self.outputs)
        self.outputs.clear()
        try:
            self.versions = tuple([argument._version for argument in self.arguments])
        except RuntimeError:  # a tensor made in inference mode has no version
            self.versions = tuple([_version(argument) for argument in self.arguments])
        return outputs

    def advance(self) -> None:
        """Sends the generator to its next `yield`."""
        if torch.is_autocast_enabled(self.recipe.device_type):
            with _compat.no_autocast():
                next(self.gen)
        else:
            next(self.gen)

    def segment(self, index: int) -> list[torch.Tensor]:
        """Runs one backward segment; the gradients that it made, in the order of `Compiled.segments`."""
        self.check_versions(index)
        try:
            if index == 0:
                self.grads.extend(self.tangents or ())
                if not self.recipe.keeps_tangents:
                    self.tangents = None
            self.advance()
            failure = None
        except BaseException as error:
            rescue = self.recipe.rescue
            if rescue is not None and rescue.covers(error) and rescue.survivor.survives:
                self.tangents = self.tangents or tangents_at(error, rescue.binding)
            forget_frame(error)
            if rescue is None or not rescue.covers(error):
                self.release()
                raise
            failure = rescue.failure(error, self, self.recipe.compiled)
            if not rescue.survivor.survives:
                self.release()
                rescue.told(error, failure)
                raise
        if failure is not None:  # out of the handler, which holds the failed step
            self.end_lease()
            go_on(self, index, failure)
            if not self.recipe.keeps_tangents:
                self.tangents = None
        self.next_segment = index + 1
        grads = self.grads.copy()
        self.grads.clear()
        if self.next_segment == len(self.recipe.compiled.segments):
            self.gen.close()
            self.done = True
            self.end_lease()
            if not self.kept:
                self.release()
                self.rng = None  # of a step that failed, what goes on reads it
        return grads

    def check_versions(self, index: int) -> None:
        """As autograd does: what the forward read must not have changed since, where this segment reads it again."""
        for position in self.recipe.compiled.reads[index]:
            now = _version(self.arguments[position])
            if now != self.versions[position]:
                expected = self.versions[position]
                self.release()
                stale(self.recipe.names[position], now, expected)

    def release(self) -> None:
        """Frees everything; a later use is an error."""
        if self.gen is not None:
            self.gen.close()
        self.gen = None
        self.end_lease()
        self.done = True
        self.kept = False
        self.arguments = ()
        self.leaves = ()
        self.replay_forward = _gone
        self.tangents = None
        self.replayed = None
        self.outputs.clear()
        self.grads.clear()

    def end_lease(self) -> None:
        """Frees the arena, where the step has it: nothing in it is read any more."""
        if self.lease is not None:
            self.lease.end()

    def begin(self, tangents: tuple[Any, ...]) -> bool:
        """Called by the head. True: the planned backward goes on. False: a replay has made all gradients."""
        planned = [tangents[position] is not None for position in self.recipe.differentiable]
        others = any(t is not None for i, t in enumerate(tangents) if i not in self.recipe.differentiable)
        first = not self.done and self.next_segment == 0 and self.tangents is None
        if not first and not self.kept:
            raise StepError(_USED_TWICE)
        keep = _compat.graph_is_kept()
        again = torch.is_grad_enabled() or others or not all(planned) or not first
        if again or self.has_other_layouts(tangents):
            if not again and not keep:  # what the plan has kept is not needed
                self.gen.close()
                self.end_lease()
            if not again:
                self.recipe.tell_of_layout()
            self.replay(tangents, create_graph=torch.is_grad_enabled())
            self.kept = keep
            return False
        self.kept = keep
        self.tangents = tuple(tangents[position] for position in self.recipe.differentiable)
        return True

    def has_other_layouts(self, tangents: tuple[Any, ...]) -> bool:
        """Whether gradients lie in memory otherwise than those that were captured: other kernels would run on them."""
        given = (tangents[position] for position in self.recipe.differentiable)
        return any(has_other_layout(t, example) for t, example in zip(given, self.recipe.layouts, strict=True))

    def replay(self, tangents: tuple[Any, ...], *, create_graph: bool) -> None:
        """Runs the user's forward again under autograd, as it ran the first time, and differentiates it."""
        self.replayed = self.differentiate(tangents, self.leaves, create_graph)

    def differentiate(
        self, tangents: tuple[Any, ...], leaves: Sequence[torch.Tensor], create_graph: bool
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of leaves from a replayed forward.

        A leaf that is there several times gets the parts of its gradient in their order, as the plan delivers them:
        added one by one they round as in plain autograd. Where there are not so many, it gets the whole, once.
        """
        for position, argument in enumerate(self.arguments):
            if position not in self.recipe.rewritten and _version(argument) != self.versions[position]:
                name = self.recipe.names[position]
                self.release()
                raise ReplayError(
                    f"{name} has changed since the forward, so that the step cannot be replayed for a second or "
                    "double backward, or for a gradient in another layout than was planned for."
                )
        recipe = self.recipe
        recipe.counters.replays += 1
        now = recipe.get_state() if recipe.has_rng else None
        try:
            if self.rng is not None:
                recipe.set_state(self.rng)
            with torch.enable_grad():
                outputs, stand_ins = self.replay_forward(not create_graph)
        finally:
            if now is not None:
                recipe.set_state(now)
        pairs = [(out, t) for out, t in zip(outputs, tangents, strict=True) if t is not None and out.requires_grad]
        if not pairs:
            return (None,) * len(leaves)
        inside = [stand_ins.get(id(leaf), leaf) for leaf in leaves]
        times = Counter(map(id, inside))
        several = {id(t): t for t in inside if times[id(t)] > 1}
        edges = graphs.graph_behind(out for out, _ in pairs) if several else {}
        noted = {key: graphs.parts_of_gradient(edges, tensor) for key, tensor in several.items()}
        try:
            with without_hooks(inside):
                gradients = torch.autograd.grad(
                    [out for out, _ in pairs],
                    inside,
                    [t for _, t in pairs],
                    create_graph=create_graph,
                    retain_graph=create_graph,
                    allow_unused=True,
                )
        finally:
            for _, handles in noted.values():
                for handle in handles:
                    handle.remove()
        found: list[torch.Tensor | None] = list(gradients)
        for key, (parts, _) in noted.items():
            places = [place for place, tensor in enumerate(inside) if id(tensor) == key]
            for number, place in enumerate(places):
                if len(parts) == len(places):
                    found[place] = parts[number]
                elif number:
                    found[place] = None
        return tuple(found)

    def take(self, index: int, last: bool) -> list[Any]:
        """The gradients of one segment, planned or replayed."""
        if self.replayed is None:
            return list(self.segment(index))
        made = [self.replayed[self.recipe.targets[grad]] for grad in self.recipe.compiled.segments[index]]
        if last:
            self.replayed = None
            if not self.kept:
                self.release()
        return made


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _gone(cut_off: bool) -> Replayed:
    raise StepError(_USED_TWICE)


class Tail(torch.autograd.Function):
    """One backward segment behind the head."""

    @staticmethod
    def forward(ctx: Any, step: Step, index: int, token: torch.Tensor | None, *leaves: torch.Tensor) -> torch.Tensor:
        ctx.step = step
        ctx.index = index
        ctx.set_materialize_grads(False)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        step, index = ctx.step, ctx.index
        last = index == len(step.recipe.compiled.segments) - 1
        return (None, None, None if last else torch.empty(0), *step.take(index, last))


class Head(torch.autograd.Function):
    """The forward, and the backward's beginning."""

    @staticmethod
    def forward(ctx: Any, step: Step, token: torch.Tensor, *unused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.step = step
        ctx.set_materialize_grads(False)
        outputs = step.forward()
        ctx.mark_non_differentiable(*[outputs[position] for position in step.recipe.plain])
        return outputs

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        ctx.step.begin(tangents)
        return (None, torch.empty(0))


class Aside(torch.autograd.Function):
    """Outputs without a planned gradient, where they reach leaves that the planned backward does not.

    Such a leaf must not hang on the chain: autograd would call its hooks with None in every planned backward.
    """

    @staticmethod
    def forward(ctx: Any, step: Step, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.step = step
        ctx.set_materialize_grads(False)
        return tuple([tensor.detach() for tensor in tensors[:count]])

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        step, recipe = ctx.step, ctx.step.recipe
        if step.gen is None and not step.arguments:
            raise StepError(_USED_TWICE)
        everywhere = [None] * recipe.num_outputs
        for position, tangent in zip(recipe.aside_outputs, tangents, strict=True):
            everywhere[position] = tangent
        leaves = [step.arguments[position] for position in recipe.aside_leaves]
        return (None, None, *tangents, *step.differentiate(tuple(everywhere), leaves, torch.is_grad_enabled()))


def run_step(step: Step) -> tuple[torch.Tensor, ...]:
    """Runs the forward and returns its flat tensor outputs, with the chain of nodes behind them."""
    recipe = step.recipe
    recipe.counters.steps += 1
    token: torch.Tensor | None = None
    segments = recipe.compiled.segments
    for index in range(len(segments) - 1, -1, -1):
        leaves = [step.leaves[recipe.targets[grad]] for grad in segments[index]]
        token = Tail.apply(step, index, token, *leaves)
    outputs: tuple[torch.Tensor, ...] = Head.apply(step, token)
    if recipe.aside_leaves:
        leaves = [step.arguments[position] for position in recipe.aside_leaves]
        others = Aside.apply(step, len(recipe.aside_outputs), *[outputs[i] for i in recipe.aside_outputs], *leaves)
        by_position = dict(zip(recipe.aside_outputs, others, strict=True))
        outputs = tuple([by_position.get(i, tensor) for i, tensor in enumerate(outputs)])
    return outputs
