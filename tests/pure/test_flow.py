"""Minimum cuts: the same set of nodes from OR-tools and from scipy, and a known one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepless.solve import flow

pytest.importorskip("ortools")
Edges = list[tuple[int, int, int]]


@st.composite
def networks(draw: st.DrawFn) -> tuple[int, Edges]:
    """How many nodes, the last is the sink and the one before it the source; edges, each pair once."""
    num = draw(st.integers(2, 9))
    pairs = st.tuples(st.integers(0, num - 1), st.integers(0, num - 1)).filter(lambda pair: pair[0] != pair[1])
    chosen = draw(st.lists(pairs, min_size=1, max_size=30, unique=True))
    capacities = st.sampled_from([0, 1, 2, 5, 1000, flow.INFINITE])
    # The source has finite edges alone, as no cut would part it from the sink otherwise.
    return num, [(a, b, draw(capacities) % 2000 if a == num - 2 else draw(capacities)) for a, b in chosen]


def both(num: int, edges: Edges, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    rows, cols, caps = (np.array(column) for column in zip(*edges, strict=True))
    found = []
    for has_ortools in (True, False):
        with monkeypatch.context() as patch:
            if not has_ortools:
                patch.setattr(flow, "solver", lambda: None)
            given_edges = rows, cols, caps.astype(np.int32), num - 2, num - 1
            found.append((flow.flow_value(*given_edges), flow.source_side(*given_edges).tolist()))
    return found


@settings(max_examples=300, deadline=None)
@given(networks())
def test_one_cut_whoever_finds_it(network: tuple[int, Edges]) -> None:
    """Of all minimum cuts the nearest to the source is one."""
    with pytest.MonkeyPatch.context() as patch:
        ours, scipys = both(*network, patch)
    assert ours == scipys
    num, edges = network
    value, side = ours
    assert num - 2 in side
    assert num - 1 not in side or value >= flow.INFINITE
    assert sum(c for a, b, c in edges if a in side and b not in side) == value


def test_a_cut_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the middle edge, where both ends are wide."""
    edges = [(3, 0, 7), (0, 1, 2), (1, 2, 9), (2, 4, 9)]
    assert both(5, edges, monkeypatch) == [(2, [0, 3])] * 2
