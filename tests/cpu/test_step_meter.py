"""The meter of a step that begins and ends in calls of its own."""

from __future__ import annotations

import torch

from keepless.measure import StepMeter, nbytes_of


def test_highest_bytes_between_two_calls() -> None:
    """What stood at the beginning, and the highest of what came and went; what was made outside does not count."""
    device = torch.device("cpu")
    meter = StepMeter(device)
    assert not meter.is_running
    before = torch.ones(1000)
    assert meter.begin(before.nbytes)
    assert meter.is_running
    first = torch.ones(5000)
    del first
    second = torch.ones(2000)
    assert meter.end() == 4000 + 20000
    assert not meter.is_running
    assert meter.begin(0)
    third = torch.ones(3000)
    meter.abort()
    assert not meter.is_running
    assert meter.begin(7)
    assert meter.end() == 7
    assert nbytes_of([second, second[:10], None, third.view(-1)], device) == 8000 + 12000


def test_not_inside_a_profiler_of_the_users() -> None:
    """It does not begin, and the profiler goes on."""
    meter = StepMeter(torch.device("cpu"))
    with torch.autograd.profiler.profile() as profile:
        assert not meter.begin(0)
        torch.ones(3) + 1
    assert any(event.name == "aten::add" for event in profile.function_events)
    assert not meter.is_running
