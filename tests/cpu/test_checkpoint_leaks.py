"""A thousand steps of checkpointed regions with the garbage collector off: nothing adds up."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import keepless
from keepless.eager import profile


class Storages(TorchDispatchMode):
    """Weak references to the memory of every result of an op, in the recompute as well."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def live(self) -> int:
        """Bytes of what still lives; forgets the rest."""
        self.seen = {key: pair for key, pair in self.seen.items() if not pair[0].expired()}
        return sum(nbytes for _, nbytes in self.seen.values())


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("fresh", [False, True], ids=["module", "closure"])
def test_a_thousand_steps_end_at_the_bytes_of_the_third(fresh: bool) -> None:
    """A region with BatchNorm and dropout, called as a module or through a lambda that is made anew in each step."""
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.2))
    x = torch.ones(4, 8)
    storages = Storages()
    counts = []
    with storages:
        for step in range(1000):
            region = (lambda value: net(value)) if fresh else net
            keepless.checkpoint(region, x, use_reentrant=False).sum().backward()
            net.zero_grad()
            if step in (2, 999):
                counts.append((storages.live(), len(profile._profiles)))
    assert counts[0] == counts[1]


@pytest.mark.usefixtures("_no_collector")
def test_a_watched_call_that_an_early_stop_ends_holds_nothing() -> None:
    """The inner region is new in the outer's recompute, which ends inside it."""
    inputs = []

    def outer(value: Tensor) -> Tensor:
        new = nn.Sequential(nn.Tanh(), nn.Tanh())
        return keepless.checkpoint(new, value * 2, use_reentrant=False)

    def step() -> None:
        x = torch.ones(4, requires_grad=True)
        inputs.append(StorageWeakRef(x.untyped_storage()))
        middle = keepless.checkpoint(outer, x, use_reentrant=False)
        torch.autograd.grad(middle.sum(), x, create_graph=True)[0].sum().backward()

    for _ in range(3):
        step()
    assert [reference.expired() for reference in inputs] == [True] * 3


@pytest.mark.usefixtures("_no_collector")
def test_a_region_inside_a_watched_one_does_not_hold_what_that_was_given() -> None:
    """The outer region writes its input, of which it keeps a copy; the caller lets go of the input itself."""
    profile.forget_regions()

    def outer(value: Tensor) -> Tensor:
        return keepless.checkpoint(torch.tanh, value.mul_(2) * 1.0, use_reentrant=False)

    leaf = torch.linspace(0, 1, 64, requires_grad=True)
    x = leaf * 1.0
    given = StorageWeakRef(x.untyped_storage())
    found = keepless.checkpoint(outer, x, use_reentrant=False)
    del x
    assert given.expired()
    found.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 2 * (1 - torch.tanh(2 * leaf.detach()) ** 2))
