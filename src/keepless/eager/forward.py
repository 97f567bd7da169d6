"""A region's first run."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from keepless import _compat
from keepless.eager import closures, counters, hooks, profile, randomness, selective, world
from keepless.eager.arguments import Arguments
from keepless.eager.code import Code
from keepless.eager.debugging import OpLogs
from keepless.eager.determinism import Trait
from keepless.eager.failures import REMEDY, CheckpointError
from keepless.eager.frame import Frame, Tap
from keepless.eager.hooks import Judge
from keepless.eager.profile import Profile
from keepless.eager.recompute import unpack
from keepless.eager.watch import Effects, Watch

Contexts = Callable[[], tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]]


class Options(NamedTuple):
    """How a region is checkpointed."""

    trait: Trait
    early_stop: bool
    context_fn: Contexts | None
    debug: bool
    preserve_rng_state: bool
    respect_saved_tensors_hooks: bool | None
    tap: Tap | None = None


def run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Any:
    """Runs a region; its saved tensors are made again when a backward wants them."""
    if not torch.is_grad_enabled() or _runs_directly():
        return function(*args, **kwargs)
    function, args, kwargs = closures.unfolded(function, args, kwargs)
    frame = Frame(function, options.trait, options.early_stop)
    frame.tap = options.tap
    tensors: list[torch.Tensor] = []
    frame.arguments = Arguments(args, kwargs, tensors)
    frame.grads = [tensor.requires_grad for tensor in tensors]
    held = frame.held
    if held or frame.arguments.others:
        frame.own_streams = frame.arguments.streams + randomness.streams_in(held)
        frame.own_objects = [value for value in frame.arguments.others if world.is_plain(value)]
    counters.count("regions")
    call = _Call(function, args, kwargs, frame, tensors)
    if options.context_fn or options.debug:
        with _contexts(frame, options):
            result = call.run(options.preserve_rng_state)
    else:
        result = call.run(options.preserve_rng_state)
    frame.is_over = True
    return result


def _runs_directly() -> bool:
    """Where saved-tensor hooks cannot be used, the region runs as it is, with right values and nothing saved."""
    if _compat.transforms_active() or _compat.forward_ad_active():
        counters.count("direct")
        _warn_of_transforms()
        return True
    return _compat.proxies_trace() or not _compat.saved_tensor_hooks_allowed()


_warned = False


def _warn_of_transforms() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "keepless.checkpoint: under a torch.func transform or forward-mode AD a region runs as it is: "
            "values are right, no memory is saved",
            stacklevel=5,
        )


class _Call:
    __slots__ = ("args", "frame", "function", "kwargs", "tensors")

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: Frame,
        tensors: list[torch.Tensor],
    ) -> None:
        self.function, self.args, self.kwargs, self.frame, self.tensors = function, args, kwargs, frame, tensors

    def run(self, preserve: bool) -> Any:
        """The region's result."""
        held = self.frame.held
        is_flat = types.FunctionType not in map(type, held)  # then none of it is held by a function in the closure
        key, anchors = closures.region_key(self.function, self.args, self.kwargs, held if is_flat else None)
        key = (key, *self.frame.grads)
        known = profile.recall(key)
        if known is not None and not known.varies:
            return self.with_profile(known, preserve)
        result, found = self.watched()
        profile.remember(key, anchors, found)
        return result

    def with_profile(self, known: Profile, preserve: bool) -> Any:
        """A later call: what the watched one wrote is saved, and nobody looks."""
        frame, tensors = self.frame, self.tensors
        frame.hold_inputs(tensors, known.inputs)
        frame.hold_profile(known, preserve)
        versions = _compat.versions(tensors)
        result = self._judging(known) if known.observers else self._plainly()
        if _compat.versions(tensors) != versions:
            self._check_inputs(versions)
        if _compat.versions(frame.fixed) != frame.versions:
            self._refuse(self._changed())
        return result

    def _plainly(self) -> Any:
        frame = self.frame
        pack = selective.marked(frame.pack) if frame.is_selective else frame.pack
        hooks = (pack, unpack) if frame.tap is None else frame.tap.hooks(pack, unpack)
        _compat.push_saved_tensor_hooks(*hooks)
        try:
            return self.function(*self.args, **self.kwargs)
        finally:
            _compat.pop_saved_tensor_hooks()

    def _judging(self, known: Profile) -> Any:
        """Hooks that only looked when they were watched are judged again: they may do more by now."""
        frame = self.frame
        effects = Effects()
        judge = Judge(lambda: (frame.count(), effects.count), effects)

        def route(call: Callable[..., Any], module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            if not known.observers.isdisjoint(hooks.hooks_of(module)):
                judge.judge_in(*hooks.hook_dictionaries(module))
            return call(module, *args, **kwargs)

        with judge, hooks.calls_through(route):
            result = self._plainly()
        frame.acting = judge.active
        return result

    def _check_inputs(self, versions: list[int]) -> None:
        pairs = zip(_compat.versions(self.tensors), versions, strict=True)
        changed = {position for position, (now, before) in enumerate(pairs) if now != before}
        if not changed <= set(self.frame.clones):
            self._refuse(f"its input {min(changed - set(self.frame.clones))}")

    def _changed(self) -> str:
        frame = self.frame
        assert frame.profile is not None
        pairs = zip(frame.fixed, _compat.versions(frame.fixed), frame.versions, strict=True)
        tensor = next(tensor for tensor, now, before in pairs if now != before)
        return f"{frame.profile.name_of(tensor) or 'a tensor'} of shape {list(tensor.shape)}"

    def _refuse(self, what: str) -> None:
        assert self.frame.known is not None
        self.frame.known.varies = True
        raise CheckpointError(
            f"checkpoint: {self.frame.name} changed {what} in place, which it did not when it was watched; the values "
            f"of before are gone, and a recompute would use the new ones. {REMEDY}"
        )

    def watched(self) -> tuple[Any, Profile]:
        """A first call: what it reads, writes and draws is seen, call by call and module by module."""
        counters.count("watched")
        function, frame = self.function, self.frame
        values = (*self.args, *self.kwargs.values())
        watch = Watch(self.tensors, frame.count)
        frame.hold_inputs(self.tensors, ())
        family = [m for root in closures.modules_of(function, values) for m in profile.family(root)]
        for holder in world.holders_of(function, values, family):
            watch.look_at(holder)
        code = Code(function, [holder for holder, _ in watch.attributes.values()])
        for home, names in code.globals_read():
            watch.look_at_globals(home, names)
        named = [stream for item in code.functions for stream in randomness.named_in(item.__code__, item.__globals__)]
        own = randomness.streams_in(value for _, before in watch.attributes.values() for value, _ in before.values())
        before = randomness.save((randomness.DEFAULT, *profile.global_streams(), *frame.own_streams, *own))
        is_compiled = any(_compat.is_compiled(item) for item in (function, *frame.held, *family))
        if is_compiled:
            result = self._compiled(watch, family)
        else:
            with watch.judge, hooks.calls_through(watch.route), watch:
                result = self._plainly()
        watch.finish()
        if watch.lost:
            raise self._lost(watch.lost)
        moved = randomness.moved(before)
        frame.random = [(stream, state) for stream, state in before if stream in moved or stream is randomness.DEFAULT]
        frame.random += watch.generators.values()
        frame.clones.update(watch.inputs)
        for position in watch.inputs:
            frame.inputs[position] = None
        frame.state = watch.before
        read = [t for ref in watch.read.values() if (t := ref()) is not None]
        frame.fixed = [tensor for tensor in read if not watch.written.touch(tensor)]
        frame.versions = _compat.versions(frame.fixed)
        code = Code(function, [*(holder for holder, _ in watch.attributes.values()), *watch.called.values()])
        known = watch.variables(
            code.names, code.stored, {id(item) for item in (function, closures.owner(function), *frame.held, *values)}
        )
        if watch.inputs:
            leaves = [leaf for item in known for _, leaf in item.leaves(())]
            if any(map(watch.is_named_input, (*leaves, *(leaf for _, leaf in profile.ways_to_held(frame.held))))):
                raise self._lost("an input that it also finds by name was changed in place")
        acting = watch.judge.active
        gathered = [v for pairs in watch.hook_variables.values() for key, v in pairs if key in acting]
        frame.variables = [*known, *gathered]
        found = Profile(family, is_compiled, watch, known, frame.held)
        drawn = [stream for stream, _ in frame.random if stream is not randomness.DEFAULT]
        found.streams = list({stream.key: stream for stream in (*drawn, *named)}.values())
        found.draws = randomness.DEFAULT in moved
        found.fills_late = watch.fills_late
        frame.early_stop = frame.early_stop and not watch.fills_late
        found.paths.add(frame.path())
        frame.profile, frame.placed, frame.written = found, found.fixed(), found.state()
        return result, found

    def _lost(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint: in {self.frame.name}, {what}; a recompute would not find the values of before. Give the "
            "region a clone, or leave the change outside"
        )

    def _compiled(self, watch: Watch, family: list[torch.nn.Module]) -> Any:
        """Compiled code would be traced with whoever watches it: only what it left changed is seen."""
        for module in family:
            watch.meet(module)
        versions = _compat.versions(self.tensors)
        result = self._plainly()
        if _compat.versions(self.tensors) != versions:
            watch.lost = "compiled code changed an input"
        return result


class _Both:
    """Two contexts as one, entered again by each recompute."""

    def __init__(self, *contexts: contextlib.AbstractContextManager[Any]) -> None:
        self.contexts = contexts
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context)
            self.stack = stack.pop_all()

    def __exit__(self, *error: Any) -> bool | None:
        return self.stack.__exit__(*error)


@contextlib.contextmanager
def _contexts(frame: Frame, options: Options) -> Iterator[None]:
    """The context around the forward; the frame gets the one for its recompute."""
    if options.context_fn is None:
        logs = OpLogs()
        frame.context, frame.on_failure = logs.again, logs.explain
        with logs.forward:
            yield
        return
    around, frame.context = options.context_fn()
    if hasattr(around, "respect_saved_tensors_hooks"):
        around.respect_saved_tensors_hooks = options.respect_saved_tensors_hooks
    ended = False
    draws = selective.Draws()
    frame.is_selective = True
    frame.context = _Both(frame.context, selective.Redraws(draws))
    with around, draws:
        yield
        ended = True
    if not ended:
        raise RuntimeError(
            f"checkpoint: the forward context of context_fn suppressed an exception of {frame.name}; a failed forward "
            "has no result to go on with"
        )
