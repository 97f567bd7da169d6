"""Streams of random numbers that a region may draw from: torch's default ones, the user's, Python's, NumPy's."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from keepless import _compat


class Stream:
    """One stream of random numbers; `get` gives its state, `set` puts one back."""

    __slots__ = ("get", "key", "name", "set")

    def __init__(self, name: str, get: Callable[[], Any], put: Callable[[Any], Any], key: Any = None) -> None:
        self.name, self.get, self.set = name, get, put
        self.key = name if key is None else key


State = list[tuple[Stream, Any]]


def of_generator(generator: torch.Generator) -> Stream:
    """The stream of a torch generator."""
    return Stream(f"torch.Generator on {generator.device}", generator.get_state, generator.set_state, id(generator))


DEFAULT = of_generator(torch.default_generator)
PYTHON = Stream("Python's random module", random.getstate, random.setstate)


def numpy_stream() -> Stream | None:
    """NumPy's global stream; None where NumPy was never imported."""
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is None:
        return None
    return Stream("numpy.random", lambda: numpy.get_state(legacy=False), numpy.set_state)


def of_object(value: Any) -> Stream | None:
    """The stream of a generator object: torch's, Python's or NumPy's; None for anything else."""
    if isinstance(value, torch.Generator):
        return of_generator(value)
    if isinstance(value, random.Random):
        return Stream("a random.Random", value.getstate, value.setstate, id(value))
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        if isinstance(value, numpy.Generator):
            bits = value.bit_generator
            return Stream(
                "a numpy Generator", lambda: bits.state, lambda state: setattr(bits, "state", state), id(bits)
            )
        if isinstance(value, numpy.RandomState):
            return Stream("a numpy RandomState", lambda: value.get_state(legacy=False), value.set_state, id(value))
    return None


def streams_in(values: Iterable[Any]) -> list[Stream]:
    """The streams of the generator objects among these values."""
    return [stream for value in values if (stream := of_object(value)) is not None]


def device_streams(devices: Iterable[torch.device]) -> list[Stream]:
    """The default streams of accelerators that are in use already."""
    found = []
    for device in devices:
        home: Any = torch.get_device_module(device)
        ready = getattr(home, "is_initialized", lambda: True)
        if ready() and hasattr(home, "get_rng_state"):
            found.append(_device_stream(home, device))
    return found


def _device_stream(home: Any, device: torch.device) -> Stream:
    if device.type == "mps":
        return Stream("mps", home.get_rng_state, home.set_rng_state)
    return Stream(
        f"{device}", lambda: home.get_rng_state(device), lambda state: home.set_rng_state(state, device=device)
    )


def every_device() -> list[torch.device]:
    """All accelerators of this machine."""
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    return [] if kind is None else [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]


def save(streams: Iterable[Stream]) -> State:
    """Each stream with its state now."""
    return [(stream, stream.get()) for stream in streams]


def put(state: State) -> None:
    """Sets each stream to its saved state."""
    for stream, value in state:
        stream.set(value)


def moved(state: State) -> list[Stream]:
    """The streams that are not where they were saved."""
    return [stream for stream, before in state if not _equal(before, stream.get())]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        with _compat.own_ops():
            return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if hasattr(one, "tobytes"):
        return bool(one.tobytes() == other.tobytes())
    return bool(one == other)


def named_in(code: types.CodeType, home: dict[str, Any]) -> list[Stream]:
    """The global streams of Python and NumPy whose functions this code names, whether or not a run got there."""
    found: list[Stream] = []
    for name in code.co_names:
        value = home.get(name)
        if value is random or getattr(value, "__self__", None) is random.random.__self__:  # type: ignore[attr-defined]
            found.append(PYTHON)
        elif isinstance(value, types.ModuleType) and value.__name__ in ("numpy", "numpy.random"):
            stream = numpy_stream() if value.__name__ == "numpy.random" or "random" in code.co_names else None
            found += [stream] if stream else []
    return found
