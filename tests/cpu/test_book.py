"""The plan book: calls of other shapes, modes and dtypes run right, within the budget, and what is kept is bounded."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import models as zoo
import pytest
import torch
from torch import nn

import keepless
from keepless.capture import Inputs
from keepless.control.plan_book import worker
from keepless.control.plan_book.book import Book
from keepless.control.reserve import budget_with_reserve
from keepless.cost import format_graph
from keepless.errors import InfeasibleBudget
from keepless.execute import PlannedForward
from keepless.execute import shelf as shelves
from keepless.ir import Run, Status
from keepless.measure.steps import increments
from keepless.passes import evaluate

CPU = torch.device("cpu")


class Net(nn.Module):
    """Blocks with dropout whose activations are larger than their weights."""

    def __init__(self, blocks: int = 3, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.GELU(),
                nn.Dropout(0.1),
                nn.Linear(2 * width, width),
            )
            for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return (x**2).mean()


def batch_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows))


@functools.cache
def ends(rows: int) -> tuple[int, int]:
    """The smallest budget of a size, and the peak with everything kept."""
    plan = keepless.plan(Net(), batch_of(rows), "1GB", cache=False)
    return plan.smallest_budget, plan.baseline_peak


def pair(rows: int = 256, share: float = 0.3, **options: Any) -> tuple[nn.Module, nn.Module, int]:
    """A plain copy, the model under a plan at a share of the way from the floor to everything kept, and the budget."""
    model = Net()
    plain = copy.deepcopy(model)
    low, kept = ends(rows)
    budget = int(low + share * (kept - low))
    plan = keepless.plan(model, batch_of(rows), budget, cache=False, seed=0)
    assert plan.num_replays
    return plain, keepless.apply(model, plan, **options), budget


def forward_of(model: nn.Module) -> PlannedForward:
    found = model.__dict__["forward"]
    assert isinstance(found, PlannedForward)
    return found


def book_of(model: nn.Module) -> Book:
    found = forward_of(model).on_miss
    assert isinstance(found, Book)
    return found


def check_step(plain: nn.Module, subject: nn.Module, batch: Any) -> None:
    inputs = Inputs.of(batch)
    assert zoo.run_step(subject, inputs).differences(zoo.run_step(plain, inputs)) == []


def static_nbytes(model: nn.Module, batch: torch.Tensor) -> int:
    """What is resident before the step and counts for the budget."""
    return sum(p.nbytes for p in model.parameters()) + batch.nbytes


def peak_of(model: nn.Module, batch: torch.Tensor) -> int:
    """Highest bytes of a step, those before it included."""
    model.zero_grad()

    def step() -> None:
        model(batch).backward()

    return static_nbytes(model, batch) + increments(step, CPU)


@pytest.fixture(autouse=True)
def _nothing_in_the_background() -> Iterator[None]:
    yield
    assert worker.WORKER.wait(300)
    assert not [thread for thread in threading.enumerate() if thread.name == "keepless-planner"]


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
def test_every_size_is_right_and_within_the_budget(background: bool) -> None:
    """Shorter, longer and the planned size, in turns: bits of plain, and no peak above the one budget."""
    plain, model, budget = pair(background=background)
    sizes = [256, 192, 320, 64, 256, 192, 320, 7]
    peaks = []
    for rows in sizes:
        check_step(plain, model, batch_of(rows))
        peaks.append(peak_of(model, batch_of(rows)))
        check_step(plain, model, batch_of(rows))
    assert max(peaks) <= budget
    counters = forward_of(model).counters
    assert (counters.captures, counters.transfers, counters.evicted) == (4, 4, 0)
    assert counters.specialised == 1  # the fourth; three in full come before a trace with symbolic sizes
    assert counters.steps == 3 * len(sizes)
    assert counters.hits == counters.steps - counters.captures
    programs = {entry.flat.facts[0][1][0]: entry.program.num_replays for entry in forward_of(model).entries}
    assert programs[7] == programs[64] == 0  # all fits
    assert programs[320] > programs[256] > 0


@pytest.mark.slow
def test_a_step_of_any_size_fits_or_is_refused() -> None:
    """Growing batches: the last one that fits stays within the budget, the next is refused with the number it needs."""
    plain, model, budget = pair(share=0.1)
    refused = None
    for rows in range(256, 4096, 128):
        try:
            peak = peak_of(model, batch_of(rows))
        except InfeasibleBudget as error:
            refused = error
            break
        assert peak <= budget
        check_step(plain, model, batch_of(rows))
    assert refused is not None
    assert refused.smallest_budget > budget
    assert "not the step that the model was planned for" in str(refused)
    check_step(plain, model, batch_of(256))


@pytest.mark.slow
def test_a_better_program_is_taken_over() -> None:
    """A size that comes again is planned in the background; the swap is at a call's beginning, for the same bits."""
    plain, model, budget = pair()
    forward = forward_of(model)
    rows = 320
    check_step(plain, model, batch_of(rows))
    entry = forward.entries[0]
    slow = slowest_within(entry, model)
    assert forward.entries.swap(entry, slow)
    entry.again.clear()
    check_step(plain, model, batch_of(rows))  # the second call asks for a plan
    assert book_of(model).wait(300)
    assert len(forward.news) == 1
    assert forward.entries[0] is slow
    check_step(plain, model, batch_of(rows))
    assert forward.counters.solved == 1
    better = forward.entries[0]
    assert better is not slow
    assert better.guard is slow.guard
    assert better.program.num_replays < slow.program.num_replays
    assert peak_of(model, batch_of(rows)) <= budget
    assert forward.counters.captures == 1


def slowest_within(entry: Any, model: nn.Module) -> Any:
    """The entry with a program that recomputes more than it need, and asks for a better one as the book's would."""
    from dataclasses import replace

    from keepless.execute import reprogrammed
    from keepless.solve import smallest

    (later,) = entry.again
    low = smallest(later._graph, later._cost)
    assert low.peak <= later._budget.device
    slow = replace(reprogrammed(entry, low.program), again=[later])
    later._entry, later._seconds = weakref.ref(slow), low.seconds
    return slow


@pytest.mark.slow
def test_a_better_program_is_one_only_where_it_is_faster() -> None:
    """What the search finds is taken over only where it is predicted to be faster than what runs."""
    plain, model, budget = pair()
    forward = forward_of(model)
    check_step(plain, model, batch_of(320))
    before = forward.entries[0]
    (later,) = before.again
    check_step(plain, model, batch_of(320))
    assert book_of(model).wait(300)
    check_step(plain, model, batch_of(320))
    graph, cost = later._graph, later._cost
    old, new = (
        evaluate(graph, cost, [instr.op for instr in entry.program if isinstance(instr, Run)])
        for entry in (before, forward.entries[0])
    )
    assert new.seconds < old.seconds if forward.counters.solved else new == old
    assert max(old.peak, new.peak) <= budget_with_reserve(budget).device
    told: list[Any] = []
    worker.WORKER.add(worker.Job(graph, cost, later._budget, 0, new.seconds * 0.9, told.append))
    worker.WORKER.add(worker.Job(graph, cost, later._budget, 0, 1e9, told.append, lambda: False))
    assert worker.WORKER.wait(300)
    assert not told


@pytest.mark.slow
def test_without_a_background_nothing_is_searched_for() -> None:
    plain, model, _ = pair(background=False)
    for _ in range(3):
        check_step(plain, model, batch_of(320))
    assert not forward_of(model).entries[0].again
    assert forward_of(model).counters.solved == 0


@pytest.mark.slow
def test_the_shelf_forgets_what_was_used_longest_ago() -> None:
    """By number and by bytes; a step that runs goes on with its own entry, and a forgotten size comes back right."""
    plain, model, _ = pair(background=False)
    forward = forward_of(model)
    forward.entries.most = 3
    for rows in (32, 64):
        check_step(plain, model, batch_of(rows))
    check_step(plain, model, batch_of(256))  # the planned one is used again: 32 is the oldest
    model.zero_grad()
    loss = model(batch_of(32))
    kept = weakref.ref(forward.entries[0])
    with pytest.warns(UserWarning, match=r"keeps 3 captured steps.*argument 0 came as shape \(96, 32\)"):
        model(batch_of(96))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        for rows in (128, 160):
            check_step(plain, model, batch_of(rows))
    assert kept() is not None  # the step that runs holds it
    assert [entry.flat.facts[0][1][0] for entry in forward.entries] == [160, 128, 96]
    assert forward.counters.evicted == 3
    model.zero_grad()
    torch.manual_seed(5)
    loss.backward()
    del loss
    gc.collect()
    assert kept() is None
    assert all(p.grad is not None for p in model.parameters())
    check_step(plain, model, batch_of(32))
    nbytes = [shelves.entry_nbytes(entry) for entry in forward.entries]
    assert forward.entries.nbytes == sum(nbytes)
    forward.entries.most_nbytes = sum(nbytes[:2])
    check_step(plain, model, batch_of(48))
    assert len(forward.entries) == 2
    assert forward.entries.nbytes <= forward.entries.most_nbytes


@pytest.mark.slow
def test_the_bytes_of_an_entry_are_not_far_from_what_it_holds() -> None:
    import tracemalloc

    model = Net()
    plan = keepless.plan(model, batch_of(64), "1GB", cache=False)
    keepless.apply(model, plan, background=False)
    model(batch_of(32)).backward()
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        model(batch_of(48)).backward()
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.3 * held < shelves.entry_nbytes(forward_of(model).entries[0]) < 3 * held


def test_captures_that_keep_coming_are_told_once() -> None:
    """Planning on the spot again and again is slow, and not silent."""
    x = torch.randn(4, 5)
    model = keepless.fit(zoo.Outputs(), x, "1GB", cache=False)
    for scale in range(2, 9):
        model(x, scale=float(scale))
    with pytest.warns(UserWarning, match=r"had 9 different steps.*argument 1 came as 9\.0, 8\.0.*Pass numbers"):
        model(x, scale=9.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, scale=10.0)
    assert len(model.__dict__["forward"].entries) == 10


@pytest.mark.slow
def test_many_sizes_ask_few_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call asks only the guards of captured steps that look like it."""
    _, model, _ = pair(background=False)
    for rows in (16, 32, 48, 64):
        model(batch_of(rows))
    asked: list[Any] = []
    guard = type(forward_of(model).entries[0].guard)
    check = guard.check
    monkeypatch.setattr(guard, "check", lambda self, args, kwargs: (asked.append(self), check(self, args, kwargs))[1])
    for rows in (16, 256, 48):
        model(batch_of(rows))
    assert len(asked) == 3


@pytest.mark.slow
def test_switches_between_modes() -> None:
    """Modes in turns: the plan runs in training, the model's own forward in evaluation, no_grad and inference_mode."""
    plain, model, _ = pair(background=False)
    counters = forward_of(model).counters
    x = batch_of(100)
    for _ in range(2):
        check_step(plain, model, x)
        for subject in (plain, model):
            subject.eval()
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
        assert torch.equal(model(x), plain(x))
        for subject in (plain, model):
            subject.train()
        with torch.inference_mode():
            torch.manual_seed(3)
            mine = model(x)
            torch.manual_seed(3)
            assert torch.equal(mine, plain(x))
        assert not mine.requires_grad
    assert (counters.steps, counters.captures, counters.unplanned_calls) == (2, 1, 6)
    assert len(forward_of(model).entries) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_change_after_planning(dtype: torch.dtype) -> None:
    """`model.to(dtype)` is another step: planned on the spot for the same budget; and back again is the first one."""
    plain, model, budget = pair(share=0.8, background=False)
    for subject in (plain, model):
        subject.to(dtype)
    x = batch_of(128).to(dtype)
    check_step(plain, model, x)
    assert peak_of(model, x) <= budget
    for subject in (plain, model):
        subject.float()
    check_step(plain, model, batch_of(256))
    assert (forward_of(model).counters.captures, len(forward_of(model).entries)) == (1, 2)


@pytest.mark.slow
def test_a_short_last_batch_of_every_epoch() -> None:
    """Two epochs with optimizer steps: one capture for the short batch, and the weights of plain training."""
    plain, model, _ = pair()
    data = torch.randn(3 * 256 + 72, 32, generator=torch.Generator().manual_seed(9))
    for subject in (plain, model):
        optimizer = torch.optim.AdamW(subject.parameters(), lr=1e-2)
        torch.manual_seed(1)
        for _ in range(2):
            for batch in data.split(256):
                optimizer.zero_grad()
                subject(batch).backward()
                optimizer.step()
    assert all(zoo.same_bits(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    counters = forward_of(model).counters
    assert (counters.steps, counters.captures, counters.hits) == (8, 1, 7)


def test_a_solver_by_name_plans_every_size_itself() -> None:
    model = Net()
    plan = keepless.plan(model, batch_of(256), "1GB", cache=False, solver="recompute_all")
    keepless.apply(model, plan)
    model(batch_of(64)).backward()
    assert (forward_of(model).counters.captures, forward_of(model).counters.transfers) == (1, 0)
    assert forward_of(model).entries[0].program.num_replays


@pytest.mark.slow
def test_scratch_of_a_carried_cost_model_is_measured() -> None:
    """Bytes are those of a plan of its own; seconds are positive; the reserve is left."""
    _, model, budget = pair(background=False)
    own = keepless.plan(Net(), batch_of(320), budget, cache=False)
    model(batch_of(320))
    entry = forward_of(model).entries[0]
    order = [instr.op for instr in entry.program if isinstance(instr, Run)]
    mine = evaluate(own.graph, own.cost, order)
    assert mine.peak <= budget_with_reserve(budget).device
    assert mine.seconds <= own.predicted_seconds * 1.25


@pytest.mark.slow
def test_the_worker_ends_with_the_model() -> None:
    """A model that goes away ends its search; nothing keeps the model alive."""
    _, model, _ = pair()
    for _ in range(2):
        model(batch_of(320)).backward()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert worker.WORKER.wait(30)


@pytest.mark.slow
def test_jobs_that_fail_leave_the_program_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no process can be started the search runs in the thread; a wrong answer is not taken."""
    plain, model, _ = pair()
    monkeypatch.setattr(worker.sys, "executable", "/nowhere/python")
    check_step(plain, model, batch_of(320))
    forward = forward_of(model)
    (later,) = forward.entries[0].again
    told: list[Any] = []
    job = worker.Job(later._graph, later._cost, later._budget, 0, 1e9, told.append)
    worker.WORKER.add(job)
    assert worker.WORKER.wait(300)
    assert told[0].peak <= later._budget.device
    assert told[0].certificate.status is Status.FEASIBLE
    monkeypatch.setattr(worker, "_in_process", lambda job: tuple(range(len(job.graph.ops))))  # does not fit
    worker.WORKER.add(worker.Job(later._graph, later._cost, later._budget, 0, 1e9, told.append))
    assert worker.WORKER.wait(300)
    assert len(told) == 1
    monkeypatch.setattr(worker, "_in_process", lambda job: (len(job.graph.ops) - 1,))  # is no order
    worker.WORKER.add(worker.Job(later._graph, later._cost, later._budget, 0, 1e9, told.append))
    assert worker.WORKER.wait(300)
    assert len(told) == 1
    check_step(plain, model, batch_of(320))


@pytest.mark.slow
def test_large_graphs_go_through_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """More text than a pipe holds; the thread itself searches for nothing."""
    own = keepless.plan(Net(blocks=24), batch_of(128), "1GB", cache=False)
    assert len(format_graph(own.graph, own.cost)) > 2**16

    def never(*_: Any) -> None:
        raise AssertionError("searched in the thread")

    monkeypatch.setattr(worker, "plan", never)
    told: list[Any] = []
    budget = budget_with_reserve((own.smallest_budget + own.baseline_peak) // 2)
    worker.WORKER.add(worker.Job(own.graph, own.cost, budget, 0, 1e9, told.append))
    assert worker.WORKER.wait(120)
    assert told[0].peak <= budget.device


@pytest.mark.slow
def test_the_background_leaves_generators_alone() -> None:
    _, model, _ = pair()
    for _ in range(2):
        model(batch_of(320)).backward()
    before = torch.get_rng_state()
    assert book_of(model).wait(300)
    assert torch.equal(before, torch.get_rng_state())


CHANGES: dict[str, Callable[[Any], Any]] = {"frozen": lambda m: m.blocks[0].requires_grad_(False)}


@pytest.mark.slow
def test_a_frozen_part_takes_its_plan_from_the_whole() -> None:
    plain, model, budget = pair(background=False)
    for subject in (plain, model):
        CHANGES["frozen"](subject)
    check_step(plain, model, batch_of(256))
    assert forward_of(model).counters.transfers == 1
    assert peak_of(model, batch_of(256)) <= budget
