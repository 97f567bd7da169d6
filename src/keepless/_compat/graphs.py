"""Autograd's graph behind tensors, as far as it is seen from Python."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch

_CAST = "ToCopyBackward"
_SAME_NUMBERS = tuple(
    f"{name}Backward"
    for name in (
        *("Alias", "Clone", "Permute", "ReshapeAlias", "Squeeze", "T", "Transpose", "UnsafeView", "Unsqueeze", "View"),
    )
)
"""Nodes that read all of their input, as it is."""
_SUMS = ("AddBackward", "SubBackward")
_JOINS = ("CatBackward", "StackBackward")
"""Nodes that send parts of the gradient that they get as views of it."""


def edge_of(tensor: torch.Tensor) -> tuple[Any, int]:
    """Where a tensor's gradient goes: a node, and which of its gradients."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def graph_behind(tensors: Iterable[torch.Tensor]) -> dict[tuple[Any, int], set[Any]]:
    """Where gradients go in autograd's graph behind these tensors (a node, and which of its gradients) -> the nodes
    from which they come.
    """
    found: dict[tuple[Any, int], set[Any]] = {}
    left: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        for edge in node.next_functions:
            if edge[0] is not None:
                found.setdefault(edge, set()).add(node)
                if edge[0] not in seen:
                    seen.add(edge[0])
                    left.append(edge[0])
    return found


def parts_of_gradient(
    found: dict[tuple[Any, int], set[Any]], tensor: torch.Tensor
) -> tuple[list[torch.Tensor], list[Any]]:
    """A list that fills with the parts of a tensor's gradient as a backward sends them, one by one, before they are
    added up; and the handles of the hooks that do so.

    Arguments:
        found: `graph_behind` what is differentiated.
    """
    target = edge_of(tensor)
    parts: list[torch.Tensor] = []
    handles = []
    for node in found.get(target, ()):
        places = [place for place, other in enumerate(node.next_functions) if other == target]

        def note(sent: tuple[torch.Tensor | None, ...], _: Any, places: list[int] = places) -> None:
            parts.extend(part for place in places if (part := sent[place]) is not None)

        handles.append(node.register_hook(note))
    return parts, handles


def node_number(node: Any) -> int:
    """The number of a node of autograd's graph; -1 where it has none."""
    return int(node._sequence_nr()) if hasattr(node, "_sequence_nr") else -1


def is_cast_for_several(found: dict[tuple[Any, int], set[Any]], parameter: torch.Tensor) -> bool:
    """Whether one cast of a parameter is read by several nodes of a graph, as autocast makes them.

    Arguments:
        found: edges of the graph -> the nodes behind them.
    """
    casts = (node for node in _readers(found, parameter) if node.name().startswith(_CAST))
    return any(len(found.get((cast, 0), ())) > 1 for cast in casts)


def readers_of(found: dict[tuple[Any, int], set[Any]], parameter: torch.Tensor) -> list[int]:
    """Numbers of the nodes that read a parameter.

    Arguments:
        found: edges of the graph -> the nodes behind them.
    """
    return [node_number(node) for node in _readers(found, parameter)]


def _readers(found: dict[tuple[Any, int], set[Any]], parameter: torch.Tensor) -> Iterable[Any]:
    """The nodes that read a parameter."""
    return found.get(edge_of(parameter), ())


def hands_on(node: Any, edge: tuple[Any, int]) -> bool:
    """Whether the gradient that a node sends there is the one that it gets, or a view of it, in the same storage."""
    if list(node.next_functions).count(edge) != 1:
        return False
    name = node.name()
    if name.startswith(_JOINS):
        return True
    if gradient_nbytes(edge) != gradient_nbytes((node, 0)):  # it is cast, or summed up
        return False
    if name.startswith(_SUMS):
        is_same = node.next_functions[0] == edge or (name.startswith("Add") and getattr(node, "_saved_alpha", 1) == 1)
        return is_same and _shape_of(edge) == _shape_of((node, 0))  # else what was broadcast is summed up
    return bool(name.startswith(_SAME_NUMBERS))


def gradient_nbytes(edge: tuple[Any, int]) -> int:
    """Bytes of the gradient that goes there; 0 where autograd does not tell."""
    known = _looks_of(edge)
    return 0 if known is None or known.dtype is None else int(prod(_shape_of(edge)) * known.dtype.itemsize)


def _shape_of(edge: tuple[Any, int]) -> tuple[int, ...]:
    known = _looks_of(edge)
    return () if known is None else tuple(map(int, known.shape))


def _looks_of(edge: tuple[Any, int]) -> Any:
    """What autograd knows of the gradient that goes there."""
    known = getattr(edge[0], "_input_metadata", ())
    return known[edge[1]] if edge[1] < len(known) else None


def next_node_number() -> int:
    """The number that the next autograd node of this thread gets."""
    home: Any = torch.autograd
    return int(home._get_sequence_nr())


def is_made_since(tensor: torch.Tensor, number: int) -> bool:
    """Whether a tensor's autograd node is of that number or later."""
    node: Any = tensor.grad_fn
    return node is not None and hasattr(node, "_sequence_nr") and int(node._sequence_nr()) >= number
