"""Where gradients wait between the pieces of a backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from keepless._compat import graphs
from keepless.modules.flows import Gradient, Part, flows, gradients_behind

_PIECES = 3
"""What comes in, a block, and what stands behind it; backward ops 6, 5 and 4, and the caller's is 3."""


def stand(gradients: Sequence[Gradient]) -> list[tuple[int, int, list[int]]]:
    """Bytes of each storage, the op that makes it, and those that read it."""
    found = flows(gradients, lambda moment: moment, lambda piece: 2 * _PIECES - piece, _PIECES)
    return [(storage.nbytes, storage.made, sorted(storage.used)) for storage in found.storages]


def around(
    of_block: int | None, of_input: int | None, nbytes: int = 8, before: tuple[int | None, ...] = ()
) -> list[Gradient]:
    """The gradients of a result, of what a block gives, and of what the block and the code behind it read."""
    result = Gradient(2, nbytes, (Part(None),))
    given = Gradient(1, 8, (Part(2, of_block),))
    read = Gradient(0, 8, (Part(2, of_input), Part(1), *(Part(1, part) for part in before)))
    return [result, given, read]


def test_a_gradient_goes_around_a_block_in_the_storage_that_the_block_reads() -> None:
    """`x + block(x)`: the block's own part is added in place when its backward has let go of the other."""
    assert stand(around(0, 0)) == [(8, 3, [4, 5, 6])]


def test_scaled_parts_have_storages_of_their_own() -> None:
    """`0.7 * x + 0.5 * block(x)`."""
    assert stand(around(None, None)) == [(8, 3, [4]), (8, 4, [5]), (8, 4, [6])]


def test_one_scaled_part_leaves_the_other_where_it_was() -> None:
    """`x - block(x)`."""
    assert stand(around(None, 0)) == [(8, 3, [4, 6]), (8, 4, [5])]


def test_views_hold_all_of_what_they_are_cut_from() -> None:
    """`cat([x, block(x)])`: a sum with a view is not in place."""
    assert stand(around(0, 0, nbytes=16)) == [(16, 3, [4, 5]), (8, 5, [6])]


def test_a_sum_with_what_others_hold_is_not_in_place() -> None:
    """Two tensors of one sum, both with another part later: who comes first gets a storage, the other keeps its own."""
    shared = Gradient(2, 8, (Part(None),))
    first = Gradient(0, 8, (Part(2, 0), Part(1)))
    assert stand([shared, first, first]) == [(8, 3, [4, 5, 6]), (8, 5, [6])]


def test_what_is_read_where_it_is_made_does_not_wait() -> None:
    """Two ops within one piece; what the first of them hands on is that piece's own."""
    inner = Gradient(2, 8, (Part(2),))
    assert stand([Gradient(2, 8, (Part(None),)), inner, Gradient(1, 8, (Part(2, 1),))]) == [(8, 3, [4]), (8, 4, [5])]


def test_gradients_that_nobody_sends_are_nowhere() -> None:
    assert stand([Gradient(1, 8, ())]) == []


_MAKES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": lambda x, y: x + y,
    "sum with a number": lambda x, y: (x + 1.0) * (y - 1.0),
    "difference": lambda x, y: x - y,
    "scaled sum": lambda x, y: torch.add(x, y, alpha=0.5),
    "broadcast sum": lambda x, y: x + y[:1],
    "product": lambda x, y: x * y,
    "joined": lambda x, y: torch.cat([x, y], 1),
    "stacked": lambda x, y: torch.stack([x, y]),
    "viewed": lambda x, y: x.view(16).clone() + y.t().reshape(16),
    "squeezed": lambda x, y: (x.unsqueeze(0) + y).squeeze(0).permute(1, 0),
    "cast": lambda x, y: x.bfloat16() + y.bfloat16(),
    "cut": lambda x, y: x[:2] + y.chunk(2)[1],
    "several": lambda x, y: x + (x + y) + x * y,
    "in place": lambda x, y: x.mul_(2).add_(y),
}


@pytest.mark.parametrize("name", _MAKES)
def test_what_nodes_hand_on_is_known(name: str) -> None:
    """A part of a gradient is said to be the one of the result exactly where autograd sends it in that storage."""
    x, y = (torch.ones(4, 4, requires_grad=True).mul(2) for _ in "xy")
    edges = [graphs.edge_of(tensor) for tensor in (x, y)]
    out = _MAKES[name](x, y)
    behind = graphs.graph_behind([out])
    found, places = gradients_behind(behind, [graphs.edge_of(out)], lambda number: number)
    gradient = torch.ones_like(out)

    def is_of_result(part: Part) -> bool:
        number = part.handed
        while number is not None and number != places[graphs.edge_of(out)]:
            parts = found[number].parts
            number = parts[0].handed if len(parts) == 1 else None
        return number is not None

    sent: list[list[bool]] = [[], []]
    handles = []
    for edge, said in zip(edges, sent, strict=True):
        for node in behind[edge]:
            place = [other for other, _ in node.next_functions].index(edge[0])

            def note(parts: Any, _: Any, place: int = place, said: list[bool] = said) -> None:
                said.append(parts[place].untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr())

            handles.append(node.register_hook(note))
    out.backward(gradient)
    for edge, said in zip(edges, sent, strict=True):
        number = places[edge]
        assert sorted(said) == sorted(map(is_of_result, found[number].parts))
        assert found[number].nbytes == 64
    for handle in handles:
        handle.remove()
