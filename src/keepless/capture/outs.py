"""Forms of aten ops that write their results into tensors that are given, for the arena.

A form takes the op's own arguments and a tuple of tensors, one for each result, in the layout that the op gives them.
Where torch has an overload with `out` arguments it is found by its schema; some ops get one of their own here. Whether
a form gives the op's bits, and does not allocate the result all the same (many `out` overloads copy), is tried before
it is used (`keepless.execute.trying`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from keepless import _compat
from keepless.capture import aten as known

aten = torch.ops.aten

OutForm = Callable[..., Any]
"""Called with (results, *args, **kwargs)."""


def out_form(target: Any) -> OutForm | None:
    """The form of an op, or None."""
    try:
        own = _OWN.get(target)
    except TypeError:  # a callable that cannot be hashed
        own = None
    if own is not None:
        return own
    if isinstance(target, _compat.OpOverload) and not target._schema.is_mutable:
        return _by_schema(target)
    return None


@functools.cache
def _by_schema(target: Any) -> OutForm | None:
    """The overload of the same op with the same arguments and an `out` for each result."""
    plain = [(argument.name, str(argument.type)) for argument in target._schema.arguments]
    packet = target.overloadpacket
    for name in packet.overloads():
        found = getattr(packet, name)
        arguments = found._schema.arguments
        outs = [argument.name for argument in arguments if argument.is_out]
        rest = [(argument.name, str(argument.type)) for argument in arguments if not argument.is_out]
        if outs and len(outs) == len(target._schema.returns) and rest == plain:
            return Overload(found, tuple(outs))
    return None


@dataclass(frozen=True, slots=True)
class Overload:
    """An overload with `out` arguments of these names as a form."""

    found: Any
    names: tuple[str, ...]

    def __call__(self, results: tuple[torch.Tensor, ...], *args: Any, **kwargs: Any) -> None:
        self.found(*args, **kwargs, **dict(zip(self.names, results, strict=True)))


def _copy(results: tuple[torch.Tensor, ...], x: torch.Tensor, **_: Any) -> None:
    """A clone, or a cast to another dtype or layout: the result has both."""
    results[0].copy_(x)


def _embedding(results: tuple[torch.Tensor, ...], weight: torch.Tensor, indices: torch.Tensor, *_: Any) -> None:
    flat = results[0].view(-1, weight.shape[1])
    torch.index_select(weight, 0, indices.reshape(-1), out=flat)


def _draw_mask(results: tuple[torch.Tensor, ...], size: Any, stride: Any, keep: float) -> None:
    results[0].bernoulli_(keep)


def _full_mask(results: tuple[torch.Tensor, ...], size: Any, stride: Any) -> None:
    results[0].fill_(True)


def _apply_mask(results: tuple[torch.Tensor, ...], x: torch.Tensor, mask: torch.Tensor, scale: float) -> None:
    out = results[0].copy_(mask)
    torch.mul(x, out, out=out).mul_(scale)


def _relu(results: tuple[torch.Tensor, ...], x: torch.Tensor) -> None:
    torch.clamp_min(x, 0, out=results[0])


def _mul(results: tuple[torch.Tensor, ...], x: torch.Tensor, number: Any) -> None:
    torch.mul(x, number, out=results[0])


def _div(results: tuple[torch.Tensor, ...], x: torch.Tensor, number: Any) -> None:
    torch.div(x, number, out=results[0])


def _ones_like(results: tuple[torch.Tensor, ...], *_: Any, **__: Any) -> None:
    results[0].fill_(1)


def _zeros(results: tuple[torch.Tensor, ...], *_: Any, **__: Any) -> None:
    results[0].zero_()


_OWN: dict[Any, OutForm] = {
    aten.clone.default: _copy,
    aten._to_copy.default: _copy,
    aten.embedding.default: _embedding,
    aten.relu.default: _relu,
    aten.mul.Scalar: _mul,
    aten.div.Scalar: _div,
    aten.ones_like.default: _ones_like,
    aten.zeros_like.default: _zeros,
    aten.new_zeros.default: _zeros,
    aten.zeros.default: _zeros,
    known.draw_mask: _draw_mask,
    known.full_mask: _full_mask,
    known.apply_mask: _apply_mask,
}
