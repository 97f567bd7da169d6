"""What ties a torch-free `Graph` to torch: a call for each op, a tensor slot for each value.

A *slot* is one tensor of the captured step: the result of an op, a view of another slot, or an argument. Slots that
share storage belong to one `Value`. A view slot costs nothing and is made where it is first needed, again after each
recomputation of its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from keepless.ir import Graph


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor argument: the slot's tensor goes here."""

    slot: int


@dataclass(frozen=True, slots=True)
class Call:
    """A callable with arguments in which `Ref` stands for a tensor."""

    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ViewCode:
    """How to make a view slot: `source` is the slot that it looks at; `item` picks from a tuple of views."""

    source: int
    call: Call
    item: int | None = None


@dataclass(frozen=True, slots=True)
class OpCode:
    """How to run one op.

    Arguments:
        call: of the first run.
        outputs: (position in the returned tuple, slot, value); position None where one tensor is returned.
        replay: the call of later runs, where it differs (BatchNorm without its statistics).
        in_place: (output value, input value) -> the call that writes the output over the input.
        state: the value that holds the generator's state before the draw, for an RNG op.
        first_only: values that `call` gives and `replay` does not. They are read before what they update is written, so
            that a run which keeps one is a `call`, whichever it is.
    """

    call: Call
    outputs: tuple[tuple[int | None, int, int], ...]
    replay: Call | None = None
    in_place: Mapping[tuple[int, int], Call] = field(default_factory=dict)
    state: int | None = None
    first_only: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Fact:
    """A plain constant that the model's code may read: `read(*place)` is its value now."""

    label: str
    read: Callable[..., Any]
    place: tuple[Any, ...]
    value: Any


@dataclass(frozen=True)
class Binding:
    """Everything that the engine needs beside the graph.

    Arguments:
        graph: the step.
        ops: per op; None for opaque ops that the caller runs (LOSS, OPTIMIZER).
        slot_value: slot -> value id.
        views: slot -> how to make it.
        params: parameter name -> slot, in the model's order.
        buffers: buffer name -> slot.
        inputs: flat batch position -> slot.
        constants: slot -> tensor that the model's code holds.
        constant_homes: slot -> (name, how to read it now) of those that the code could replace.
        outputs: flat output position -> slot, or None where `output_constants` has the value.
        output_constants: flat output position -> value that is not a tensor.
        examples_require_grad: flat output position -> whether the output requires a gradient.
        output_spec: pytree spec that puts the outputs together.
        grad_outputs: flat output positions that receive gradients in the backward.
        tangents: slots of those gradients, in the same order.
        grads: (parameter name or flat input position, slot) of each gradient that the step makes.
        examples: slot -> fake tensor with its shape, strides, dtype and device.
        device: of the step.
        passed_through: flat output position -> the argument slot that the forward returns as it is.
        repeated: flat output position -> the earlier position where the same tensor object stands.
        aside: names or flat input positions of leaves that get gradients from outputs outside `grad_outputs` only.
        attributes: (module path, name, value) of the plain attributes that the forward read.
        facts: plain constants elsewhere (configs, closures, globals) that the forward may have read.
        asked: what a batch (by flat position) answers otherwise where the forward asked of its data, in words; None
            where nothing was asked.
        ambient: autocast, default dtype and the like around the capture.
        accumulates: whether gradients may stand already when the step begins.
        orders: flat output position -> dimensions of its gradient as they lie in memory, where that is not as the
            output's do.
    """

    graph: Graph
    ops: tuple[OpCode | None, ...]
    slot_value: Mapping[int, int]
    views: Mapping[int, ViewCode]
    params: Mapping[str, int]
    buffers: Mapping[str, int]
    inputs: Mapping[int, int]
    constants: Mapping[int, torch.Tensor]
    constant_homes: Mapping[int, tuple[str, Callable[[], Any]]]
    outputs: Mapping[int, int]
    output_constants: Mapping[int, Any]
    examples_require_grad: Mapping[int, bool]
    output_spec: Any
    grad_outputs: tuple[int, ...]
    tangents: tuple[int, ...]
    grads: tuple[tuple[str | int, int], ...]
    examples: Mapping[int, torch.Tensor]
    device: torch.device
    passed_through: Mapping[int, int] = field(default_factory=dict)
    repeated: Mapping[int, int] = field(default_factory=dict)
    aside: tuple[str | int, ...] = ()
    attributes: tuple[tuple[str, str, Any], ...] = ()
    facts: tuple[Fact, ...] = ()
    asked: Callable[[Any], str] | None = None
    ambient: tuple[Any, ...] = ()
    accumulates: bool = False
    orders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def renumbered(binding: Binding, graph: Graph, ops: Sequence[int], values: Sequence[int]) -> Binding:
    """The same step bound to a graph that has its ops in another order.

    Arguments:
        graph: the other one.
        ops: of each op of that graph, the op of the binding's; values: likewise.
    """
    new = {old: value for value, old in enumerate(values)}

    def code_of(code: OpCode | None) -> OpCode | None:
        if code is None:
            return None
        return replace(
            code,
            outputs=tuple((item, slot, new[value]) for item, slot, value in code.outputs),
            in_place={(new[out], new[source]): call for (out, source), call in code.in_place.items()},
            state=None if code.state is None else new[code.state],
        )

    return replace(
        binding,
        graph=graph,
        ops=tuple(code_of(binding.ops[op]) for op in ops),
        slot_value={slot: new[value] for slot, value in binding.slot_value.items()},
    )


def map_refs(item: Any, replace: Callable[[int], Any]) -> Any:
    """The nested arguments with every `Ref` replaced by `replace(slot)`."""
    if isinstance(item, Ref):
        return replace(item.slot)
    if isinstance(item, tuple | list):
        return type(item)(map_refs(part, replace) for part in item)
    if isinstance(item, dict):
        return {key: map_refs(part, replace) for key, part in item.items()}
    return item


def slots_of(call: Call) -> list[int]:
    """The slots that a call reads, each once, in the order of the arguments."""
    found: dict[int, None] = {}
    map_refs((call.args, dict(call.kwargs)), lambda slot: found.setdefault(slot, None))
    return list(found)
