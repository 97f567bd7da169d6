"""The main cases with inputs saved by a custom function: torch before 2.13 has no other way to save one."""

from __future__ import annotations

import pytest
import test_semantics_anew
import test_semantics_autograd
import test_semantics_inplace
import test_semantics_rng
import test_semantics_state
import test_semantics_structure
import test_semantics_tensors
import test_semantics_threads
import torch
from rows import Checkpoint, Row, batches, judge
from torch import nn

from keepless import _compat

_FILES = (
    test_semantics_anew,
    test_semantics_autograd,
    test_semantics_inplace,
    test_semantics_rng,
    test_semantics_state,
    test_semantics_structure,
    test_semantics_tensors,
    test_semantics_threads,
)
_ROWS = [row for file in _FILES for row in file.TABLE.entries]


@pytest.fixture(autouse=True)
def saved(monkeypatch: pytest.MonkeyPatch) -> list[_compat._Saved]:
    """torch's own way is not there; the inputs that were saved the other way."""
    made: list[_compat._Saved] = []
    original = _compat._Saved.__init__

    def noted(self: _compat._Saved, tensor: torch.Tensor) -> None:
        original(self, tensor)
        made.append(self)

    monkeypatch.setattr(_compat, "_make_saved_tensor", None)
    monkeypatch.setattr(_compat._Saved, "__init__", noted)
    return made


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in _ROWS])
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


def test_inputs_are_saved_by_the_custom_function(candidate: Checkpoint, saved: list[_compat._Saved]) -> None:
    layer = nn.Linear(6, 6)
    for x in batches(4, 6):
        candidate(layer, x, use_reentrant=False).sum().backward()
    assert len(saved) == 3


def test_a_changed_input_is_refused(candidate: Checkpoint) -> None:
    """The custom function's own check of versions."""
    x = torch.ones(3, requires_grad=True) * 2
    loss = candidate(lambda t: torch.sin(t).exp(), x, use_reentrant=False).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
