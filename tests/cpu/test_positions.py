"""Batches that are too long for a model's learned positions are refused before any step, and no other ones."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import zoo
from torch import nn

import keepless
from keepless.control.positions import read_beyond
from keepless.errors import PositionError


def too_long() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    ids = torch.zeros(2, 13, dtype=torch.long)
    return models.TinyLM(), {"ids": ids, "labels": ids}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"engine": "graph"}, {"on": "l4"}], ids=str)
def test_a_text_beyond_the_last_position_is_refused(options: dict[str, Any]) -> None:
    """Plans, curves and estimates say which table ends where, as eager's own error does not; nothing has changed."""
    model, batch = too_long()
    state = torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        PositionError, match=r"too long for a table.*row 12 of a table of 12 rows is read at .*embedding"
    ):
        keepless.plan(model, batch, "1GiB", cache=False, **options)
    if "engine" not in options:
        with pytest.raises(PositionError, match="row 12 of a table of 12 rows"):
            keepless.estimate(model, batch, **options)
        with pytest.raises(PositionError, match="row 12 of a table of 12 rows"):
            keepless.curve(model, batch, points=2, cache=False, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert all(models.same_bits(before[name], p) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(zoo.BUILDERS))
def test_no_false_alarm(name: str) -> None:
    """Models that train are planned, those with positions at their whole length."""
    assert zoo.build(name).plan(16 << 30, cache=False, on="l4").num_replays == 0


@pytest.mark.slow
def test_positions_up_to_the_last_are_read() -> None:
    """The last row is no row too many, and tokens, which are data, are not looked at."""
    model = models.TinyLM()
    for length in (1, 12):
        ids = torch.zeros(2, length, dtype=torch.long)
        _, binding = models.capture(model, {"ids": ids, "labels": ids})
        assert read_beyond(binding) is None
    model, batch = too_long()
    _, binding = models.capture(model, batch)
    found = read_beyond(binding)
    assert found is not None
    assert (found.rows, found.wanted) == (12, 12)
