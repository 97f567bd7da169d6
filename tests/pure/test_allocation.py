"""Programs through the model of CUDA's allocator: events, fragmentation, workspaces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_case

from keepless.cost import CostModel
from keepless.errors import AllocatorError, PlanError
from keepless.ir import Graph, Kind, Op, Phase, Value
from keepless.ir.program import Drop, Program, Run
from keepless.machine import Allocation, model_allocation, simulate
from keepless.machine.allocation import (
    CUBLAS_DEFAULT,
    CUBLAS_LARGE,
    EXPANDABLE,
    allocation_events,
    cublas_workspace,
    expandable_segments,
    split,
)

MIB = 1 << 20


def graph_of(sizes: list[int], kinds: list[Kind], ops: list[Op], inputs: set[int], pinned: set[int]) -> Graph:
    values = [Value(i, f"v{i}", size, kind) for i, (size, kind) in enumerate(zip(sizes, kinds, strict=True))]
    return Graph(tuple(ops), tuple(values), frozenset(inputs), frozenset(pinned))


def chain() -> tuple[Graph, CostModel]:
    """Two ops on 5 MiB values; the second may write over its input, and has 3 MiB of scratch."""
    ops = [
        Op(0, "a", (0,), (1,), Phase.FORWARD),
        Op(1, "b", (1,), (2,), Phase.FORWARD, reuses=((2, 1),)),
    ]
    graph = graph_of([5 * MIB] * 3, [Kind.PARAM, Kind.ACTIVATION, Kind.OUTPUT], ops, {0}, {0, 2})
    return graph, CostModel((0.0, 0.0), (0, 3 * MIB))


def test_events_of_a_step_in_order() -> None:
    graph, cost = chain()
    program = Program((Run(0, 0, (1,)), Run(1, 0, (2,)), Drop(1)))
    assert allocation_events(graph, program, cost, steps=1) == [
        (0, 5 * MIB),  # the parameter
        (1, 5 * MIB),
        (2, 5 * MIB),
        (3, 3 * MIB),
        (3, -3 * MIB),
        (1, -5 * MIB),
    ]
    second = allocation_events(graph, program, cost, workspaces=(MIB,), steps=2)
    assert second[:2] == [(0, 5 * MIB), (1, MIB)]
    assert second[7] == (3, -5 * MIB)  # the first step's output makes room


def test_an_output_that_takes_over_storage_allocates_nothing() -> None:
    graph, cost = chain()
    program = Program((Run(0, 0, (1,)), Run(1, 0, (2,), reuse=True)))
    events = allocation_events(graph, program, cost, steps=2)
    assert [nbytes for _, nbytes in events] == [
        5 * MIB,
        5 * MIB,
        3 * MIB,
        -3 * MIB,
        -5 * MIB,
        5 * MIB,
        3 * MIB,
        -3 * MIB,
    ]


def test_outputs_that_are_not_kept_go_at_once() -> None:
    ops = [Op(0, "a", (0,), (1, 2), Phase.FORWARD)]
    graph = graph_of([0, MIB, 2 * MIB], [Kind.PARAM, Kind.ACTIVATION, Kind.ACTIVATION], ops, {0}, {0, 1})
    events = allocation_events(graph, Program((Run(0, 0, (1,)),)), CostModel((0.0,), (0,)), steps=1)
    assert events == [(0, MIB), (1, 2 * MIB), (1, -2 * MIB)]


def test_state_of_the_optimizer_comes_in_its_first_step_tensor_by_tensor() -> None:
    """Two parameters of 3 and 5 MiB, state of twice as much, temporaries of 8 MiB."""
    mib = [3, 5, 16]
    kinds = [Kind.PARAM, Kind.PARAM, Kind.BUFFER]
    values = [Value(i, f"p{i}" if i < 2 else "optimizer.state", n * MIB, kinds[i]) for i, n in enumerate(mib)]
    ops = (Op(0, "step", (0, 1, 2), (), Phase.OPTIMIZER),)
    graph = Graph(ops, tuple(values), frozenset({0, 1, 2}), frozenset({0, 1, 2}))
    events = allocation_events(graph, Program((Run(0),)), CostModel((0.0,), (8 * MIB,)), steps=2)
    sizes = [nbytes // MIB for _, nbytes in events]
    assert sizes == [3, 5, *[3, 5, 3, 5], *[3, 5, -3, -5], *[3, 5, -3, -5]]


def test_fragmentation_of_a_program_is_what_its_allocator_holds_beyond_its_tensors() -> None:
    graph, cost = chain()
    program = Program((Run(0, 0, (1,)), Run(1, 0, (2,)), Drop(1)))
    found = model_allocation(graph, program, cost, workspaces=(CUBLAS_DEFAULT,))
    # Parameter, workspace and the first value fill a segment of 20 MiB; the second value and the scratch need another.
    assert found == Allocation(18 * MIB + CUBLAS_DEFAULT, 18 * MIB + CUBLAS_DEFAULT, 40 * MIB, CUBLAS_DEFAULT)
    assert found.fragmentation == 22 * MIB - CUBLAS_DEFAULT
    assert str(found) == (
        "CUDA allocator (segments): reserved 40.00 MiB, allocated 26.12 MiB, requested 26.12 MiB; fragmentation "
        "13.88 MiB, workspaces 8.12 MiB"
    )
    assert model_allocation(graph, program, cost, expandable=True).mode == EXPANDABLE
    with pytest.raises(AllocatorError, match="fails"):
        model_allocation(graph, program, cost, limit=19 * MIB)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 30), st.booleans())
def test_events_hold_what_the_machine_counts(seed: int, num_ops: int, expandable: bool) -> None:
    """The bytes that stand at once are those of the simulator, byte for byte, generator states apart."""
    case = random_case(seed, num_ops)
    events = allocation_events(case.graph, case.program, case.cost, steps=3)
    level = highest = 0
    held: dict[int, int] = {}
    for block, nbytes in events:
        if nbytes > 0:
            assert block not in held
            held[block] = nbytes
        else:
            assert held.pop(block) == -nbytes
        level += nbytes
        highest = max(highest, level)
    peak = simulate(case.graph, case.program, case.cost).peak
    states = sum(value.nbytes for value in case.graph.values if value.kind is Kind.RNG)
    assert peak - 2 * states <= highest <= peak  # a replay charges the state that it does not keep once more
    found = model_allocation(case.graph, case.program, case.cost, steps=3, expandable=expandable)
    assert found.requested == highest
    assert found.requested <= found.allocated <= found.reserved


@given(st.integers(0, 10**9), st.lists(st.integers(1, 10**6), max_size=6))
def test_split_loses_nothing(nbytes: int, tensors: list[int]) -> None:
    if nbytes < 2000 * sum(tensors):
        pieces = split(nbytes, tensors)
        assert sum(pieces) == nbytes
        assert all(piece > 0 for piece in pieces)


def test_split_by_hand() -> None:
    assert split(25, [4, 6]) == [4, 6, 4, 6, 2, 3]
    assert split(7, []) == [7]
    assert split(0, [1]) == []


@pytest.mark.parametrize(
    ("config", "major", "nbytes"),
    [
        (None, 8, CUBLAS_DEFAULT),
        (None, 9, CUBLAS_LARGE),
        (None, 12, CUBLAS_LARGE),
        (":4096:8", 8, CUBLAS_LARGE),
        (":16:8", 9, 128 * 1024),
        (":4096:2:16:8", 9, CUBLAS_DEFAULT),
        ("nonsense", 8, CUBLAS_DEFAULT),
        (":0:0", 8, 0),
    ],
)
def test_cublas_workspaces(config: str | None, major: int, nbytes: int) -> None:
    assert cublas_workspace(config, major) == nbytes


def test_expandable_segments_are_read_from_the_configuration() -> None:
    assert expandable_segments("max_split_size_mb:64,expandable_segments:True")
    assert not expandable_segments("expandable_segments:False")
    assert not expandable_segments(None)


def test_an_allocation_goes_into_json_and_back() -> None:
    found = Allocation(1, 2, 3, 0, None, EXPANDABLE)
    assert Allocation.from_dict(found.as_dict()) == found
    for broken in ({}, {**found.as_dict(), "mode": "?"}, {**found.as_dict(), "reserved": True}):
        with pytest.raises(PlanError, match="allocation"):
            Allocation.from_dict(broken)
    with pytest.raises(PlanError, match="context"):
        Allocation.from_dict({**found.as_dict(), "context": "much"})
