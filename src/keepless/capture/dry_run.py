"""One run of the forward under fake tensors: what it gives, and which of it receives gradients."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from keepless import _compat
from keepless.capture.faking import Faking, given_fakes
from keepless.capture.inputs import FlatInputs
from keepless.capture.ordering import Orders, order_of, orders_of_holes
from keepless.capture.questions import Questions
from keepless.capture.state import Holder, named_state, places_of_state, watched
from keepless.errors import BatchError, CaptureError, DataDependentError, LossError
from keepless.warning import warn_caller

LossFn = Callable[[Any, Any], torch.Tensor]

_MOST_LINES = 12
"""Of what a forward raises."""
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass
class DryRun:
    """What one run of the forward under fake tensors shows."""

    leaves: list[Any]
    spec: Any
    grad_outputs: tuple[int, ...] = ()
    loss_position: int | None = None
    passed_through: dict[int, tuple[str, str | int]] = field(default_factory=dict)
    repeated: dict[int, int] = field(default_factory=dict)
    aside: tuple[str | int, ...] = ()
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    orders: Orders = field(default_factory=dict)


def dry_run(
    model: torch.nn.Module,
    flat: FlatInputs,
    batch: Any,
    loss_fn: LossFn | None,
    grad_outputs: tuple[int, ...] | None,
    faking: Faking,
    questions: Questions | None,
) -> DryRun:
    """The forward's flat output under fake tensors, and which of it receives gradients."""
    mode = faking.mode()
    state = {name: faking.held(mode, t) for name, t in named_state(model)}
    given = given_fakes(mode, flat, faking, questions)
    fakes = {id(flat.leaves[i]): fake for i, fake in zip(flat.tensor_positions, given, strict=True)}
    args, kwargs = flat.rebuild([fakes[id(t)] for t in flat.tensors])
    arguments: dict[int, tuple[str, str | int]] = {id(t): ("state", name) for name, t in state.items()}
    arguments |= {id(fakes[id(flat.leaves[i])]): ("input", i) for i in flat.tensor_positions}
    holder = Holder(model)
    before = _compat.tree_flatten((args, kwargs))
    with faking.around(), mode:
        held = list(state.values())
        swapped = {f"model.{name}": held[index] for name, index in places_of_state(model)}
        try:
            with watched(model) as attributes:
                output = torch.func.functional_call(holder, swapped, args, kwargs, tie_weights=False)
        except Exception as error:  # whatever the user's forward raises is named, with its type, in ours
            raise forward_error(error, "The model's forward") from error
        _check_containers(before, _compat.tree_flatten((args, kwargs)))
        leaves, spec = _compat.tree_flatten(output)
        found = DryRun(leaves, spec, attributes=attributes)
        first: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                if id(leaf) in arguments:
                    found.passed_through[i] = arguments[id(leaf)]
                elif id(leaf) in first:
                    found.repeated[i] = first[id(leaf)]
                first.setdefault(id(leaf), i)
            elif type(leaf).__name__.endswith("Cache"):
                # Keys and values for generation: training never reads them, and holding them would cost their bytes.
                leaves[i] = None
                warn_caller(
                    f"The forward returns a {type(leaf).__name__}, which training does not read: a planned step "
                    "returns None in its place. Set model.config.use_cache = False to say so yourself."
                )
            elif not isinstance(leaf, (bool, int, float, complex, str, bytes, type(None), *_SYMBOLIC)):
                raise CaptureError(
                    f"The forward returns a {type(leaf).__name__} that torch's pytrees do not know; register it with "
                    "torch.utils._pytree.register_pytree_node, or return tensors and containers."
                )
        if grad_outputs is not None:
            found.grad_outputs = grad_outputs
            found.orders = orders_of_holes(leaves, grad_outputs)
        elif loss_fn is None:
            found.loss_position = _own_loss(output, leaves)
            found.grad_outputs = (found.loss_position,)
        else:
            mode.watcher = None  # what the loss asks is no part of the step
            found.grad_outputs = _reached_by_loss(found, fakes, batch, loss_fn)
    if any(not 0 <= i < len(leaves) or not isinstance(leaves[i], torch.Tensor) for i in found.grad_outputs):
        raise CaptureError("The forward's outputs are not those of the step that the plan was made for.")
    _find_aside(found, arguments)
    return found


def _check_containers(before: tuple[list[Any], Any], after: tuple[list[Any], Any]) -> None:
    """Refuses a forward that changes lists or dicts that it is given: a captured step gets only what is in them."""
    if before[1] != after[1] or any(a is not b for a, b in zip(before[0], after[0], strict=True)):
        raise CaptureError(
            "The forward changes a list or dict that it is given; a captured step would not. Return the new ones."
        )


def _reached_by_loss(found: DryRun, fakes: dict[int, torch.Tensor], batch: Any, loss_fn: LossFn) -> tuple[int, ...]:
    """The flat output positions that a loss function's gradient reaches.

    It gets outputs that are cut off from the model's graph: one of them may be made from another.
    """
    leaves, spec = _compat.tree_flatten(batch)
    fake_batch = _compat.tree_unflatten([fakes.get(id(leaf), leaf) for leaf in leaves], spec)
    apart: dict[int, torch.Tensor] = {}
    given: list[Any] = []
    for leaf in found.leaves:
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            leaf = apart.setdefault(id(leaf), leaf.detach().requires_grad_())
        given.append(leaf)
    try:
        loss = loss_fn(_compat.tree_unflatten(given, found.spec), fake_batch)
    except Exception as error:  # whatever the user's loss raises
        raise forward_error(error, "The loss function") from error
    _check_loss(loss, "The loss function returns")
    own = [
        (i, given[i])
        for i, t in enumerate(found.leaves)
        if isinstance(t, torch.Tensor) and t.requires_grad and i not in found.passed_through and i not in found.repeated
    ]
    if not own:
        raise LossError("The loss function's gradient reaches no output of the model.")
    grads = torch.autograd.grad(loss, [t for _, t in own], allow_unused=True)
    reached = tuple(i for (i, _), g in zip(own, grads, strict=True) if g is not None)
    if not reached:
        raise LossError("The loss function's gradient reaches no output of the model.")
    orders = {i: order_of(g, t) for (i, t), g in zip(own, grads, strict=True) if g is not None}
    found.orders = {i: order for i, order in orders.items() if order is not None}
    return reached


def _find_aside(found: DryRun, arguments: dict[int, tuple[str, str | int]]) -> None:
    """The leaves that only outputs without a planned gradient depend on."""
    planned: dict[int, None] = {}
    others: dict[int, None] = {}
    for i, leaf in enumerate(found.leaves):
        if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None and i not in found.repeated:
            into = planned if i in found.grad_outputs else others
            into.update(dict.fromkeys(id(t) for t in _compat.leaf_variables(leaf)))
    found.aside = tuple(arguments[i][1] for i in others if i not in planned and i in arguments)


def _own_loss(output: Any, leaves: list[Any]) -> int:
    """The flat position of `.loss`, `["loss"]`, the first element, or the output itself."""
    loss = output
    if not isinstance(output, torch.Tensor):
        if getattr(output, "loss", None) is not None:
            loss = output.loss
        elif isinstance(output, dict) and output.get("loss") is not None:
            loss = output["loss"]
        elif isinstance(output, (tuple, list)) and output:
            loss = output[0]
        else:
            raise LossError(
                f"The forward returns a {type(output).__name__} without a loss: give loss_fn=, or labels in the batch."
            )
    _check_loss(loss, "The model's loss is")
    return next(i for i, leaf in enumerate(leaves) if leaf is loss)


def _check_loss(loss: Any, what: str) -> None:
    if not isinstance(loss, torch.Tensor):
        raise LossError(f"{what} a {type(loss).__name__}, not a tensor: give loss_fn=.")
    if loss.numel() != 1:
        raise LossError(f"{what} of shape {tuple(loss.shape)}, not a scalar: give loss_fn=, or reduce it.")
    if not loss.requires_grad:
        raise LossError(f"{what} without a gradient: it does not depend on a trainable parameter (or is detached).")


def forward_error(error: Exception, what: str) -> CaptureError:
    """Our error for whatever the user's code raised under fake tensors."""
    if isinstance(error, CaptureError):
        return error
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else '(no message)'}"
    where = _compat.where_of(error)
    if isinstance(error, _compat.data_dependent_errors()) or "data-dependent" in str(error).lower():
        return DataDependentError(
            f"{what} needs a tensor's data in Python{where}, so it cannot be captured as one graph ({text}). "
            "Branch on shapes or constants, or use torch.where."
        )
    if isinstance(error, _compat.capture_errors()) or ".numpy() is not supported" in str(error):
        return CaptureError(f"{what} cannot be captured{where}: {text}")
    lines = str(error).strip().splitlines()[:_MOST_LINES]
    if len(lines) > 1:
        text = f"{type(error).__name__}:\n" + textwrap.indent("\n".join(lines), "    ")
    return BatchError(f"{what} fails on this batch, run on fake tensors{where}: {text}")
