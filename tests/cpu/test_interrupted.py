"""Planning that ends half-way, by whatever error and at whatever place, leaves no trace either."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupting import Place, interrupted, places
from models import loss_in
from subjects import ENGINES, MAKERS, USERS, Blocks, Subject, dense, subject

import keepless
from keepless.errors import KeeplessError, MeasureError

NUM_LINES = int(os.environ.get("KEEPLESS_INTERRUPTED_LINES", "4"))
"""Lines for each function."""
ERRORS = (KeyboardInterrupt, SystemExit, MemoryError, RuntimeError)
FUNCTIONS = (
    *(f"plan {engine}" for engine in ENGINES),
    "curve",
    *(f"{use} {engine}" for use in USERS for engine in ENGINES),
)


@pytest.fixture(scope="module", autouse=True)
def plans() -> dict[str, keepless.Plan]:
    """A plan by each engine; what torch and Keepless set up once in a process is set up."""
    made = {}
    for engine in ENGINES:
        one = subject("batchnorm")
        made[engine] = one.plan(engine)
        keepless.verify(one.model, one.batch, made[engine], repeats=1)
    MAKERS["curve"](subject("batchnorm"))
    gc.collect()
    gc.unfreeze()  # the world has how many objects are frozen
    return made


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A profiler that a failing test leaves running would fail all that come after it."""
    yield
    if torch._C._autograd._profiler_enabled():
        torch._C._autograd._disable_profiler_legacy()


def call(function: str, one: Subject, plans: dict[str, keepless.Plan], folder: Path) -> Callable[[], object]:
    """One of the functions, on a subject."""
    use, _, engine = function.partition(" ")
    if use in USERS:
        return lambda: USERS[use](one, plans[engine], folder)
    return lambda: MAKERS[function](one)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_at_any_line(function: str, plans: dict[str, keepless.Plan], tmp_path: Path) -> None:
    """Ctrl-C at lines that are drawn from all that the call comes to, above the torch line."""
    found: list[Place] = places(call(function, subject("batchnorm"), plans, tmp_path))
    for place in random.Random(function).sample(found, min(NUM_LINES, len(found))):
        one = subject("batchnorm")
        before = one.world()
        interrupted(call(function, one, plans, tmp_path), place, KeyboardInterrupt())
        if function.startswith(("apply", "file")):  # it may have come after one of the calls
            keepless.remove(one.model)
        assert before.differences() == [], place


class Fails:
    """Fails at one of its calls."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.left, self.error = at, error

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


def numbers() -> Iterator[int]:
    """0, 1, 2, 4, 7, 11 ...: often at the beginning, where things are set up."""
    number = step = 0
    while True:
        yield number
        step += 1
        number += step


def until_it_succeeds(run: Callable[[int, BaseException], Subject]) -> int:
    """Runs something that fails at later and later calls, until it does not; how often it failed."""
    for count, at in enumerate(numbers()):
        error = ERRORS[count % len(ERRORS)](f"at call {at}")
        try:
            run(at, error)
        except (*ERRORS, KeeplessError) as caught:
            chain = []
            link: BaseException | None = caught
            while link is not None:
                chain.append(link)
                link = link.__cause__ or link.__context__
            assert error in chain, chain
            continue
        return count
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("function", [*(f"plan {engine}" for engine in ENGINES), "curve"])
def test_at_any_stage(function: str) -> None:
    """What is told of the progress raises."""

    def run(at: int, error: BaseException) -> Subject:
        one = subject("batchnorm")
        one.options["progress"] = Fails(at, error)
        before = one.world()
        try:
            MAKERS[function](one)
        finally:
            assert before.differences() == [], (at, error)
        return one

    assert until_it_succeeds(run) > 3


NEVER = 10**9
FAILS: Any = Fails(NEVER, RuntimeError())
"""What the model's code calls. It is out of the model's sight, where nobody puts its count back."""


class Breaks(torch.nn.Module):
    """A block whose forward fails at one of its calls, after it has changed what it can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dense()
        self.register_buffer("count", torch.zeros(8))
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.count.add_(1.0)
        self.seen.append(1)
        torch.rand(1)
        FAILS()
        self.seen.pop()
        return self.inner(x) + self.count.mean()


@pytest.mark.slow
@pytest.mark.parametrize("use", ["plan", "verify", "timeline"])
@pytest.mark.parametrize("engine", ENGINES)
def test_in_any_forward(engine: str, use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own code raises, in the capture, in a trial step, in a recompute."""
    plans: list[keepless.Plan] = []

    def run(at: int, error: BaseException) -> Subject:
        one = subject("batchnorm")
        torch.manual_seed(0)
        one.model = Blocks(dense(), Breaks(), dense())
        one.optimizer = torch.optim.AdamW(one.model.parameters())
        loss_in(one.model(one.batch)).backward()
        if use != "plan" and not plans:
            plans.append(one.plan(engine))
        before = one.world()
        monkeypatch.setitem(globals(), "FAILS", Fails(at, error))
        try:
            one.plan(engine) if use == "plan" else USERS[use](one, plans[0], tmp_path)
        finally:
            monkeypatch.setitem(globals(), "FAILS", Fails(NEVER, error))
            assert before.differences() == [], (at, error)
        return one

    runs_captured = use == "timeline" and engine != "eager"  # and not the model's code
    assert until_it_succeeds(run) >= (0 if runs_captured else 1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_in_the_loss(engine: str) -> None:
    """The caller's own loss raises."""

    def run(at: int, error: BaseException) -> Subject:
        one = subject("batchnorm")
        fails = Fails(at, error)

        def loss_fn(output: torch.Tensor, batch: Any) -> torch.Tensor:
            torch.rand(1)
            fails()
            return output * 2

        before = one.world()
        try:
            plan = one.plan(engine, loss_fn=loss_fn)
            keepless.verify(one.model, one.batch, plan, repeats=1)
        finally:
            assert before.differences() == [], (at, error)
        return one

    assert until_it_succeeds(run) > 2


class Steps(torch.optim.AdamW):
    """Fails in its step."""

    error: BaseException = RuntimeError()

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        raise self.error


@pytest.mark.parametrize("error", ERRORS)
def test_in_the_optimizer(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shadow fails in the middle of a step; nothing of the user's was stepped."""
    one = subject("batchnorm")
    monkeypatch.setattr(Steps, "error", error())
    shadowed = Steps(one.model.parameters())
    shadowed.load_state_dict(torch.optim.AdamW(one.model.parameters()).state_dict())
    one.optimizer = shadowed
    before = one.world()
    with pytest.raises((error, MeasureError)):
        one.plan()
    assert before.differences() == []


@pytest.mark.parametrize("error", ERRORS)
def test_in_the_solver(error: type[BaseException]) -> None:
    """A solver of the user's raises."""

    class Raises:
        def solve(self, *_: Any, **__: Any) -> Any:
            torch.rand(1)
            raise error

        __call__ = solve

    one = subject("batchnorm")
    for engine in ("graph", "blocks"):
        before = one.world()
        with pytest.raises(error):
            one.plan(engine, solver=Raises())
        assert before.differences() == [] or before.differences()[0].startswith("torch's random numbers")


@torch.library.custom_op("keepless_tests::breaks", mutates_args=())
def breaks(x: torch.Tensor) -> torch.Tensor:
    FAILS()
    return x * 2


@breaks.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


breaks.register_autograd(lambda ctx, grad: grad * 2)


class CallsOp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(breaks(x))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_in_an_op(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op fails where it is measured, at its first, second ... run: out of memory, say."""

    def run(at: int, error: BaseException) -> Subject:
        one = subject("batchnorm")
        one.model = Blocks(*(CallsOp() for _ in range(3)))
        one.optimizer = torch.optim.AdamW(one.model.parameters())
        before = one.world()
        monkeypatch.setitem(globals(), "FAILS", Fails(at, error))
        try:
            one.plan(engine)
        finally:
            monkeypatch.setitem(globals(), "FAILS", Fails(NEVER, error))
            assert before.differences() == [], (at, error)
        return one

    assert until_it_succeeds(run) > 1
