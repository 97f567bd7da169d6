"""Which sizes vary from call to call, and fakes with symbols in their places."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from keepless import _compat
from keepless._compat import sizes as sizes_compat
from keepless.capture.faking import Faking, fake_like
from keepless.capture.inputs import FlatInputs
from keepless.errors import CaptureError

BOUNDS = f"templates are for sizes from 2 to {sizes_compat.SymbolicSizes.LARGEST}"

Place = tuple[int, int]
"""A flat position in a call, and a dimension of the tensor there."""


def varying_dims(*calls: FlatInputs) -> dict[Place, int] | str:
    """The dimensions in which calls differ, with numbers that are equal where the sizes are equal in each call.

    Returns:
        The reason where the calls differ in more than sizes.
    """
    first = calls[0]
    groups: dict[tuple[int, ...], int] = {}
    found: dict[Place, int] = {}
    for call in calls[1:]:
        reason = other_call(first, call)
        if reason:
            return reason
    for position in first.tensor_positions:
        for dim, sizes in enumerate(zip(*(call.facts[position][1] for call in calls), strict=True)):
            if len(set(sizes)) > 1:
                found[position, dim] = groups.setdefault(sizes, len(groups))
    return found


def other_call(a: FlatInputs, b: FlatInputs) -> str:
    """What differs between two calls beside sizes and strides; empty where nothing does."""
    if a.spec != b.spec or a.tensor_positions != b.tensor_positions or a.first != b.first:
        return "the arguments have another structure"
    for position, (x, y) in enumerate(zip(a.leaves, b.leaves, strict=True)):
        if position not in a.first and not (type(x) is type(y) and (x is y or x == y)):
            return f"argument {position} is {y!r}, and was {x!r}"
    for position, (dtype, shape, _, *rest) in a.facts.items():
        other = b.facts[position]
        if (dtype, len(shape), *rest) != (other[0], len(other[1]), *other[3:]):
            return f"argument {position} has another dtype, device, class, number of dimensions or requires_grad"
    return ""


class SymbolicFaking(Faking):
    """Fakes with symbols for the sizes that vary."""

    def __init__(self, flat: FlatInputs, dynamic: Mapping[Place, int], device: torch.device) -> None:
        super().__init__(device)
        self.env = sizes_compat.SymbolicSizes()
        self.dynamic = dynamic
        self.hints: list[int] = []
        sizes: dict[int, Any] = {}
        for (position, dim), group in dynamic.items():
            size = flat.facts[position][1][dim]
            if group not in sizes:
                if not 2 <= size <= self.env.LARGEST:
                    raise CaptureError(f"Dimension {dim} of argument {position} is {size}: {BOUNDS}.")
                sizes[group] = self.env.new_size(size)
                self.hints.append(size)
            elif size != self.hints[list(sizes).index(group)]:
                raise CaptureError(f"Dimension {dim} of argument {position} is {size}, unlike those that go with it.")
        self.place_of = [next(place for place, g in dynamic.items() if g == group) for group in sizes]
        self.shapes: dict[int, tuple[Any, ...]] = {}
        self.strides: dict[int, tuple[Any, ...]] = {}
        for position in flat.tensor_positions:
            shape = flat.facts[position][1]
            if any((position, dim) in dynamic for dim in range(len(shape))):
                known = (sizes[dynamic[position, d]] if (position, d) in dynamic else n for d, n in enumerate(shape))
                self.shapes[position] = tuple(known)
                self.strides[position] = _symbolic_strides(position, self.shapes[position], *flat.facts[position][1:3])
        self.created: list[torch.fx.Node] = []

    def hint(self, size: Any) -> int:
        return int(size.node.hint)

    def mode(self) -> Any:
        return sizes_compat.SymbolicMode(allow_non_fake_inputs=True, shape_env=self.env)

    def all_around(self) -> contextlib.AbstractContextManager[Any]:
        return self.env.watched()

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with _compat.eagers_own_ops(), sizes_compat.enable_python_dispatcher():
            yield

    def given(self, mode: Any, position: int, tensor: torch.Tensor) -> torch.Tensor:
        if position not in self.shapes:
            return fake_like(mode, tensor, self.device)
        device = self.device if tensor.is_meta else tensor.device
        with mode:
            fake = torch.empty_strided(self.shapes[position], self.strides[position], dtype=tensor.dtype, device=device)
        return fake.requires_grad_(tensor.requires_grad)

    def made(self, node: torch.fx.Node) -> None:
        self.created.append(node)


def _symbolic_strides(
    position: int, shape: tuple[Any, ...], sizes: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[Any, ...]:
    """The strides of a dense tensor, in terms of its sizes."""
    inward = range(len(sizes) - 1, -1, -1)
    for order in (list(inward), sorted(inward, key=lambda d: strides[d])):
        plain, symbolic = [0] * len(sizes), [0] * len(sizes)
        length, known = 1, 1
        for dim in order:
            plain[dim], symbolic[dim] = length, known
            length, known = length * sizes[dim], known * shape[dim]
        if tuple(plain) == tuple(strides):
            return tuple(symbolic)
    raise CaptureError(f"Argument {position} has strides {tuple(strides)} at shape {tuple(sizes)}: it is not dense.")
