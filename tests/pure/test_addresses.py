"""Address plans: no two blocks that stand at once overlap; how near the bound they come."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Case, cases, random_case

from keepless.errors import ArenaError
from keepless.ir import Graph, Kind, Op, Phase, Value
from keepless.ir.program import Drop, Program, Run
from keepless.machine import simulate
from keepless.passes.addresses import AddressPlan, Block, blocks_of, check_addresses, plan_addresses


@st.composite
def some_blocks(draw: st.DrawFn, most: int = 30) -> list[Block]:
    blocks = []
    for _ in range(draw(st.integers(1, most))):
        start = draw(st.integers(0, 40))
        blocks.append(Block(start, start + draw(st.integers(1, 20)), draw(st.integers(1, 5000))))
    return blocks


@settings(max_examples=150)
@given(some_blocks(), st.sampled_from([1, 64, 512]))
def test_blocks_that_stand_at_once_do_not_overlap(blocks: list[Block], alignment: int) -> None:
    plan = plan_addresses(blocks, alignment=alignment, rounds=6)
    check_addresses(blocks, plan)
    assert plan.nbytes >= plan.bound
    assert plan == plan_addresses(blocks, alignment=alignment, rounds=6)
    for a, b in ((i, j) for i in range(len(blocks)) for j in range(i)):  # once more, in the plainest way
        if blocks[a].start < blocks[b].end and blocks[b].start < blocks[a].end:
            low, high = sorted((a, b), key=lambda i: plan.offsets[i])
            assert plan.offsets[low] + blocks[low].nbytes <= plan.offsets[high]


@settings(max_examples=100)
@given(some_blocks(12), st.randoms(use_true_random=False))
def test_the_checker_finds_a_block_that_was_moved_onto_another(blocks: list[Block], rng: random.Random) -> None:
    plan = plan_addresses(blocks, alignment=1, rounds=0)
    number = rng.randrange(len(blocks))
    offset = rng.randrange(plan.nbytes)
    moved = replace(plan, offsets=(*plan.offsets[:number], offset, *plan.offsets[number + 1 :]))
    here, size = blocks[number], blocks[number].nbytes
    overlaps = offset + size > plan.nbytes or any(
        other.start < here.end
        and here.start < other.end
        and plan.offsets[i] < offset + size
        and offset < plan.offsets[i] + other.nbytes
        for i, other in enumerate(blocks)
        if i != number
    )
    if overlaps:
        with pytest.raises(ArenaError, match=r"overlap|outside"):
            check_addresses(blocks, moved)
    else:
        check_addresses(blocks, moved)


def test_what_the_checker_refuses() -> None:
    block = Block(0, 2, 100)
    with pytest.raises(ArenaError, match="not aligned"):
        check_addresses([block], AddressPlan((10,), 200, 100, 64))
    with pytest.raises(ArenaError, match="0 offsets for 1 blocks"):
        check_addresses([block], AddressPlan((), 200, 100, 64))
    with pytest.raises(ArenaError, match="stands at no time"):
        check_addresses([Block(2, 2, 100)], AddressPlan((0,), 200, 100, 64))


def test_blocks_of_a_program_in_place_and_not_kept() -> None:
    """a -> b; c over b in place; an output that is not kept, and scratch."""
    kinds = [Kind.INPUT, Kind.ACTIVATION, Kind.ACTIVATION, Kind.ACTIVATION, Kind.OUTPUT]
    values = tuple(Value(i, f"v{i}", 8 * (i + 1) if i != 3 else 16, kind) for i, kind in enumerate(kinds))
    ops = (
        Op(0, "a", (0,), (1, 2), Phase.FORWARD),
        Op(1, "b", (1,), (3,), Phase.FORWARD, reuses=((3, 1),)),
        Op(2, "c", (3,), (4,), Phase.FORWARD),
    )
    graph = Graph(ops, values, frozenset({0}), frozenset({0, 4}))
    program = Program((Run(0, 0, (1,)), Run(1, 0, (3,), reuse=True), Run(2, 0, (4,)), Drop(3)))
    assert blocks_of(graph, program) == [
        Block(0, 1, 24, ((0, 2),), kept=False),
        Block(0, 3, 16, ((0, 1), (1, 3))),
        Block(2, 4, 40, ((2, 4),)),
    ]


@settings(max_examples=60)
@given(cases())
def test_the_bound_is_within_what_the_machine_counts(case: Case) -> None:
    """What stands before the step is no block, and neither are generator states."""
    blocks = blocks_of(case.graph, case.program, case.cost)
    plan = plan_addresses(blocks, alignment=1, rounds=0)
    check_addresses(blocks, plan)
    peak = simulate(case.graph, case.program, case.cost).peak
    before = sum(case.graph.values[value].nbytes for value in case.graph.inputs)
    states = sum(value.nbytes for value in case.graph.values if value.kind is Kind.RNG)
    assert peak - before - 2 * states <= plan.bound <= peak


@pytest.mark.slow
def test_address_plans_of_larger_programs_are_near_the_bound() -> None:
    """Of 20 random programs of 200 ops the worst was 1.0072 of the bound, the mean 1.0010."""
    found = []
    for seed in range(20):
        case = random_case(seed, 200)
        blocks = blocks_of(case.graph, case.program, case.cost)
        plan = plan_addresses(blocks, alignment=1)
        check_addresses(blocks, plan)
        found.append(plan.quality)
    assert max(found) < 1.02
    assert sum(found) / len(found) < 1.005


def test_small_cases_against_a_solver_of_constraints() -> None:
    """CP-SAT proves the optimum of 25 cases of 12 blocks; ours was it in 23, and 2.1 % above at most."""
    model_of = pytest.importorskip("ortools.sat.python.cp_model")
    rng = random.Random(0)
    ratios = []
    for _ in range(25):
        blocks = []
        for _ in range(12):
            start = rng.randrange(12)
            blocks.append(Block(start, start + rng.randint(1, 8), rng.randint(1, 20)))
        model = model_of.CpModel()
        top = sum(block.nbytes for block in blocks)
        height = model.new_int_var(0, top, "height")
        rows, columns = [], []
        for i, block in enumerate(blocks):
            offset = model.new_int_var(0, top, f"o{i}")
            model.add(offset + block.nbytes <= height)
            rows.append(model.new_fixed_size_interval_var(offset, block.nbytes, f"y{i}"))
            columns.append(model.new_fixed_size_interval_var(block.start, block.end - block.start, f"x{i}"))
        model.add_no_overlap_2d(columns, rows)
        model.minimize(height)
        solver = model_of.CpSolver()
        solver.parameters.num_workers = 1
        assert solver.solve(model) == model_of.OPTIMAL
        plan = plan_addresses(blocks, alignment=1)
        assert plan.bound <= solver.objective_value <= plan.nbytes
        ratios.append(plan.nbytes / solver.objective_value)
    assert max(ratios) <= 1.05
    assert sum(ratio == 1 for ratio in ratios) >= 20
