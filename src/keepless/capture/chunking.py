"""Finds the loss over the logits in a traced step, and puts the loss in chunks of rows in its place.

What is looked for, and what becomes of it::

    logits = mm(x, w)          (rows, classes)        x' = the same steps on x
    views, slices, casts       of logits              loss, total = chunked_loss(x', w, targets, ...)
    _log_softmax, nll_loss
    ...
    nll_loss_backward, _log_softmax_backward_data     of_x', of_w = chunked_loss_backward(tangent, x', w, ...)
    views, slices, casts       of their gradient      of_x = the same steps on of_x'
    of_x = mm(gradient, w.t()), of_w = mm(gradient.t(), x)

Steps between product and log-softmax treat rows alike, so that they may be done to hidden states instead. Anything else
there, or another reader of the logits, is a reason to refuse. Where logits are an output of the model, that is None.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch

from keepless import _compat
from keepless.capture.chunked_ops import chunked_loss, chunked_loss_backward
from keepless.capture.trace import Traced
from keepless.errors import RewriteError
from keepless.machine import CHUNKED_LOSS

aten = torch.ops.aten
_Node = torch.fx.Node

_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.alias.default,
    aten.detach.default,
    aten.reshape.default,
)
_SIZED = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_CASTS = (aten._to_copy.default,)
_COPIES = (aten.clone.default,)
_SLICES = (aten.slice.Tensor,)
_SLICES_BACK = (aten.slice_backward.default,)


class _Module:
    """A graph with the constants of another module."""

    def __init__(self, graph: torch.fx.Graph, constants: Any) -> None:
        self.graph = graph
        self._constants = constants

    def __getattr__(self, name: str) -> Any:
        return getattr(self._constants, name)


def with_chunked_loss(traced: Traced) -> tuple[Traced, frozenset[int]]:
    """The step with its loss in chunks, and the flat output positions that are None for it; the given one stays.

    Raises:
        RewriteError: the step has no such loss, or something between that cannot be done in chunks.
    """
    graph = torch.fx.Graph()
    table: dict[Any, Any] = {}
    graph.graph_copy(traced.module.graph, table)
    old = next(node for node in traced.module.graph.nodes if node.op == "output")
    last = graph.output(torch.fx.node.map_arg(old.args[0], table.__getitem__))
    last.meta = copy.copy(old.meta)
    finder = _Finder(traced, graph, last)
    finder.replace_all()
    living = _live(graph, last)
    for node in reversed(list(graph.nodes)):
        if node in finder.live and node not in living:
            graph.erase_node(node)
    return replace(traced, module=_Module(graph, traced.module)), frozenset(finder.withheld)


def _refuse(why: str) -> NoReturn:
    raise RewriteError(
        f'The loss cannot be computed in chunks (rewrites=("{CHUNKED_LOSS}",)): {why}. docs/rewrites.md says what can.'
    )


class _Finder:
    def __init__(self, traced: Traced, graph: torch.fx.Graph, last: Any) -> None:
        self.traced, self.graph, self.last = traced, graph, last
        self.live = _live(graph, last)
        self.withheld: set[int] = set()

    def replace_all(self) -> None:
        """Each loss over logits in turn; there is one at least."""
        losses = [n for n in self.graph.nodes if n.target is aten.nll_loss_forward.default and n in self.live]
        if not losses:
            if any("nll_loss2d" in str(n.target) for n in self.graph.nodes):
                _refuse("classes are not in the last dimension: flatten rows first, logits.flatten(0, 1)")
            _refuse(
                "the captured step has no cross entropy; where the loop computes it, put it into the model with "
                "keepless.with_loss"
            )
        for loss in losses:
            self.one(loss)

    def users(self, node: Any) -> list[Any]:
        return [user for user in node.users if user in self.live]

    # ---- matching

    def one(self, loss: Any) -> None:
        scores, targets, class_weight, reduction, ignore_index = loss.args
        if not _is_call(scores, aten._log_softmax.default):
            _refuse("the loss is of something else than a log-softmax")
        if scores.args[1] not in (1, -1) or scores.args[2]:
            _refuse("its log-softmax is not over the last dimension, or changes the dtype")
        if reduction not in (1, 2):
            _refuse('its reduction is "none"')
        of_scores, back = self.backward_of(scores, loss)
        product, steps = self.product_of(scores.args[0])
        bias, x, w = (None, *product.args[:2]) if product.target is aten.mm.default else product.args[:3]
        if product.kwargs:
            _refuse("its product is scaled")
        self.check_readers(product, steps, scores)
        gradient, back_steps = self.gradient_of(back, product)
        of_x, of_w, of_bias, by_class = self.products_of(gradient, x, w)
        rows = self.forward_steps(x, steps, before=loss)
        dtype = scores.meta["val"].dtype
        shared = (w, bias, targets, class_weight, reduction, ignore_index, dtype)
        with self.graph.inserting_before(loss):
            made = self.call(chunked_loss, (rows, *shared), loss, loss.meta["val"])
        loss.replace_all_uses_with(made)
        total = next(n for n in made.users if _is_call(n, operator.getitem) and n.args[1] == 1)
        wanted = (of_x is not None, of_w is not None, of_bias is not None)
        with self.graph.inserting_before(back):
            first = None if of_x is None else self.first_value(of_x, rows, back_steps)
            values = (first, *(None if n is None else n.meta["val"] for n in (of_w, of_bias)))
            given = (of_scores.args[0], rows, *shared, total, wanted, by_class)
            parts = self.call(chunked_loss_backward, given, back, values)
            items = [
                None if not is_wanted else self.call(operator.getitem, (parts, item), back, values[item])
                for item, is_wanted in enumerate(wanted)
            ]
        for old, new in ((of_w, items[1]), (of_bias, items[2])):
            if old is not None and new is not None:
                self.put(new, old)
        if of_x is not None and items[0] is not None:
            self.put(self.backward_steps(items[0], back_steps, of_x), of_x)
        self.withhold(product)

    def backward_of(self, scores: Any, loss: Any) -> tuple[Any, Any]:
        """The backward's two ops over the logits."""
        same = self.with_views(scores)
        readers = {user for node in same for user in self.users(node)} - set(same) - {loss}
        first = [n for n in readers if _is_call(n, aten.nll_loss_backward.default)]
        second = [n for n in readers if _is_call(n, aten._log_softmax_backward_data.default)]
        others = readers - set(first) - set(second)
        if others:
            _refuse(f"its log-softmax is also read by {_name(next(iter(others)))}")
        if len(first) != 1 or len(second) != 1 or second[0].args[0] is not first[0] or len(self.users(first[0])) != 1:
            _refuse("its backward is not that of a cross entropy")
        if loss.args[1:5] != first[0].args[2:6]:
            _refuse("its backward is that of other targets")
        return first[0], second[0]

    def with_views(self, node: Any) -> list[Any]:
        """A node and what is the same tensor."""
        found = [node]
        for one in found:
            found += [n for n in self.users(one) if n.target in (aten.detach.default, aten.alias.default)]
        return found

    def product_of(self, node: Any) -> tuple[Any, list[Any]]:
        """The product that makes the logits, and the steps from it to a node, in order."""
        steps: list[Any] = []
        while isinstance(node, _Node) and node.target not in (aten.mm.default, aten.addmm.default):
            allowed = node.target in (*_VIEWS, *_CASTS, *_COPIES) or (
                node.target in _SLICES and node.meta["val"].shape[-1] == _source(node).meta["val"].shape[-1]
            )
            if not allowed:
                _refuse(f"between the logits and their log-softmax stands {_name(node)}")
            steps.append(node)
            node = node.args[0]
        classes = steps[0].meta["val"].shape[-1] if steps else 0
        if any(step.meta["val"].shape[-1] != classes for step in steps) or (
            steps and node.meta["val"].shape[-1] != classes
        ):
            _refuse("the logits' last dimension is not that of the classes")
        return node, steps[::-1]

    def check_readers(self, product: Any, steps: list[Any], scores: Any) -> None:
        """Nothing else reads the logits, but that they may be an output."""
        chain = {product, *steps}
        for node in chain:
            for user in self.users(node):
                if user in chain or user is scores or user is self.last:
                    continue
                same = self.with_views(user) if user.target in _VIEWS else []
                readers = [n for one in same for n in self.users(one) if n not in same]
                if not same or any(reader is not self.last for reader in readers):
                    _refuse(f"the logits are also read by {_name(next(iter(readers), user))}")

    def gradient_of(self, back: Any, product: Any) -> tuple[Any, list[Any]]:
        """The gradient of the product, and the steps to it."""
        steps: list[Any] = []
        node, shape = back, product.meta["val"].shape
        while True:
            users = self.users(node)
            if node.meta["val"].shape == shape and any(
                n.target in (aten.t.default, aten.mm.default, aten.sum.dim_IntList) for n in users
            ):
                return node, steps
            if len(users) != 1 or users[0].target not in (*_VIEWS, *_CASTS, *_COPIES, *_SLICES_BACK):
                _refuse(f"the gradient of the logits meets {_name(users[0]) if users else 'nothing'}")
            node = users[0]
            steps.append(node)

    def products_of(self, gradient: Any, x: Any, w: Any) -> tuple[Any, Any, Any, bool]:
        """The nodes that make the gradients of x, w and bias from that of the logits."""
        of_x: Any | None = None
        of_w: Any | None = None
        of_bias: Any | None = None
        by_class = True
        todo = [(user, gradient) for user in self.users(gradient)]
        for user, source in todo:
            if user.target is aten.t.default and source is gradient:
                todo += [(reader, user) for reader in self.users(user)]
            elif user.target is aten.sum.dim_IntList and source is gradient and user.args[1:] == ([0], True):
                of_bias = user
            elif user.target is aten.mm.default and source is gradient and user.args[0] is gradient:
                of_x = user
            elif user.target is aten.mm.default and user.args[1] is x and source is not gradient:
                of_w, by_class = user, True
            elif user.target is aten.mm.default and source is gradient and user.args[1] is gradient:
                of_w, by_class = user, False
            else:
                _refuse(f"the gradient of the logits is also read by {_name(user)}")
        return of_x, of_w, of_bias, by_class

    # ---- rewriting

    def call(self, target: Callable[..., Any], args: tuple[Any, ...], like: Any, value: Any) -> Any:
        node = self.graph.call_function(target, args)
        node.meta = copy.copy(like.meta)
        node.meta["val"] = value
        self.live.add(node)
        return node

    def forward_steps(self, x: Any, steps: list[Any], before: Any) -> Any:
        """The steps from the logits to their log-softmax, done to hidden states; casts are left to the loss."""
        width = x.meta["val"].shape[-1]
        with self.graph.inserting_before(before):
            for step in steps:
                if step.target in _CASTS or step.target in (aten.detach.default, aten.alias.default):
                    continue
                x = self.step(step, x, width)
        return x

    def step(self, step: Any, source: Any, width: int) -> Any:
        """A step done to hidden states, or to their gradient."""
        target: Any = step.target
        if target is aten._unsafe_view.default:  # it makes a tensor that knows nothing of writes to its source
            target = aten.view.default
        args = _with_width(step, source, width)
        plain = [arg.meta["val"] if isinstance(arg, _Node) else arg for arg in args]
        node = self.call(target, args, step, target(*plain, **step.kwargs))
        node.kwargs = step.kwargs
        return node

    def first_value(self, of_x: Any, rows: Any, steps: list[Any]) -> torch.Tensor:
        """What stands for the gradient of the rows: the storage of that of x where only views lie between."""
        val: torch.Tensor = of_x.meta["val"]
        if any(step.target in (*_SLICES_BACK, *_COPIES) for step in steps):
            val = rows.meta["val"].new_empty(rows.meta["val"].shape)
        return val

    def backward_steps(self, node: Any, steps: list[Any], of_x: Any) -> Any:
        """The steps from the gradient of the log-softmax to that of the product, done to that of hidden states."""
        width, val = of_x.meta["val"].shape[-1], of_x.meta["val"]
        making = [step for step in steps if step.target in (*_SLICES_BACK, *_COPIES)]
        if not making:
            return node
        with self.graph.inserting_before(of_x):
            for step in steps:
                if step.target in _CASTS or step.target in (aten.detach.default, aten.alias.default):
                    continue
                node = self.step(step, node, width)
                if step is making[-1]:  # what reads the gradient of x knows it by its storage
                    node.meta["val"] = val.view(node.meta["val"].shape)
        return node

    def put(self, new: Any, old: Any) -> None:
        """One node in another's place, which it may stand before."""
        old.replace_all_uses_with(new)
        new.meta["val"] = old.meta["val"]

    def withhold(self, product: Any) -> None:
        """Outputs that are the logits are given up."""
        reached = {product}
        for node in self.graph.nodes:
            if node.target in (*_VIEWS, *_CASTS, *_COPIES, *_SLICES) and node.args[0] in reached:
                reached.add(node)
        tensors = [i for i, leaf in enumerate(self.traced.output_leaves) if isinstance(leaf, torch.Tensor)]
        kept_args, kept_descriptions = [], []
        for item, description in zip(self.last.args[0], self.last.meta["desc"], strict=True):
            role, what = _compat.describe_output(description)
            if role == "output" and item in reached:
                position = tensors[what]
                if position in self.traced.grad_outputs:
                    _refuse("the logits are an output that receives a gradient: compute the loss in the model alone")
                self.withheld.add(position)
            else:
                kept_args.append(item)
                kept_descriptions.append(description)
        self.last.args = (kept_args,)
        self.last.meta["desc"] = kept_descriptions


def _live(graph: torch.fx.Graph, last: Any) -> set[Any]:
    """The nodes that something comes of."""
    found = {last} | {n for n in graph.nodes if n.target is aten.copy_.default}
    for node in reversed(list(graph.nodes)):
        if node in found:
            found.update(node.all_input_nodes)
    return found


def _is_call(node: Any, target: Any) -> bool:
    return isinstance(node, _Node) and node.target is target


def _source(node: Any) -> Any:
    source = node.args[0]
    assert isinstance(source, _Node)
    return source


def _name(node: Any) -> str:
    if node.op == "output":
        return "the output"
    source = node.meta.get("keepless_source", "")
    return f"{node.target} ({source})" if source else str(node.target)


def _with_width(step: Any, source: Any, width: int) -> tuple[Any, ...]:
    """A step's arguments with the hidden width in the place of the classes."""
    if step.target in _SIZED or step.target in _SLICES_BACK:
        return (source, [*step.args[1][:-1], width], *step.args[2:])
    if step.target in _SLICES and len(step.args) > 3 and step.args[1] in (-1, step.meta["val"].dim() - 1):
        return (source, *step.args[1:3], width)
    return (source, *step.args[1:])
