"""Autograd's graph behind tensors, as far as it is seen from Python."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_CAST = "ToCopyBackward"
_VIEWS = tuple(
    f"{name}Backward"
    for name in (
        *("Alias", "AsStrided", "Diagonal", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Split"),
        *("SplitWithSizes", "Squeeze", "T", "Transpose", "Unbind", "Unfold", "UnsafeView", "Unsqueeze", "View"),
    )
)
"""Nodes whose output shares its memory with their input."""
_SAME_NUMBERS = tuple(f"{name}Backward" for name in ("Permute", "ReshapeAlias", "T", "Transpose", "UnsafeView", "View"))
"""Of these those that read all of it."""
_MOST_PARTS = range(64)
"""Parts of a node's output, where a release does not say how many there are."""


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
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    target = (edge.node, edge.output_nr)
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
    return any(len(found.get((cast, 0), ())) > 1 for cast in _casts(_readers(found, parameter)))


def cast_number(tensor: torch.Tensor) -> int | None:
    """The number of the node that gave a tensor, or what it is a view of, another dtype; None where none did."""
    node = (tensor if tensor._base is None else tensor._base).grad_fn
    return node_number(node) if node is not None and node.name().startswith(_CAST) else None


def last_readers(found: dict[tuple[Any, int], set[Any]], parameter: torch.Tensor) -> dict[int, int]:
    """Numbers of the nodes that cast a parameter -> that of the last node which reads what they made, or a view of it.

    Arguments:
        found: edges of the graph -> the nodes behind them.
    """
    last: dict[int, int] = {}
    for cast in _casts(_readers(found, parameter)):
        seen, left = {cast}, [cast]
        while left:
            node = left.pop()
            parts = range(len(getattr(node, "_input_metadata", _MOST_PARTS)))
            readers = {reader for part in parts for reader in found.get((node, part), ())}
            left += [reader for reader in readers - seen if reader.name().startswith(_VIEWS)]
            seen |= readers
        last[node_number(cast)] = max(map(node_number, seen))
    return last


def readers_of(found: dict[tuple[Any, int], set[Any]], parameter: torch.Tensor) -> tuple[list[int], list[list[int]]]:
    """Numbers of the nodes that read a parameter; and for each of them that casts it for several others, its own number
    and theirs.

    Arguments:
        found: edges of the graph -> the nodes behind them.
    """
    readers = _readers(found, parameter)
    casts = [(cast, found.get((cast, 0), ())) for cast in _casts(readers)]
    shared = [[node_number(cast), *map(node_number, others)] for cast, others in casts if len(others) > 1]
    return [node_number(node) for node in readers], shared


def _readers(found: dict[tuple[Any, int], set[Any]], parameter: torch.Tensor) -> Iterable[Any]:
    """The nodes that read a parameter."""
    edge = torch.autograd.graph.get_gradient_edge(parameter)
    return found.get((edge.node, edge.output_nr), ())


def _casts(nodes: Iterable[Any]) -> list[Any]:
    """Those of some nodes that cast."""
    return [node for node in nodes if node.name().startswith(_CAST)]


def source_of_gradient(
    found: dict[tuple[Any, int], set[Any]], edge: tuple[Any, int], reader: Any = None
) -> tuple[Any, int]:
    """The edge whose gradient is handed on as it is, in the same storage, to another one: by sums and views alone.

    Arguments:
        found: edges of the graph -> the nodes behind them.
        edge: where that other gradient goes.
        reader: the one of several nodes behind it that is looked at; None where there is to be only one.
    """
    while True:
        nodes = found.get(edge, ()) if reader is None else (reader,)
        node = next(iter(nodes)) if len(nodes) == 1 else None
        if node is None or not _hands_on(node) or list(node.next_functions).count(edge) != 1:
            return edge
        edge, reader = (node, 0), None


def _hands_on(node: Any) -> bool:
    """Whether a node's gradient is that of what it read: of parts of another size or dtype it is not."""
    name = node.name()
    if name.startswith("AddBackward"):
        return bool(getattr(node, "_saved_alpha", 1) == 1)
    return bool(name.startswith(_SAME_NUMBERS))


def next_node_number() -> int:
    """The number that the next autograd node of this thread gets."""
    home: Any = torch.autograd
    return int(home._get_sequence_nr())


def is_made_since(tensor: torch.Tensor, number: int) -> bool:
    """Whether a tensor's autograd node is of that number or later."""
    node: Any = tensor.grad_fn
    return node is not None and hasattr(node, "_sequence_nr") and int(node._sequence_nr()) >= number
