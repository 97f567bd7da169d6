"""Regions in several threads: row 44."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from rows import WRONG, Checkpoint, Row, Table, batches, bits, judge, plain, state_of, torch_differs
from torch import Tensor, nn

from keepless.eager import recompute

TABLE = Table()

NUM_THREADS = 4


def together(run: Callable[[int], Any]) -> list[Any]:
    """`run(index)` in four threads that start at once; their results in order."""
    barrier = threading.Barrier(NUM_THREADS, timeout=60)

    def start(index: int) -> Any:
        barrier.wait()
        return run(index)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(start, range(NUM_THREADS)))


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Sigmoid())


@TABLE.row(44, torch=WRONG, recomputes=None)
def separate_models(checkpoint: Checkpoint) -> dict[str, object]:
    """Each thread trains its own net with BatchNorm and a hook; all regions share their code."""
    models = [nn.Sequential(block(), nn.BatchNorm1d(4)) for _ in range(NUM_THREADS)]
    counts = [[0] for _ in models]
    for model, count in zip(models, counts, strict=True):
        model[0].register_forward_hook(lambda m, args, out, count=count: count.__setitem__(0, count[0] + 1))

    def run(index: int) -> dict[str, object]:
        model = models[index]
        for x in batches(5, 4, count=8):
            model.zero_grad()
            checkpoint(model, x * (index + 1), use_reentrant=False).square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad, alpha=0.1)
        return state_of(model)

    return {"models": together(run), "hooks": counts}


@TABLE.row(44, torch=WRONG, recomputes=None)
def one_model_in_separate_graphs(checkpoint: Checkpoint) -> dict[str, object]:
    """Threads run forwards and backwards of one module at the same time; its observer counts forwards only."""
    model = block()
    lock = threading.Lock()
    count = [0]

    def observe(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        with lock:
            count[0] += 1

    model[0].register_forward_hook(observe)

    def run(index: int) -> list[Tensor]:
        found: list[Tensor] = []
        for x in batches(5, 4, count=10):
            y = checkpoint(model, x * (index + 1), use_reentrant=False)
            found += torch.autograd.grad(y.square().mean(), list(model.parameters()))
        return found

    return {"gradients": together(run), "hooks": count[0]}


@TABLE.row(44, recomputes=None)
def one_graph_with_retain(checkpoint: Checkpoint) -> dict[str, object]:
    model = block()
    loss = checkpoint(model, torch.ones(3, 4), use_reentrant=False).exp().sum()

    def run(index: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss * (index + 1), list(model.parameters()), retain_graph=True)

    return {"gradients": together(run)}


@TABLE.row(44, recomputes=None)
def backward_in_another_thread(checkpoint: Checkpoint) -> dict[str, object]:
    """The forward ran here, under autocast; the backward runs in a new thread, which has its own modes."""
    model = nn.Sequential(block(), nn.Dropout(0.3))
    with torch.autocast("cpu", torch.bfloat16):
        loss = checkpoint(model, torch.ones(3, 4), use_reentrant=False).float().square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join(60)
    return {"loss": loss, **state_of(model), "next": torch.rand(2)}


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)


class Pause:
    """Where the first recompute waits for the second; on a class, which no recompute puts back."""

    is_wanted = False
    started = threading.Event()
    waits = threading.Event()

    @classmethod
    def here(cls) -> None:
        if cls.is_wanted:
            cls.is_wanted = False
            cls.started.set()
            assert cls.waits.wait(10)


class Turn:
    """The lock of recomputes; tells when a second thread waits for it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.first: int | None = None

    def __enter__(self) -> None:
        if self.first is None:
            self.first = threading.get_ident()
        elif self.first != threading.get_ident():
            Pause.waits.set()
        self.lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def test_a_thread_that_waits_sees_what_was_put_back(candidate: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits, another recompute has the forward's buffer in place; afterwards the new one is back."""
    layer = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    layer.register_buffer("scale", torch.ones(6))

    def region(x: Tensor) -> Tensor:
        Pause.here()
        return torch.sin(layer(x) * layer.scale)

    x = batches(4, 6, count=1)[0]
    for _ in range(2):
        candidate(region, x, use_reentrant=False).sum().backward()
    wanted = torch.autograd.grad(plain(region, x).sum(), layer[0].weight)[0]
    losses = [candidate(region, x, use_reentrant=False).sum() for _ in range(2)]
    layer.scale = layer.scale * 3
    found: dict[int, Tensor] = {}

    def backward(index: int) -> None:
        (found[index],) = torch.autograd.grad(losses[index], layer[0].weight)

    monkeypatch.setattr(recompute, "_turn", Turn())
    Pause.is_wanted = True
    threads = [threading.Thread(target=backward, args=(index,)) for index in range(2)]
    threads[0].start()
    assert Pause.started.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert bits(found[0]) == bits(wanted)
    assert bits(found[1]) == bits(wanted)
    assert layer.scale[0] == 3
