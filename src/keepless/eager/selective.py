"""Beside torch's selective checkpointing: what lets a recompute leave ops out.

An op whose result was saved is not run again, so that it draws no random numbers the second time; the ops after it
would draw its numbers. Each op that draws therefore starts from the state that it had in the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from keepless import _compat
from keepless.eager import randomness
from keepless.eager.calls import draws_of, tensors_in
from keepless.eager.randomness import Stream


def _stream_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stream | None:
    drawn = draws_of(func, args, kwargs)
    if drawn is False:
        return None
    if drawn is not True:
        return randomness.of_generator(drawn)
    devices = [tensor.device for tensor in tensors_in((*args, *kwargs.values()))]
    named = kwargs.get("device")
    device = torch.device(named) if named is not None else devices[0] if devices else torch.device("cpu")
    if device.type == "cpu":
        return randomness.DEFAULT
    return next(iter(randomness.device_streams([device])), None)


class Draws(_compat.WatchingMode):
    """Notes the state of the stream before each op that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[tuple[Stream, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stream = _stream_of(func, args, kwargs)
        if stream is not None:
            self.states.append((stream, stream.get()))
        return func(*args, **kwargs)


class Redraws(_compat.WatchingMode):
    """Sets the stream to the noted state before each op that draws."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.draws = draws
        self.count = 0

    def __enter__(self) -> Any:
        self.count = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws_of(func, args, kwargs) is not False and self.count < len(self.draws.states):
            stream, state = self.draws.states[self.count]
            self.count += 1
            stream.set(state)
        return func(*args, **kwargs)


def marked(pack: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """A pack hook that torch's selective checkpointing knows for a checkpoint's, with the user's hooks around it."""

    def hook(tensor: torch.Tensor) -> Any:
        return pack(tensor)

    hook._checkpoint_internal = True  # type: ignore[attr-defined]
    hook._user_hooks = _compat.user_saved_tensor_hooks()  # type: ignore[attr-defined]
    return hook
