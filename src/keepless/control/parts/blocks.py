"""Captures of module calls, and which of them serve for other modules of the same kind.

The layers of a model are mostly alike: one of them is captured, and its binding serves for every other whose code
would read the same: the same classes in the same places, tensors of the same shapes, equal modes, and equal values
behind every attribute, closure and global that the captured forward read.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from keepless import _compat
from keepless.binding import Binding
from keepless.capture import (
    MISSING,
    FlatInputs,
    StepShape,
    attribute_of,
    equal_constants,
    find_facts,
    lower,
    planned_device,
    trace_step,
)
from keepless.capture.ordering import Orders
from keepless.control.trials import untouched


@dataclass(frozen=True)
class BlockCapture:
    """A captured call: the module that was captured, how it was called, and what came of it."""

    module: weakref.ref[torch.nn.Module]
    kind: tuple[Any, ...]
    flat: FlatInputs
    shared: frozenset[int]
    orders: Orders
    binding: Binding


@dataclass
class Library:
    """The captures of a model's blocks.

    Attributes:
        traced: how many calls were captured anew; all others share.
    """

    shape: StepShape
    captures: list[BlockCapture] = field(default_factory=list)
    traced: int = 0

    def binding(
        self,
        module: torch.nn.Module,
        flat: FlatInputs,
        received: tuple[int, ...],
        shared: frozenset[int],
        orders: Orders,
    ) -> Binding:
        """The binding of a call.

        Arguments:
            received: flat positions of the outputs that get a gradient.
            shared: flat positions of inputs that code behind the call reads, too.
            orders: of gradients that come in another layout than their outputs.

        Raises:
            CaptureError: it cannot be captured.
        """
        kind = kind_of(module)
        ambient = _compat.ambient_state(planned_device(module).type)
        for known in self.captures:
            binding = known.binding
            if (
                known.kind == kind
                and known.shared == shared
                and binding.grad_outputs == received
                and known.orders == orders
                and binding.ambient == ambient
                and _same_call(known.flat, flat)
            ):
                if known.module() is module:
                    return binding
                own = rebound(binding, module)
                if own is not None:
                    return own
        with untouched(module):
            traced = trace_step(
                module, flat, batch=None, loss_fn=None, grad_outputs=received, orders=orders, asks=False
            )
            binding = lower(traced, flat, module, replace(self.shape, shared_inputs=shared))
        self.traced += 1
        self.captures.append(BlockCapture(weakref.ref(module), kind, flat.without_tensors(), shared, orders, binding))
        return binding


def kind_of(module: torch.nn.Module) -> tuple[Any, ...]:
    """What two modules must have in common to share a capture: classes, modes, tensors and which of these are tied."""
    first: dict[int, int] = {}
    rows: list[Any] = []
    for path, part in module.named_modules(remove_duplicate=False):
        own = [
            (name, None)
            if t is None
            else (
                name,
                first.setdefault(id(t), len(first)),
                tuple(t.shape),
                t.dtype,
                tuple(t.stride()),
                t.requires_grad,
                str(t.device),
                type(t),
            )
            for table in (part._parameters, part._buffers)
            for name, t in table.items()
        ]
        rows.append((path, type(part), part.training, tuple(own)))
    return tuple(rows)


def rebound(binding: Binding, module: torch.nn.Module) -> Binding | None:
    """The same capture for another module of the kind; None where its code might read other constants."""
    if binding.constant_homes:
        return None
    parts = dict(module.named_modules())
    attributes: list[tuple[str, str, Any]] = []
    for path, name, value in binding.attributes:
        part = parts.get(path)
        now = MISSING if part is None else attribute_of(part.__dict__, type(part), name)
        if not _reads_same(now, value):
            return None
        attributes.append((path, name, now))
    if any("forward" in part.__dict__ and not _is_ours(part.__dict__["forward"]) for part in parts.values()):
        return None
    facts = find_facts(module, attributes)
    if len(facts) != len(binding.facts):
        return None
    for here, there in zip(facts, binding.facts, strict=True):
        if here.label != there.label or not _reads_same(here.value, there.value):
            return None
    return replace(binding, attributes=tuple(attributes), facts=facts)


def _is_ours(forward: Any) -> bool:
    return getattr(forward, "original", None) is not None


def _reads_same(now: Any, planned: Any) -> bool:
    """Whether code that reads one does what code does that reads the other."""
    if now is planned or equal_constants(now, planned):
        return True
    if type(now) is not type(planned):
        return False
    if isinstance(now, (list, tuple)):
        return len(now) == len(planned) and all(map(_reads_same, now, planned))
    if isinstance(now, dict):
        return list(now) == list(planned) and all(_reads_same(now[key], planned[key]) for key in now)
    return False


def _same_call(a: FlatInputs, b: FlatInputs) -> bool:
    """Whether two calls mean the same captured step."""
    if a.spec != b.spec or a.first != b.first or a.facts != b.facts or len(a.leaves) != len(b.leaves):
        return False
    pairs = zip(a.leaves, b.leaves, strict=True)
    return all(i in a.first or x is y or equal_constants(x, y) for i, (x, y) in enumerate(pairs))
