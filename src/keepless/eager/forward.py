"""A region's first run."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from keepless import _compat
from keepless.eager import closures, counters, modules, profile, randomness
from keepless.eager.arguments import Arguments
from keepless.eager.debugging import OpLogs
from keepless.eager.determinism import Trait
from keepless.eager.failures import CheckpointError
from keepless.eager.frame import Frame
from keepless.eager.profile import Profile
from keepless.eager.recompute import unpack
from keepless.eager.watch import Watch

Contexts = Callable[[], tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]]


class Options(NamedTuple):
    """How a region is checkpointed."""

    trait: Trait
    early_stop: bool
    context_fn: Contexts | None
    debug: bool
    preserve_rng_state: bool
    respect_saved_tensors_hooks: bool | None


def run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> Any:
    """Runs a region; its saved tensors are made again when a backward wants them."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if _runs_directly():
        return function(*args, **kwargs)
    frame = Frame(function, options.trait, options.early_stop)
    tensors: list[torch.Tensor] = []
    frame.arguments = Arguments(args, kwargs, tensors)
    frame.own_streams = frame.arguments.streams + randomness.streams_in(closures.held_values(function))
    with _contexts(frame, options) if options.context_fn or options.debug else contextlib.nullcontext():
        key, anchors = closures.region_key(function, args)
        known = profile.recall(key)
        counters.count("regions")
        if known is None or known.varies:
            result, found = _watched(function, args, kwargs, frame, tensors)
            profile.remember(key, anchors, found)
        else:
            result = _known(function, args, kwargs, frame, tensors, known, options.preserve_rng_state)
    frame.over = True
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


def _known(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    frame: Frame,
    tensors: list[torch.Tensor],
    known: Profile,
    preserve: bool,
) -> Any:
    frame.hold_inputs(tensors, tuple(i for i in known.inputs if i < len(tensors)))
    frame.hold_profile(known, preserve)
    versions = _compat.versions(tensors)
    _compat.push_saved_tensor_hooks(frame.pack, unpack)
    try:
        result = function(*args, **kwargs)
    finally:
        _compat.pop_saved_tensor_hooks()
    if _compat.versions(tensors) != versions:
        _check_inputs(frame, tensors, versions)
    if _compat.versions(frame.fixed) != frame.versions:
        _refuse(frame, "a parameter, a buffer or a tensor of its closure")
    return result


def _check_inputs(frame: Frame, tensors: list[torch.Tensor], versions: list[int]) -> None:
    changed = {
        i for i, (now, before) in enumerate(zip(_compat.versions(tensors), versions, strict=True)) if now != before
    }
    if not changed <= set(frame.clones):
        _refuse(frame, f"its input {min(changed - set(frame.clones))}")


def _refuse(frame: Frame, what: str) -> None:
    assert frame.known is not None
    frame.known.varies = True
    raise CheckpointError(
        f"checkpoint: {frame.name} changed {what} in place, which it did not when it was watched; the values of before "
        "are gone, and a recompute would use the new ones. From the next call on the region is watched: put the state "
        "back and run the step again"
    )


def _watched(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    frame: Frame,
    tensors: list[torch.Tensor],
) -> tuple[Any, Profile]:
    counters.count("watched")
    roots = closures.modules_of(function, args)
    owner = closures.owner(function)
    watch = Watch(tensors, frame.count)
    frame.hold_inputs(tensors, ())
    frame.hold_globals(*closures.read_globals(function))
    for holder in (*roots, *((owner,) if hasattr(owner, "__dict__") else ())):
        watch.look_at(holder)
    holders = [holder for holder, _ in watch.attributes.values()]
    streams = [*profile.possible_streams(holders), *frame.own_streams]
    before = randomness.save((randomness.DEFAULT, *streams))
    with contextlib.ExitStack() as stack:
        watch.judge_hooks(stack)
        stack.enter_context(modules.calls_through(watch.route))
        stack.enter_context(watch)
        _compat.push_saved_tensor_hooks(frame.pack, unpack)
        stack.callback(_compat.pop_saved_tensor_hooks)
        result = function(*args, **kwargs)
    watch.finish()
    moved = randomness.moved(before)
    drawn = [stream for stream in moved if stream is not randomness.DEFAULT]
    own = {id(stream): state for stream, state in before}
    frame.random = [(randomness.DEFAULT, own[id(randomness.DEFAULT)]), *((s, own[id(s)]) for s in drawn)]
    seen = [(stream, state) for stream, state in watch.generators.values()]
    frame.random += seen
    frame.clones.update(watch.inputs)
    for position in watch.inputs:
        frame.inputs[position] = None
    frame.state = list(watch.before.values())
    written = {id(tensor) for tensor, _ in frame.state}
    frame.fixed = [t for key, ref in watch.read.items() if key not in written and (t := ref()) is not None]
    frame.versions = _compat.versions(frame.fixed)
    frame.flags = [(module, module.training) for module in watch.called.values()]
    for holder, name in watch.changed_attributes():
        value, copy = watch.attributes[id(holder)][1].get(name, (modules.MISSING, None))
        frame.attributes.append((holder, name, value, copy))
    named = profile.named_streams(function, watch.called.values())
    found = Profile(function, args, watch, _distinct([*drawn, *(s for s, _ in seen), *named]))
    found.draws = randomness.DEFAULT in moved
    frame.profile = found
    return result, found


def _distinct(streams: list[randomness.Stream]) -> list[randomness.Stream]:
    return list({stream.key: stream for stream in streams}.values())


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
    with around:
        yield
        ended = True
    if not ended:
        raise RuntimeError(
            f"checkpoint: the forward context of context_fn suppressed an exception of {frame.name}; a failed forward "
            "has no result to go on with"
        )
