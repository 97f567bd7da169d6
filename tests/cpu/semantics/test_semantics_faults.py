"""Exceptions, leaks, and what a region holds: rows 30, 45 and 46."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from rows import (
    REFUSES,
    WRONG,
    Checkpoint,
    Row,
    Table,
    ambient,
    batches,
    bits,
    counted,
    differences,
    draws,
    judge,
    plain,
    seeds,
    state_of,
    torch_differs,
    train,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from keepless.errors import KeeplessError

TABLE = Table()


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))


class Fault(Exception):
    """The user's own error."""


class Notes:
    """Storages of activations, and a fault to raise.

    The fault is set on the class: a recompute sees attributes of objects as they were in the forward.
    """

    fault: type[Exception] | None = None
    num_raised = 0

    def __init__(self) -> None:
        self.storages: list[StorageWeakRef] = []

    def add(self, tensor: Tensor) -> None:
        self.storages.append(StorageWeakRef(tensor.untyped_storage()))

    def raise_fault(self) -> None:
        if self.fault is not None:
            Notes.num_raised += 1
            raise self.fault("on purpose")

    def num_live(self) -> int:
        return sum(not storage.expired() for storage in self.storages)


class Layers(nn.Module):
    """A region of BatchNorm, dropout and four layers that notes its activations, and fails between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.BatchNorm1d(8)
        self.notes = Notes()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.norm(x), 0.2)
        for index, layer in enumerate(self.layers):
            if index == 2:
                self.notes.raise_fault()
            x = torch.tanh(layer(x))
            self.notes.add(x)
        return x.sum(1)


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@TABLE.row(30, torch=REFUSES if torch.__version__ < "2.12" else WRONG)  # seen: 2.11 refuses, 2.14 and 2.15 go on
def exception_in_the_forward(checkpoint: Checkpoint) -> dict[str, object]:
    """A region fails in its second step; the caller goes on with the next batch."""
    model = Layers()
    raised = []

    def loss_of(x: Tensor) -> Tensor:
        if len(raised) == 1:
            model.notes.fault = Fault
        try:
            return checkpoint(model, x, use_reentrant=False).sum()
        except Fault as error:
            raised.append(str(error))
            model.notes.fault = None
            return checkpoint(model, x + 1, use_reentrant=False).sum()
        finally:
            raised.append("step")

    return {**train(model, loss_of, batches(6, 8, count=4)), "raised": raised}


@TABLE.row(30)
def exception_in_a_hook(checkpoint: Checkpoint) -> dict[str, object]:
    """A gradient hook on the region's input fails in the backward; the next step is exact."""
    model = nn.ModuleList([block(), block()])
    fails = [True]

    def hook(gradient: Tensor) -> None:
        if fails:
            fails.pop()
            raise Fault("hook")

    h = checkpoint(model[0], torch.ones(3, 8), use_reentrant=False)
    h.register_hook(hook)
    with suppress(Fault):
        checkpoint(model[1], h, use_reentrant=False).sum().backward()
    partial = state_of(model)

    def loss_of(x: Tensor) -> Tensor:
        return checkpoint(model[1], checkpoint(model[0], x, use_reentrant=False), use_reentrant=False).sum()

    return {"partial": partial, **train(model, loss_of, batches(3, 8))}


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)


def steps(checkpoint: Checkpoint, model: Layers, fault: type[Exception] | None) -> None:
    """A step that is lost, in plain for want of a backward, else by a fault in the recomputation; two good steps."""
    x = torch.ones(6, 8)
    loss = checkpoint(model, x, use_reentrant=False).sum()
    if fault is not None:
        Notes.fault, Notes.num_raised = fault, 0
        with pytest.raises((fault, KeeplessError)):
            loss.backward()
        Notes.fault = None
        assert Notes.num_raised == 1, "the region was not recomputed"
        assert all(p.grad is None for p in model.parameters())
    del loss
    gc.collect()
    model.zero_grad()
    for batch in batches(6, 8, count=2):
        checkpoint(model, batch, use_reentrant=False).sum().backward()


@pytest.mark.parametrize("fault", [Fault, torch.OutOfMemoryError], ids=["error", "memory"])
def test_exception_in_the_recomputation(candidate: Checkpoint, fault: type[Exception]) -> None:
    """Row 30: it propagates, no gradient is touched, no activation stays, no mode is left, the next steps are exact."""
    found = []
    for checkpoint, raised in ((plain, None), (candidate, fault)):
        seeds()
        model = Layers()
        before = ambient()
        steps(checkpoint, model, raised)
        assert ambient() == before
        found.append(bits({**state_of(model), "draws": draws()}))
        gc.collect()
        assert model.notes.num_live() == 0
    assert differences(found[0], found[1]) == []


@pytest.mark.parametrize("backward", [False, True], ids=["no backward", "after backward"])
def test_everything_is_freed_by_reference_counts(candidate: Checkpoint, backward: bool) -> None:
    """Row 45: with the collector off, no activation of a dropped graph lives; parameters of the region neither."""
    with without_collector():
        model = Layers()
        for x in batches(6, 8, count=4):
            loss = candidate(model, x, use_reentrant=False).sum()
            if backward:
                loss.backward()
            del loss
            assert model.notes.num_live() == 0
        held = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
        del model
        gc.collect()
        assert all(note.expired() for note in held), "the region's module is kept alive"


def test_steps_do_not_add_up(candidate: Checkpoint) -> None:
    """Row 45: as many tensors and objects of the graph live after sixty steps as after five, the collector off."""

    def num_tensors() -> int:
        return sum(type(item) is Tensor or type(item) is nn.Parameter for item in gc.get_objects())

    with without_collector():
        model = nn.ModuleList([block(), nn.Sequential(nn.BatchNorm1d(8), block())])
        counts = []
        for step in range(60):
            x = torch.ones(4, 8)
            for layer in model:
                x = candidate(layer, x, use_reentrant=False)
            x.sum().backward()
            del x
            if step in (4, 59):
                counts.append(num_tensors())
    assert counts[0] == counts[1]


def live_after_forward(checkpoint: Checkpoint) -> list[int]:
    """Live noted storages of each of three regions after the forward of a third step."""
    regions = [Layers() for _ in range(3)]
    found: list[int] = []
    for step in range(3):
        x = torch.ones(6, 8, requires_grad=True)
        losses = []
        for region in regions:
            region.notes.storages.clear()
            losses.append(checkpoint(region, x, use_reentrant=False).sum())
        if step == 2:
            found = [region.notes.num_live() for region in regions]
        torch.stack(losses).sum().backward()
    return found


def test_activations_are_freed_in_the_forward(candidate: Checkpoint) -> None:
    """Row 46: plain keeps the four activations of each region, a checkpoint none of them."""
    assert live_after_forward(plain) == [4, 4, 4]
    assert live_after_forward(candidate) == [0, 0, 0]


def test_saved_bytes_shrink(candidate: Checkpoint) -> None:
    """What hooks around a region see saved: at most its input and parameters, not its activations."""

    def saved(checkpoint: Checkpoint, model: nn.Module) -> int:
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.ones(512, 8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = checkpoint(model, x, use_reentrant=False).sum()
        loss.backward()
        return sum(found.values())

    model = block()
    activations = saved(plain, model)
    assert activations > 4 * 512 * 8 * 4
    for _ in range(3):
        assert saved(candidate, model) <= 512 * 8 * 4 + sum(p.nbytes for p in model.parameters())


def region_runs(checkpoint: Checkpoint, use: Callable[[Tensor], object]) -> int:
    def region(x: Tensor) -> Tensor:
        return torch.sin(x.exp())

    x = torch.ones(3, requires_grad=True)
    with counted() as calls:
        use(checkpoint(region, x, use_reentrant=False).sum())
    return calls[region.__code__]


def test_regions_run_twice(candidate: Checkpoint) -> None:
    """Once in the forward, once more in the backward, and only then; torch's own function agrees."""

    def retained(loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    for checkpoint in (candidate, torch.utils.checkpoint.checkpoint):
        assert region_runs(checkpoint, lambda loss: loss.backward()) == 2
        assert region_runs(checkpoint, lambda loss: None) == 1
        assert region_runs(checkpoint, retained) == 3


@pytest.mark.parametrize(
    ("size", "tail", "expected"), [(4, False, 2), (4096, False, 1), (4, True, 1)], ids=["tiny", "large", "tail"]
)
def test_a_recompute_ends_where_that_is_cheapest(candidate: Checkpoint, size: int, tail: bool, expected: int) -> None:
    """At its last saved tensor; but an exception there costs more than what is left of a tiny region without a tail."""

    class Ends:
        num = 0

    def region(x: Tensor) -> Tensor:
        x = torch.sin(x)
        if tail:
            x = x + 1
        Ends.num += 1
        return x

    x = torch.ones(size, requires_grad=True)
    for _ in range(4):
        Ends.num = 0
        candidate(region, x, use_reentrant=False).sum().backward()
    assert Ends.num == expected


def test_regions_are_recomputed_one_by_one(candidate: Checkpoint) -> None:
    """Row 46: while one region's backward ends, the recomputed activations of those after it are gone."""
    regions = [Layers() for _ in range(3)]
    widen = nn.Linear(1, 8)
    for step in range(2):
        seen: list[tuple[int, int]] = []
        x = torch.ones(6, 8, requires_grad=True)
        for index, region in enumerate(regions):
            region.notes.storages.clear()
            x = widen(candidate(region, x, use_reentrant=False)[:, None])

            def note(gradient: Tensor, index: int = index, seen: list[tuple[int, int]] = seen) -> None:
                seen.extend((index, later.notes.num_live()) for later in regions[index + 1 :])

            x.register_hook(note)
        x.sum().backward()
        assert seen == [(1, 0), (0, 0), (0, 0)], f"step {step}: live activations of later regions"


def test_a_saved_tensor_that_is_read_outside_a_backward_leaves_the_mode(candidate: Checkpoint) -> None:
    """The recompute runs with gradients on; who asks from under `no_grad` keeps that."""
    y = candidate(lambda t: torch.sin(t).exp(), torch.ones(3, requires_grad=True), use_reentrant=False)
    with torch.no_grad():
        assert y.grad_fn._saved_result.shape == (3,)
        assert not torch.is_grad_enabled()
