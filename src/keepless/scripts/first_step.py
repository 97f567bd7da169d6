"""Finds the model that a script trains, and plans it before its first backward begins.

Until then `torch.nn.Module.__call__` and torch's way into its backward are watched. The first module whose deferred
call (`keepless.scripts.deferred`) a backward reaches is the script's model: it is planned for the call as it was made,
for the optimizer that steps it and for all that stands beside it on the device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from keepless import api
from keepless._compat.backwards import watch_begins
from keepless.capture import is_tracing
from keepless.control.captured import Captures
from keepless.control.parts.module_steps import standing_plan, tensors_of, uncompiled
from keepless.control.planning import read_budget
from keepless.control.signature import check_signature, model_signature
from keepless.errors import InfeasibleBudget, KeeplessError, PlanError, RewriteError
from keepless.execute import PlannedForward
from keepless.ir import format_bytes
from keepless.machine import CHUNKED_LOSS, OPTIMIZER_IN_BACKWARD, REWRITES, Plan, simulate
from keepless.modules.planned import PlannedModules
from keepless.scripts.deferred import Deferred, calls_reached, is_rerun, rerun
from keepless.scripts.foretold import Foretold, foretell, more_of_later_kinds, peak_in
from keepless.scripts.losses import StandIn, Watch, see
from keepless.scripts.naming import Called, called, stands_at
from keepless.scripts.others import Unforeseen, gradients_to_come, modules_beside, rest_of
from keepless.scripts.resets import Resets
from keepless.scripts.room import with_room
from keepless.scripts.surroundings import Standing, coming_nbytes, optimizers_of, scales_gradients
from keepless.scripts.wish import Wish

Tell = Callable[[str], None]
Progress = Callable[[], AbstractContextManager[Callable[[str, int, int], None]]]

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
"""Names of classes that call the model within them, which is planned in their place."""


_MOST_MET = 24
"""Modules whose names are looked for, for a message that lists them."""


class FirstStep:
    """Watches a process until its model is planned.

    Arguments:
        tell: takes lines for people.
        progress: shows planning, as long as that takes.

    Attributes:
        model: that was planned; None before.
        plan: its plan.
        optimizer: that steps it.
        failure: why there is no plan, where there was a call to plan.
        notes: what was told.
        name: the model's in the script.
        others: modules that the script trains beside it, and the bytes that each keeps for its backward: None before
            its first call.
        met: outermost modules that were called in training, by their names.
        unforeseen: bytes that others keep for their backward, and that the plan does not count.
    """

    def __init__(self, wish: Wish, tell: Tell, progress: Progress) -> None:
        self.wish = wish
        self.model: torch.nn.Module | None = None
        self.plan: Plan | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.failure: Exception | None = None
        self.notes: list[str] = []
        self.name = Called("", "")
        self.others: dict[int, tuple[Called, int | None]] = {}
        self.met: list[Called] = []
        self.unforeseen = 0
        self._foretold: Foretold | None = None
        self._names: dict[int, Called] = {}
        self._unforeseen: Unforeseen | None = None
        self._later: list[torch.nn.Module] = []
        self.on_planned: Callable[[], None] = lambda: None
        self._tell_people, self._progress = tell, progress
        self._own = torch.nn.Module.__call__
        self._inside = threading.local()
        self._calls: list[weakref.ref[Deferred]] = []  # their graph holds them
        self._standing: dict[int, Standing] = {}
        self._watch: Watch | None = None
        self._watched = 0
        self._unwatch: Callable[[], None] | None = None
        self._resets = Resets(lambda: any(ref() is not None for ref in self._calls))

    def begin(self) -> None:
        """From here on modules' calls are looked at."""
        own, watch = self._own, self._call

        def __call__(module: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            return watch(own, module, args, kwargs)

        torch.nn.Module.__call__ = __call__  # type: ignore[method-assign]
        self._unwatch = watch_begins(self._backward)
        self._resets.begin()

    def end(self) -> None:
        """Nothing is looked at any more; calls that are deferred stay right."""
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
            torch.nn.Module.__call__ = self._own  # type: ignore[method-assign]
        self._resets.end()
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        self._calls.clear()
        self._standing.clear()
        if self._unforeseen is not None:
            self._unforeseen.end()

    def tell(self, note: str) -> None:
        """Something that people should know."""
        self.notes.append(note)
        self._tell_people(note)

    def _call(self, own: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        depth = getattr(self._inside, "depth", 0)
        if self._unwatch is None or is_tracing() or (depth and not self.wish.model_path):
            return own(module, *args, **kwargs)
        inner = uncompiled(module)
        if not depth and torch.is_grad_enabled() and module.training and not is_rerun():
            self._meet(inner)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._is_wanted(inner, depth):
            return own(module, *args, **kwargs)
        if id(inner) not in self._names:  # a named one that stands inside another
            self._names[id(inner)] = called(inner)
        self._inside.depth = depth + 1
        try:
            if self.wish.plan is not None:
                self._put_saved(inner)
                return own(module, *args, **kwargs)
            return self._deferred(own, module, inner, args, kwargs)
        finally:
            self._inside.depth = depth

    def _is_wanted(self, module: torch.nn.Module, depth: int) -> bool:
        """Whether a call of a module may be the one that is looked for."""
        if type(module).__name__ in _WRAPPERS or is_rerun() or standing_plan(module) is not None:
            return False
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return False
        if self.wish.model_path:
            return _is_named(module, self.wish.model_path)
        return not depth and module.training

    def _meet(self, module: torch.nn.Module) -> None:
        """Notes the name of an outermost module that is called for the first time."""
        if (
            id(module) in self._names
            or len(self.met) == _MOST_MET
            or not any(parameter.requires_grad for parameter in module.parameters())
        ):
            return
        self._names[id(module)] = name = called(module)
        self.met.append(name)

    def _name(self, module: torch.nn.Module) -> Called:
        """A module's name, looked for once; of one that is not outermost, without the place of its call."""
        if id(module) not in self._names:
            self._names[id(module)] = called(module, now=False)
        return self._names[id(module)]

    def _put_saved(self, module: torch.nn.Module) -> None:
        """Puts the plan of the file into a module that it was made for."""
        plan = self.wish.plan
        assert plan is not None
        try:
            check_signature(plan.signature, model_signature(module), "model")
        except PlanError as error:
            if self.wish.model_path:
                self._fail(error)
            return
        optimizer, _ = optimizers_of(module)
        try:
            self._apply(module, plan, optimizer)
        except KeeplessError as error:
            self._fail(error)

    def _deferred(
        self, own: Callable[..., Any], module: torch.nn.Module, inner: torch.nn.Module, args: Any, kwargs: Any
    ) -> Any:
        """Runs a call without keeping its graph.

        The module's own hooks run as ever: what is deferred is its forward.
        """
        before = module.__dict__.get("forward", None)

        def forward(*given: Any, **named: Any) -> Any:
            if inner is not module:  # what torch.compile has wrapped is planned, and runs, as it is
                return own(inner, *given, **named)
            return inner.forward(*given, **named)

        call = Deferred(inner, forward)
        key = id(inner)
        if key not in self._standing:
            self._standing[key] = Standing(call.device)
        if self._watch is not None and self._watched == key:
            self._watch.stop()
            self._watch = None

        def first(*given: Any, **named: Any) -> Any:
            _put_back(module, before)
            try:
                return call(*given, **named)
            except KeeplessError as error:
                self._fail(error)
                call.give_up()
                return forward(*given, **named)

        module.__dict__["forward"] = first
        try:
            result = own(module, *args, **kwargs)
        finally:
            if module.__dict__.get("forward") is first:
                _put_back(module, before)
        if call.places:
            self._calls = [ref for ref in self._calls if ref() is not None] + [weakref.ref(call)]
            if self._watch is None:
                self._watch, self._watched = Watch(call.device), key
                self._watch.start()
        return result

    def _backward(self, roots: Sequence[Any], gradients: Sequence[Any], stays: bool, differentiated: bool) -> None:
        """A backward is about to begin."""
        if self._unwatch is None or is_rerun() or is_tracing():
            return
        nodes = {call: node for node, call in calls_reached(roots)}
        if not nodes:
            return
        if differentiated:
            note = "a gradient that is itself differentiated is made by the model as it is, outside the budget."
            if note not in self.notes:
                self.tell(note)
            return
        with rerun():
            self._settle(nodes, roots, gradients)
        for call in nodes:
            call.is_last = not stays

    def _settle(self, nodes: dict[Deferred, Any], roots: Sequence[Any], gradients: Sequence[Any]) -> None:
        allocated = self._watch.stop() if self._watch is not None else None
        self._watch = None
        calls = [call for ref in self._calls if (call := ref()) is not None and call in nodes]
        if not calls:
            return
        chosen = calls[0].module
        own = [call for call in calls if call.module is chosen]
        standing = self._standing[id(chosen)]
        if len(own) > 1:
            self.tell(
                f"{self._name(chosen)} is called {len(own)} times before its backward: what the other calls keep "
                "counts."
            )
        try:
            after = _leading_to(own, nodes)
            optimizer, rest = optimizers_of(chosen)
            elsewhere = gradients_to_come({call.module for call in after}, [optimizer, *rest])
            seen = self._see(own[-1], nodes[own[-1]], roots, gradients, allocated, elsewhere)
            self._plan(own, seen, standing, after, optimizer, rest)
        except KeeplessError as error:
            self._fail(error)

    def _see(
        self,
        call: Deferred,
        node: Any,
        roots: Sequence[Any],
        gradients: Sequence[Any],
        allocated: tuple[int, int] | None,
        elsewhere: int,
    ) -> StandIn:
        """The script's loss of a call, as planning needs it."""
        edges = [GradientEdge(node, number) for number in range(len(call.like))]
        seen = see(
            roots,
            gradients,
            edges,
            call.like,
            call.device,
            allocated if self._watched == id(call.module) else None,
            elsewhere,
        )
        reached = [
            (position, call.like[number], grad)
            for position, number in call.places.items()
            if (grad := seen.gradients[number]) is not None
        ]
        return StandIn(
            [position for position, _, _ in reached],
            [like for _, like, _ in reached],
            [grad for _, _, grad in reached],
            seen,
        )

    def _plan(
        self,
        own: list[Deferred],
        loss: StandIn,
        standing: Standing,
        after: set[Deferred],
        optimizer: torch.optim.Optimizer | None,
        others: Sequence[torch.optim.Optimizer],
    ) -> None:
        """Plans a model for the step that its last call begins, and puts the plan in.

        Arguments:
            own: its calls that stand before the backward.
            after: calls of others that took its outputs: what they need was seen as the loss's.
            optimizer, others: that steps it, and that step others.
        """
        call = own[-1]
        model = call.module
        inputs = call.inputs
        in_backward = OPTIMIZER_IN_BACKWARD in self.wish.options.get("rewrites", ())
        if in_backward:
            _check_in_backward(self._name(model), len(own), optimizer)
        if optimizer is None:
            self.tell(f"no optimizer steps {self._name(model)} yet: none is counted in the plan.")
        outside = self.wish.outside + standing.beside(model, tensors_of(inputs), optimizer) + call.held_nbytes
        coming, stepping = rest_of(model, optimizer, call.device)
        outside += coming + coming_nbytes(model, others, call.device)
        beside = modules_beside(model, others if optimizer is None else [optimizer, *others])
        outside += self._kept_beside(own, beside, after)
        if outside:
            self.tell(f"{format_bytes(outside)} on the device are not the model's, and count.")
        budget = self.wish.budget
        assert budget is not None
        limit = read_budget(budget, call.device)
        has_others = len(own) > 1 or self._resets.are_late
        standing_gradients, of_inputs = more_of_later_kinds(own) if has_others else (0, 0)
        # A plan of another kind of call may keep as many bytes more as it has more room: of each call.
        later = standing_gradients + len(own) * of_inputs
        with self._progress() as progress, call.as_called():

            def planned(more: int) -> tuple[Foretold, int]:
                """A plan with room for more bytes outside, or a larger budget, and the bytes that it needs there."""
                plan = api.plan(
                    model,
                    inputs,
                    budget if more >= 0 else limit - more,
                    optimizer=optimizer,
                    loss_fn=loss,
                    outside=outside + max(more, 0),
                    progress=progress,
                    **self.wish.options,
                )
                own_limit = plan.budget.limits["device"]
                step_peak = peak_in(plan, "optimizer") + stepping - max(more, 0) if stepping else 0
                if step_peak > own_limit:
                    raise _step_too_large(optimizer, stepping, step_peak, own_limit)
                return foretell(plan, call, len(own) - 1, loss.nbytes, later, more, step_peak)

            foretold = with_room(planned, limit, is_alone=not has_others)
        plan = foretold.plan
        if later and isinstance(plan.capture, Captures):  # that room is for plans of other kinds of calls
            settings = plan.capture.settings
            plan.capture.settings = replace(settings, outside=settings.outside - standing_gradients - of_inputs)
        if foretold.step_peak > plan.predicted_peak:
            self.tell(
                f"the step of {type(optimizer).__name__}, with the parameters of others, is predicted to reach "
                f"{format_bytes(foretold.step_peak)}: above the plan's peak, within the budget."
            )
        self._foretold = foretold
        self._apply(model, plan, optimizer)
        call.updates = in_backward

    def _kept_beside(self, own: list[Deferred], modules: Sequence[torch.nn.Module], after: set[Deferred]) -> int:
        """Bytes that the script's other models keep for their backward, of those that were called; all are named.

        Arguments:
            after: calls whose bytes count elsewhere.
        """
        alive = [call for ref in self._calls if (call := ref()) is not None]
        first = alive.index(own[0])
        modules = list(modules)
        kept: dict[int, int] = {}
        total = 0
        for number, call in enumerate(alive):
            if call.module is not own[0].module:
                nbytes = call.kept_nbytes + (call.edge_nbytes if number > first else 0)
                kept[id(call.module)] = kept.get(id(call.module), 0) + nbytes
                total += 0 if call in after else nbytes
                if not any(part is call.module for module in modules for part in module.modules()):
                    modules.append(call.module)
        for module in modules:
            nbytes = sum(kept.get(id(part), 0) for part in module.modules())
            self.others[id(module)] = self._name(module), nbytes or None
        self._later = [module for module in modules if not self._name(module).place]
        for name, known in self.others.values():
            what = "what it will keep for its backward is not known yet, and does not count"
            if known:
                what = f"the {format_bytes(known)} that it keeps for its backward count"
            elif name.place:
                what = "what it kept when this backward began counts as the loss's"
            self.tell(f"{name} trains as it is; {what}. --model-path {name.path} plans it instead.")
        return total

    def _apply(self, model: torch.nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None) -> None:
        api.apply(
            model,
            plan,
            optimizer=optimizer,
            takeover=bool(self.wish.options.get("takeover")),
            on_oom=self.wish.on_oom,
        )
        self.model, self.plan, self.optimizer = model, plan, optimizer
        self.name = self._name(model)
        self.tell(
            f"{self.name} is planned ({plan.engine} engine): predicted peak "
            f"{format_bytes(plan.predicted_peak)}, {format_bytes(plan.baseline_peak)} with everything kept."
        )
        if OPTIMIZER_IN_BACKWARD in plan.rewrites:
            self.tell(
                "weights are updated in the backward: what the script does to gradients between backward and "
                "optimizer.step() (clipping, logging) finds none, and does NOTHING."
            )
        inexact = [f"--rewrite {name}" for name in plan.rewrites if not REWRITES[name].is_exact]
        if inexact:
            self.tell(f"not the same bits as without Keepless, for {' '.join(inexact)}.")
        if CHUNKED_LOSS in plan.rewrites:
            self.tell("logits are None in training, from the next step on: their loss is made in chunks.")
        self.end()
        self._unforeseen = Unforeseen(self._later, self._not_foreseen)
        self.on_planned()

    @property
    def foretold_peak(self) -> int:
        """The highest bytes that were foretold of steps of all kinds that were planned, with their optimizer's."""
        if self.plan is None or self.model is None:
            return 0
        forward = self.model.__dict__.get("forward")
        foretold = self._foretold or Foretold(self.plan, 0, self.plan.predicted_peak, 0)
        peaks: list[int] = []
        if isinstance(forward, PlannedForward):
            for entry in forward.entries:
                if entry.cost is not None:
                    peaks.append(simulate(entry.binding.graph, entry.program, entry.cost).peak)
        elif isinstance(forward, PlannedModules):
            peaks += [found.plan.predicted_peak for found in forward.entries.values() if found.plan is not None]
        later = [peak + foretold.more for peak in peaks if peak != self.plan.predicted_peak]
        return max([foretold.step_peak, foretold.peak, *later])

    @property
    def has_later_plans(self) -> bool:
        """Whether calls of other kinds had plans of their own, which foretold other peaks.

        True where that is unknown, as of plans by modules.
        """
        forward = None if self.model is None else self.model.__dict__.get("forward")
        return not isinstance(forward, PlannedForward) or forward.counters.captures > 0

    def outside_option(self, nbytes: int) -> str:
        """What `--outside` takes so that the next run counts bytes that this one did not foresee."""
        return f"{-(-(self.wish.outside + nbytes) // 1024)}KiB"

    def _not_foreseen(self, module: torch.nn.Module, name: Called, nbytes: int) -> None:
        """Another model of the script has been called for the first time, after the plan was made."""
        self.others[id(module)] = name, nbytes
        assert self.plan is not None
        self.unforeseen += nbytes
        limit, peak = self.plan.budget.limits["device"], self.plan.predicted_peak + self.unforeseen
        self.tell(
            f"{name} trains as it is, and keeps {format_bytes(nbytes)} for its backward, which the plan could not "
            f"foresee: where they stand at the peak it is {format_bytes(peak)}, "
            + (f"MORE than the budget of {format_bytes(limit)}" if peak > limit else f"within {format_bytes(limit)}")
            + f". --outside {self.outside_option(self.unforeseen)} counts them from the start; "
            f"--model-path {name.path} plans it instead."
        )

    def _fail(self, error: Exception) -> None:
        """There is no plan.

        Raises:
            The error, where the script is to end.
        """
        self.failure = error
        self.end()
        if self.wish.strict:
            raise error
        self.tell(f"the script goes on WITHOUT a plan: {error}")


def _check_in_backward(name: Called, num_calls: int, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuses updates in the backward where the script's steps do not allow them.

    Raises:
        RewriteError: its gradients are scaled, nothing steps the model yet, or several calls share a backward.
    """
    without = f"leave out rewrites=({OPTIMIZER_IN_BACKWARD!r},)."
    if scales_gradients():
        raise RewriteError(
            "The script has a GradScaler, with whose scaled gradients the backward would step: train in bfloat16, or "
            f"{without}"
        )
    if optimizer is None:
        raise RewriteError(f"No optimizer steps {name} yet: make it before the first backward, or {without}")
    if num_calls > 1:
        raise RewriteError(
            f"{name} is called {num_calls} times before its backward, in which the first to end would update the "
            f"weights that the others need: {without}"
        )


def _leading_to(own: Sequence[Deferred], nodes: dict[Deferred, Any]) -> set[Deferred]:
    """Those calls whose graph leads to one of a model's own."""
    others = [call for call in nodes if call.module is not own[0].module]
    return {call for call in others if any(found in own for _, found in calls_reached([GradientEdge(nodes[call], 0)]))}


def _step_too_large(optimizer: Any, stepping: int, needed: int, limit: int) -> InfeasibleBudget:
    """What is said of a budget that an optimizer of several models does not fit."""
    name = type(optimizer).__name__
    return InfeasibleBudget(
        f"The budget {format_bytes(limit)} ({limit} bytes) is too small for the step of {name}, which steps parameters "
        f"of other modules, too: it needs {format_bytes(needed)} ({needed} bytes), {format_bytes(stepping)} of them "
        "for theirs. An optimizer for each model, or foreach=False, needs less.",
        smallest_budget=needed,
        bound=needed,
        blocking=f"the step of {name}",
    )


def _put_back(module: torch.nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def _is_named(module: torch.nn.Module, path: str) -> bool:
    """Whether a module is of a class of this name, or what stands at this path of the script's own names."""
    kind = type(module)
    if path in (kind.__name__, kind.__qualname__, f"{kind.__module__}.{kind.__qualname__}"):
        return True
    return stands_at(path, module)
