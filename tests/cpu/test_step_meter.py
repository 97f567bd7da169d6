"""The meter of a step that begins and ends in calls of its own."""

from __future__ import annotations

import torch

from keepless.measure import StepMeter, nbytes_of
from keepless.measure.running import MOST_STEPS
from keepless.scripts.meter import Meter

CPU = torch.device("cpu")


def test_highest_bytes_between_two_calls() -> None:
    """What stood at the beginning, and the highest of what came and went; what was made outside does not count."""
    meter = StepMeter(CPU, is_alone=True)
    assert not meter.is_running
    before = torch.ones(1000)
    assert meter.begin([before, before[:3], None])
    assert meter.is_running
    first = torch.ones(5000)
    del first
    second = torch.ones(2000)
    assert meter.end() == 4000 + 20000
    assert meter.is_over
    assert not meter.is_running
    assert not meter.begin([])
    meter = StepMeter(CPU, is_alone=True)
    assert meter.begin([])
    third = torch.ones(3000)
    meter.abort()
    assert not meter.is_running
    assert meter.begin([], 7)
    assert meter.end() == 7
    assert nbytes_of([second, second[:10], None, third.view(-1)], CPU) == 8000 + 12000


def test_what_stood_before_and_is_freed() -> None:
    """A step that frees the gradient of the step before is not told; the next one is, to the byte."""
    meter = StepMeter(CPU)
    weight, gradient, told = torch.ones(5000), torch.ones(5000), []
    held = torch.ones(10)
    for _ in range(3):
        if not meter.begin([weight, gradient]):
            break
        scratch = torch.ones(10000)
        gradient = None  # as zero_grad does between a forward and its backward
        del scratch
        gradient, output = torch.ones(5000), torch.ones(3000)
        told.append(meter.end())
        held = output  # a script's names hold it till the next step, or longer
    del held
    # The second: both tensors and the first one's output, which nothing that is listed holds, and the scratch.
    assert told == [None, 20000 + 20000 + 12000 + 40000]


def test_what_python_cannot_reach() -> None:
    """What a graph or numpy holds over the step's end stands in the next one, listed or not."""
    weight, held = torch.ones(5000, requires_grad=True), []
    meter = StepMeter(CPU)
    assert meter.begin([weight])
    held.append((weight * torch.ones(5000)).sum())  # its factor is in no Python object
    held.append((torch.ones(3000) + 1).numpy())
    assert meter.end() is None
    assert meter.begin([weight])
    assert meter.end() == 20000 + 20000 + 4 + 12000


def test_it_gives_up() -> None:
    """Where each step frees what was not seen to come, none is told, and no more are metered; a break begins anew."""
    meter = StepMeter(CPU)
    old = [torch.ones(2000) for _ in range(MOST_STEPS)]
    for number in range(MOST_STEPS):
        assert meter.begin(old)
        old.pop()
        assert meter.end() is None
        assert meter.is_over == (number == MOST_STEPS - 1)
    assert not meter.begin(old)
    meter = StepMeter(CPU, is_alone=True)
    gradient: torch.Tensor | None = torch.ones(2000)
    meter.begin([gradient])
    gradient = None
    assert meter.end() is None
    meter.abort()
    unseen = torch.ones(700)
    assert meter.begin([unseen])
    assert meter.end() == 2800
    assert gradient is None


def test_not_inside_a_profiler_of_the_users() -> None:
    """It does not begin, and the profiler goes on."""
    meter = StepMeter(CPU)
    with torch.autograd.profiler.profile() as profile:
        assert not meter.begin([])
        torch.ones(3) + 1
    assert any(event.name == "aten::add" for event in profile.function_events)
    assert not meter.is_running


def test_a_script_that_evaluates_after_each_step_is_metered() -> None:
    """The evaluation between two steps is watched, but is no part of either."""
    model = torch.nn.Linear(100, 50)
    optimizer = torch.optim.SGD(model.parameters())
    batch, large = torch.ones(20, 100), torch.ones(2000, 100)
    peaks = []
    for evaluates in (False, True):
        meter = Meter(model, optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
            if evaluates:
                model.eval()
                with torch.no_grad():
                    model(large)
                model.train()
        peaks.append(meter.end())
        assert meter.calls == 4
    assert peaks[0] is not None
    assert peaks[0] == peaks[1]
