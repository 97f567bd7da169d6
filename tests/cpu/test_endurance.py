"""A thousand planned steps: nothing adds up, neither bytes nor Python's objects."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import models as zoo
import pytest
import torch
from subjects import ENGINES, WIDTH, Blocks, dense, subject

import keepless
from keepless.capture import Inputs
from keepless.measure import interposer, measure_peak
from keepless.modules import planned as modules_planned

STEPS = 100
"""Training steps in each step of the meter's."""

SMALLEST_COUNTED = 4096
"""Bytes of the smallest block of the heap that the interposer counts (`KEEPLESS_MIN_BLOCK`)."""


def enduring(engine: str) -> Any:
    """Trains a small GPT by a plan that recomputes."""
    torch.set_num_threads(1)
    one = subject("gpt")
    plan = one.plan(engine, one.plan(engine).smallest_budget + 2000)
    assert plan.num_replays
    keepless.apply(one.model, plan)
    inputs = Inputs.of(one.batch)

    def step() -> dict[str, Any]:
        for _ in range(STEPS):
            one.optimizer.zero_grad(set_to_none=False)
            loss = zoo.loss_in(one.model(*inputs.args, **inputs.kwargs))
            loss.backward()
            one.optimizer.step()
        return {"loss": float(loss.detach())}

    return step


@pytest.mark.slow
def test_bytes_of_a_thousand_steps() -> None:
    """Levels and peaks are those of the second hundred, to the byte, with the garbage collector off within each."""
    found = measure_peak(f"{__name__}:enduring", {"engine": "graph"}, steps=11)
    assert set(found.ends[1:]) == {found.ends[1]}
    assert set(found.peaks[1:]) == {found.peaks[1]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [pytest.param(e, marks=pytest.mark.exhaustive) if e == "graph" else e for e in ENGINES]
)
def test_the_heap_of_a_thousand_steps(engine: str) -> None:
    """The same in large blocks of the heap, whoever allocates them.

    The heap gives a block 16 bytes more than were asked for where so little would be left of a free one: whatever adds
    up is a block or more.
    """
    reason = interposer.available()
    if reason is not None:
        pytest.skip(reason)
    found = measure_peak(f"{__name__}:enduring", {"engine": engine}, steps=11, method="interposer")
    assert max(found.ends[2:]) - min(found.ends[2:]) < SMALLEST_COUNTED


def live() -> tuple[int, int]:
    """Bytes of the tensors that Python knows, and how many objects there are.

    Python leaves a tuple of plain values out of what it tracks when the collector first meets it, and a tuple of such
    tuples one collection later: the number is that of a collection after which nothing more falls out.
    """
    gc.collect()
    number = len(gc.get_objects())
    while True:
        gc.collect()
        objects = gc.get_objects()
        if len(objects) >= number:
            break
        number = len(objects)
        del objects
    storages = {
        one.untyped_storage()._cdata: one.untyped_storage().nbytes()
        for one in objects
        if type(one) in (torch.Tensor, torch.nn.Parameter)
    }
    return sum(storages.values()), len(objects)


def alone(call: str) -> Any:
    """What a function of this module gives in a process of its own, in which no other test has left anything."""
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    code = f"import json, {__name__} as here; print(json.dumps(here.{call}))"
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def hundreds(engine: str) -> list[tuple[int, int]]:
    """What is live after each hundred steps."""
    step = enduring(engine)
    found = []
    for _ in range(3):
        step()
        found.append(live())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_objects(engine: str) -> None:
    """What Python holds after two hundred steps is what it holds after three."""
    found = alone(f"hundreds({engine!r})")
    assert found[1] == found[2]


def train(model: torch.nn.Module, number: int) -> None:
    """A step on a batch of this size, with gradients that stand already."""
    model(torch.ones(number, WIDTH)).backward()
    model.zero_grad(set_to_none=False)


def ever_new_shapes(engine: str, most: int = 4, steps: int = 10) -> tuple[int, list[tuple[int, int]]]:
    """How many captured steps a bounded book holds in the end, and what is live after each so many new sizes."""
    torch.set_num_threads(1)
    model = Blocks(dense(), dense())
    keepless.fit(model, torch.ones(4, WIDTH), "1GiB", engine=engine, cache=False, accumulate=True, background=False)
    model.zero_grad(set_to_none=False)
    planned = model.__dict__["forward"]
    if engine == "graph":
        planned.entries.most = most
    else:
        modules_planned._MOST_ENTRIES = most
    found = []
    warnings.simplefilter("ignore")
    for number in range(5, 5 + 4 * steps):
        train(model, number)
        if number % steps == 4:
            found.append(live())
    return len(planned.entries), found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_shapes_that_never_come_again(engine: str) -> None:
    """Once the plan book is full, each new size takes the place of another, and all that belonged to it is gone.

    Plans of blocks trace each size in full, and torch remembers single ops of that by shape, without a bound.
    """
    num_entries, found = alone(f"ever_new_shapes({engine!r})")
    assert num_entries == 4
    assert found[-1] == found[-2]


def returning_shapes() -> tuple[int, list[tuple[int, int]]]:
    """How many captured steps were forgotten, and what is live after each round of thirty sizes."""
    torch.set_num_threads(1)
    model = Blocks(dense(), dense())
    keepless.fit(model, torch.ones(4, WIDTH), "1GiB", engine="graph", cache=False, accumulate=True, background=False)
    model.__dict__["forward"].entries.most = 16
    found = []
    warnings.simplefilter("ignore")
    for _ in range(4):
        for number in range(4, 34):
            train(model, number)
        found.append(live())
    return model.__dict__["forward"].counters.evicted, found


@pytest.mark.slow
def test_shapes_that_come_again_after_they_were_forgotten() -> None:
    """More sizes than the plan book holds, over and over."""
    num_evicted, found = alone("returning_shapes()")
    assert num_evicted > 60
    assert found[-1] == found[-2]
