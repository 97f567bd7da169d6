"""A model that trains by a plan of module calls.

`PlannedModules` sits in the model's `__dict__` under "forward", a `RegionForward` in that of each module of which a
call may be recomputed. Values are those of the model's own code in every case: a plan decides only which calls keep
what they save.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.utils.checkpoint

from keepless import _compat
from keepless.capture import StandingForward, is_tracing
from keepless.eager import forward as regions
from keepless.eager.determinism import CHECKS
from keepless.eager.forward import Options
from keepless.eager.randomness import Stream
from keepless.errors import PlanError
from keepless.execute import Attached, Counters
from keepless.execute.recovery import LATER, OutOfMemoryHere, cannot_go_on, covers, make_room, tell
from keepless.modules.chosen import Chosen
from keepless.modules.kinds import LEAVES, Key, KindReader, without_constants
from keepless.modules.recovery import (
    CHANGES,
    Beginning,
    CallFailure,
    CallSurvivor,
    cannot_begin_again,
    failure_of,
    reaches,
    streams_of,
)
from keepless.modules.segments import Segment
from keepless.modules.sites import Calls, Site

_MOST_ENTRIES = 64
"""Kinds of steps whose regions are remembered; the oldest goes first."""
_turn = threading.RLock()
"""Planning replaces modules' forwards for a while: one thread at a time."""
_ALIKE = 3
"""So many kinds of steps that differ in constants alone, and need the same memory, stand for all others."""
_SAME_MEMORY = 1.01
"""The same: so many times the smallest of them at most."""
_MANY = 8
"""So many kinds of steps that are planned when they come are worth a warning."""


_NONE = Chosen(frozenset())

Miss = Callable[["PlannedModules", torch.nn.Module, tuple[Any, ...], dict[str, Any]], Chosen]
"""Plans for a kind of step that there is no plan for."""


class _Current(threading.local):
    """The forward that runs on this thread, or is run again there."""

    sites: frozenset[Site] = frozenset()
    segments: Mapping[Site, Segment] = MappingProxyType({})
    unseen: frozenset[str] = frozenset()
    is_running = False

    def __init__(self) -> None:
        self.calls = Calls()


_LEAST = "as little is kept already as the plan knows how"
_IN_BACKWARD = "its backward cannot run again, as it has let go of what the forward saved"


class PlannedModules(StandingForward):
    """The forward of a model that is planned by module calls.

    Attributes:
        entries: kind of step -> the calls that it recomputes.
        kind_of: gives the kind of step that a call begins.
        planned_on_the_spot: how many kinds of steps were planned when they came.
        survivor: how it goes on where there is no memory.
        counters: `ooms` and `tightened` outside of captured calls, which have their own.
        guard: looks after the optimizer's steps, as long as this forward stands in its model.
    """

    def __init__(self, model: torch.nn.Module, on_miss: Miss | None) -> None:
        super().__init__(model)
        self.__doc__ = model.forward.__doc__
        self.on_miss = on_miss
        self.entries: dict[Key, Chosen] = {}
        self.kind_of = KindReader(model)
        self.planned_on_the_spot = 0
        self.current = _Current()
        self._for_training = model.training
        self._wrapped: dict[str, RegionForward] = {}
        self.survivor: CallSurvivor | None = None
        self.counters = Counters()
        self.guard: Attached | None = None
        self._latest: tuple[Key, Chosen] | None = None
        self._with_buffers: list[weakref.ref[torch.nn.Module]] = []
        self._streams: list[Stream] = []
        self._unwatch: weakref.finalize[Any, Any] | None = None
        self._captured: set[str] = set()
        self._around_captured: list[dict[str, Any]] = []
        self._compiled_calls: list[tuple[weakref.ref[torch.nn.Module], Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compiled(args, kwargs)
        current = self.current
        if self.is_out or current.is_running:  # the model calls itself: a part of the same forward
            return self.original(*args, **kwargs)
        try:
            current.is_running = True
            if any("_compiled_call_impl" in table for table in self._around_captured):
                self._leave_compiled_calls()  # made since then
            current.calls.restart()
            chosen = _NONE
            if torch.is_grad_enabled() and not (is_tracing() or _compat.transforms_active()):
                chosen = self._chosen(args, kwargs)
            current.sites, current.segments, current.unseen = chosen.sites, chosen.segments, chosen.unseen
            if self.survivor is None or chosen.plan is None:
                return self.original(*args, **kwargs)
            return self._surviving(self.survivor, args, kwargs)
        finally:
            current.is_running = False

    def _surviving(self, survivor: CallSurvivor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The planned forward, begun anew where it finds no memory and can be."""
        assert self._latest is not None
        key, chosen = self._latest
        assert chosen.plan is not None
        begun = None
        if survivor.survives and chosen.plan.signature.get(CHANGES) == "":
            begun = Beginning(self._buffers(), self._streams)
        while True:
            try:
                return self.original(*args, **kwargs)
            except Exception as error:
                if self._is_of_captured(error):
                    fewer = self._fewer_after_captured(survivor, error, begun, args, kwargs)
                    if fewer is None:
                        raise
                    chosen = fewer
                    continue
                if not covers(error):
                    raise
                failure = failure_of(error, self.module, key, LEAVES, "forward")
                if not survivor.survives:
                    tell(error, survivor.record_call(failure, chosen, "raised the error, as asked for", None))
                    raise
            chosen = self._begin_again(survivor, failure, key, chosen, begun, args, kwargs)

    def _is_of_captured(self, error: Exception) -> bool:
        """Whether one of this model's captured calls has raised it, which has written it down."""
        return isinstance(error, OutOfMemoryHere) and error.survivor == id(self.survivor)

    def _fewer_after_captured(
        self,
        survivor: CallSurvivor,
        error: Exception,
        begun: Beginning | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Chosen | None:
        """After a captured call's forward that cannot go on by a program of its own: other calls keep less.

        Returns:
            What the forward begins anew with; None where it cannot.
        """
        assert self._latest is not None
        key, chosen = self._latest
        assert chosen.plan is not None
        why = cannot_begin_again(self.module, begun, chosen.plan.signature.get(CHANGES), args, kwargs)
        if begun is not None:
            begun.again()
        fewer = survivor.fewer_kept(chosen)
        if fewer is None:
            return None
        self._adopt(key, fewer)
        if why:
            error.args = (f"{error} And {why}; {LATER}.",)
            return None
        self._start_over(fewer)
        return fewer

    def _start_over(self, chosen: Chosen) -> None:
        current = self.current
        current.calls.restart()
        current.sites, current.segments, current.unseen = chosen.sites, chosen.segments, chosen.unseen

    def _buffers(self) -> list[torch.Tensor]:
        modules = [module for reference in self._with_buffers if (module := reference()) is not None]
        return [buffer for module in modules for buffer in module._buffers.values() if buffer is not None]

    def _begin_again(
        self,
        survivor: CallSurvivor,
        failure: CallFailure,
        key: Key,
        chosen: Chosen,
        begun: Beginning | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Chosen:
        """After a forward that failed: everything is as it was before it, and less will be kept.

        Raises:
            OutOfMemory: it cannot begin anew, or nothing is left to recompute.
        """
        assert chosen.plan is not None
        make_room(failure.device)
        self.counters.ooms += 1
        why = cannot_begin_again(self.module, begun, chosen.plan.signature.get(CHANGES), args, kwargs)
        if begun is not None:
            begun.again()
        fewer = survivor.fewer_kept(chosen)
        if fewer is not None:
            self._adopt(key, fewer)
        if why or fewer is None:
            note = survivor.record_call(failure, chosen, f"raised: {why or _LEAST}", None)
            raise cannot_go_on(failure.phase, failure.place, failure.text, why or _LEAST, note)
        survivor.record_call(failure, chosen, "began the forward anew with less kept", fewer)
        self._start_over(fewer)
        return fewer

    def _adopt(self, key: Key, chosen: Chosen) -> None:
        """Later steps of a kind recompute other calls."""
        self.add(key, chosen)
        self._latest = key, chosen
        self.counters.tightened += 1

    def _backward_failed(self, error: Exception, roots: Sequence[Any]) -> Exception | None:
        """Gives the typed error of a backward of this model that found no memory; None where it is not about that."""
        survivor, latest, model = self.survivor, self._latest, self._model()
        if survivor is None or latest is None or model is None or latest[1].plan is None:
            return None
        key, chosen = latest
        if self._is_of_captured(error):
            fewer = survivor.fewer_kept(chosen)
            if fewer is not None:
                self._adopt(key, fewer)
                if LATER not in str(error):
                    error.args = (f"{error} But {LATER}.",)
            return None
        if not covers(error) or not reaches(roots, model):
            return None
        failure = failure_of(error, model, key, LEAVES, "backward")
        self.counters.ooms += 1
        if not survivor.survives:
            tell(error, survivor.record_call(failure, chosen, "raised the error, as asked for", None))
            return None
        error.__traceback__ = None  # it holds what a failed recompute does
        make_room(failure.device)
        fewer = survivor.fewer_kept(chosen)
        if fewer is not None:
            self._adopt(key, fewer)
        why = f"{_IN_BACKWARD}; {LATER if fewer is not None else _LEAST}"
        note = survivor.record_call(failure, chosen, f"raised: {why}", None)
        return cannot_go_on(failure.phase, failure.place, failure.text, why, note)

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._instance_forward is not None:
            return self._instance_forward(*args, **kwargs)
        return self._function(self._model(), *args, **kwargs)

    def _chosen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Chosen:
        model = self._model()
        assert model is not None, "the model is gone"
        key = self.kind_of(model, args, kwargs)
        found = self.entries.get(key)
        if found is None and self._for_training and not model.training:  # evaluation
            return _NONE
        if found is None:
            found = self._alike(key)
            if found is not None:
                self.add(key, found)
        if found is None:
            found = self.plan_for(key, model, args, kwargs)
        self._latest = key, found
        return found

    def _alike(self, key: Key) -> Chosen | None:
        """What kinds of steps recompute that differ from this one in constants alone, where these do not matter."""
        mine = without_constants(key)
        found = [chosen for other, chosen in self.entries.items() if without_constants(other) == mine]
        sizes = [chosen.baseline for chosen in found]
        matters = len(found) < _ALIKE or not min(sizes) or max(sizes) > _SAME_MEMORY * min(sizes)
        return None if matters else found[-1]

    def plan_for(self, key: Key, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Chosen:
        """Plans for a kind of step that is new."""
        if self.on_miss is None:
            return _NONE
        with _turn:
            found = self.on_miss(self, model, args, kwargs)
        self.planned_on_the_spot += 1
        if self.planned_on_the_spot == _MANY:
            warnings.warn(
                f"{_MANY} kinds of steps have been planned when they came, which takes many steps' time each. Kinds "
                "differ in shapes, modes, which parameters are trained, autocast, and the call's integers and strings: "
                "pad batches to few shapes, and give a number that changes with every step as a tensor or a float.",
                stacklevel=6,
            )
        self.add(key, found)
        return found

    def add(self, key: Key, chosen: Chosen) -> None:
        """Remembers what a kind of step recomputes; its modules run through this plan from now on.

        Raises:
            PlanError: the model has no such module.
        """
        model = self._model()
        assert model is not None, "the model is gone"
        modules = dict(model.named_modules())
        missing = next((path for path in chosen.paths if path not in modules), None)
        if missing is not None:
            raise PlanError(f"The plan names calls of the module {missing!r}, which this model does not have.")
        while len(self.entries) >= _MOST_ENTRIES:
            del self.entries[next(iter(self.entries))]
        self.entries[key] = chosen
        self._with_buffers = [weakref.ref(module) for module in modules.values() if module._buffers]
        self._streams = streams_of(next((p.device for p in model.parameters()), torch.device("cpu")))
        for segment in chosen.segments.values():
            segment.survivor = self.survivor
        for path in chosen.paths:
            if path not in self._wrapped:
                wrapped = self._wrapped[path] = RegionForward(self, path, modules[path])
                modules[path].__dict__["forward"] = wrapped
        self._captured.update(site.path for site in chosen.segments)
        self._leave_compiled_calls()

    def _leave_compiled_calls(self) -> None:
        """A module with a captured call in it, or that is one, runs its forward: `module.compile()` would go around."""
        model = self._model()
        self._around_captured.clear()
        for path, module in model.named_modules() if model is not None and self._captured else ():
            if path and any(f"{one}.".startswith(f"{path}.") for one in self._captured):
                self._around_captured.append(module.__dict__)
                if (compiled := _compat.take_compiled_call(module)) is not None:
                    self._compiled_calls.append((weakref.ref(module), compiled))

    def put_in(self) -> None:
        """The model runs by this plan."""
        super().put_in()
        if self.guard is not None:
            self.guard.put_in()
        if self.survivor is not None and self._unwatch is None:
            reference = weakref.WeakMethod(self._backward_failed)
            unwatch = _compat.watch_backwards(lambda error, roots: _call(reference, error, roots))
            self._unwatch = weakref.finalize(self, unwatch)
        for wrapped in self._wrapped.values():
            module = wrapped._model()
            if module is not None:
                module.__dict__["forward"] = wrapped
        self._leave_compiled_calls()

    def take_out(self) -> None:
        """The model and its modules run their own forwards again."""
        super().take_out()
        if self.guard is not None:
            self.guard.take_out()
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        for wrapped in self._wrapped.values():
            wrapped.take_out()
        for reference, compiled in self._compiled_calls:
            if (module := reference()) is not None:
                _compat.give_compiled_call(module, compiled)
        self._compiled_calls.clear()
        self._around_captured.clear()


def _call(reference: Any, error: Exception, roots: Sequence[Any]) -> Exception | None:
    method = reference()
    found: Exception | None = None if method is None else method(error, roots)
    return found


class RegionForward(StandingForward):
    """The forward of a module some of whose calls are recomputed or captured.

    It has no attributes by name: to a region's watch it is no object of the user's.
    """

    __slots__ = ("path", "planned")

    def __init__(self, planned: PlannedModules, path: str, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.planned = planned
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compiled(args, kwargs)
        forward = self.original
        current = self.planned.current
        site = current.calls.next(self.path)
        segment = current.segments.get(site)
        if segment is not None and torch.is_grad_enabled():
            return segment(self, args, kwargs)
        if site not in current.sites and self.path not in current.unseen:
            return forward(*args, **kwargs)
        tap = _Again(current, current.sites, current.calls.state())
        return regions.run(forward, args, kwargs, Options(CHECKS["default"], True, None, False, True, None, tap))

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Under torch.compile a region becomes one of the compiled graph's own checkpoints."""
        if self._instance_forward is not None:
            return torch.utils.checkpoint.checkpoint(self._instance_forward, *args, use_reentrant=False, **kwargs)
        return torch.utils.checkpoint.checkpoint(self._function, self._model(), *args, use_reentrant=False, **kwargs)


class _Again:
    """Tells the calls inside a region that it runs again, on whichever thread."""

    __slots__ = ("calls", "current", "sites")

    def __init__(self, current: _Current, sites: frozenset[Site], calls: dict[str, int]) -> None:
        self.current, self.sites, self.calls = current, sites, calls

    def begins(self) -> None:
        self.current.sites = self.sites
        self.current.calls.restore(self.calls)

    def hooks(self, pack: Any, unpack: Any) -> tuple[Any, Any]:
        def unpacked(holder: Any) -> torch.Tensor:
            current = self.current
            if not current.is_running:
                tensor: torch.Tensor = unpack(holder)
                return tensor
            # A forward that differentiates goes on, after the recompute, where it stood.
            sites, calls = current.sites, current.calls.state()
            try:
                tensor = unpack(holder)
            finally:
                current.sites = sites
                current.calls.restore(calls)
            return tensor

        return pack, unpacked
