"""`checkpoint` and `checkpoint_sequential`: torch's functions, with every side effect of the forward replayed.

The signature is that of `torch.utils.checkpoint.checkpoint` in torch 2.15. The method is non-reentrant checkpointing
on saved-tensor hooks, as torch's own; what differs is what a recompute sees and leaves behind.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, overload

import torch
import torch.utils.checkpoint

from keepless import _compat
from keepless.eager import determinism, forward
from keepless.eager.forward import Contexts, Options

P = ParamSpec("P")
R = TypeVar("R")

_torchs = torch.utils.checkpoint.checkpoint  # as it is now: a program may put ours in its place


class CheckpointedFunction(Generic[P, R]):
    """A function that runs as a checkpointed region each time it is called; works as a method too."""

    def __init__(self, function: Callable[P, R], options: dict[str, Any]) -> None:
        self.function = function
        self.options = options
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = _checkpoint(self.function, args, kwargs, **self.options)
        return result

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        bind = getattr(self.function, "__get__", None)
        if instance is None or bind is None:
            return self
        return CheckpointedFunction(bind(instance, owner), self.options)


@overload
def checkpoint(function: Callable[..., R], *args: Any, **kwargs: Any) -> R: ...
@overload
def checkpoint(function: None = None, **kwargs: Any) -> Callable[[Callable[P, R]], CheckpointedFunction[P, R]]: ...
def checkpoint(
    function: Callable[..., Any] | None = None,
    *args: Any,
    use_reentrant: bool | None = None,
    preserve_rng_state: bool = True,
    context_fn: Contexts = torch.utils.checkpoint.noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    respect_saved_tensors_hooks: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Runs `function(*args, **kwargs)` without keeping what its ops save; the backward runs it again.

    The result, every gradient, buffers, streams of random numbers and Python state are bit for bit those of calling
    the function plainly, or an error is raised before a gradient is made. Without a function, a decorator.

    Arguments:
        function: a module, function, method or partial. Its closure is held as it is now.
        use_reentrant: accepted for compatibility; both values mean the same here. None warns, as in torch.
        preserve_rng_state: False saves the cost of holding torch's default stream in regions that were not
            seen to draw from it. A stream that a region draws from is restored either way: its masks would differ.
        context_fn: gives two context managers, for the forward and for the recompute.
        determinism_check: "default" compares the shape, dtype and device of each saved tensor in the recompute with the
            forward's; "bitwise" compares all bits (hashes each saved tensor: for debugging); "none" nothing.
        debug: lists the ops of both runs in the error of a recompute that went another way.
        early_stop: the recompute ends at the last tensor that is still wanted.
        respect_saved_tensors_hooks: handed to torch's selective checkpointing in `context_fn`.

    Raises:
        keepless.errors.RecomputeError: the recompute went another way, or cannot be made right.
        keepless.errors.StaleTensorError: a parameter or another tensor that the region reads was changed between
            forward and backward.
        ValueError: an unknown `determinism_check`, or `debug` together with `context_fn`.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174; saved-tensor hooks as in
    torch.utils.checkpoint.
    """
    options: dict[str, Any] = {
        "use_reentrant": use_reentrant,
        "preserve_rng_state": preserve_rng_state,
        "context_fn": context_fn,
        "determinism_check": determinism_check,
        "debug": debug,
        "early_stop": early_stop,
        "respect_saved_tensors_hooks": respect_saved_tensors_hooks,
    }
    if function is None:
        if args:
            raise TypeError("checkpoint: without a function it is a decorator and takes no arguments for one")
        return functools.partial(_decorated, options)
    return _checkpoint(function, args, kwargs, **options)


def _decorated(options: dict[str, Any], function: Callable[P, R]) -> CheckpointedFunction[P, R]:
    return CheckpointedFunction(function, options)


def _checkpoint(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    use_reentrant: bool | None,
    preserve_rng_state: bool,
    context_fn: Contexts,
    determinism_check: str,
    debug: bool,
    early_stop: bool,
    respect_saved_tensors_hooks: bool | None,
) -> Any:
    if torch.compiler.is_dynamo_compiling():
        if context_fn is torch.utils.checkpoint.noop_context_fn:
            return _torchs(function, *args, use_reentrant=False, **kwargs)
        return _torchs(function, *args, use_reentrant=False, context_fn=context_fn, **kwargs)
    if use_reentrant is None:
        warnings.warn(
            "checkpoint: the use_reentrant parameter should be passed explicitly; here both values mean the "
            "non-reentrant method",
            stacklevel=3,
        )
    if not callable(function):
        raise TypeError(f"checkpoint: the first argument is called, and {function.__class__.__name__} cannot be")
    trait = determinism.CHECKS.get(determinism_check)
    if trait is None:
        raise ValueError(
            f"checkpoint: determinism_check is {determinism_check!r}; known: {', '.join(determinism.CHECKS)}"
        )
    stops, debugs = _compat.checkpoint_switches()
    debug = debug if debugs is None else debugs
    contexts = None if context_fn is torch.utils.checkpoint.noop_context_fn else context_fn
    if debug and contexts is not None:
        raise ValueError("checkpoint: debug=True lists ops by context managers of its own; leave context_fn out")
    early_stop = early_stop if stops is None else stops
    return forward.run(
        function,
        args,
        kwargs,
        Options(trait, early_stop, contexts, debug, preserve_rng_state, respect_saved_tensors_hooks),
    )


def checkpoint_sequential(
    functions: Any, segments: int, input: Any, use_reentrant: bool | None = None, **kwargs: Any
) -> Any:
    """Runs a sequence of modules or functions in `segments` checkpointed parts; the last part is run plainly.

    Arguments:
        functions: an `nn.Sequential`, or a list of modules or functions of one argument.
        segments: number of parts, from 1 to the number of functions.
        input: what the first function takes.
        use_reentrant: as for `checkpoint`.
        kwargs: `preserve_rng_state`, accepted for compatibility.

    Raises:
        ValueError: an unknown option, or a number of segments that the sequence does not have.
    """
    if use_reentrant is None:
        warnings.warn(
            "checkpoint_sequential: the use_reentrant parameter should be passed explicitly; here both values mean "
            "the non-reentrant method",
            stacklevel=2,
        )
        use_reentrant = False
    kwargs.pop("preserve_rng_state", True)
    if kwargs:
        raise ValueError(f"checkpoint_sequential: unknown options {', '.join(kwargs)}")
    steps = list(functions.children()) if isinstance(functions, torch.nn.Sequential) else list(functions)
    if not 1 <= segments <= max(1, len(steps)):
        raise ValueError(f"checkpoint_sequential: {segments} segments of {len(steps)} functions")
    size = len(steps) // segments
    for start in range(0, size * (segments - 1), size):
        input = checkpoint(_Chain(steps[start : start + size]), input, use_reentrant=use_reentrant)
    return _Chain(steps[size * (segments - 1) :])(input)


class _Chain:
    """Functions one after the other."""

    def __init__(self, steps: list[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, value: Any) -> Any:
        for step in self.steps:
            value = step(value)
        return value
