"""Indices that trials give to ops: within their bounds, and not all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from keepless.binding import Call, Ref
from keepless.capture import Inputs, StepShape, flatten_inputs, lower, trace_step
from keepless.control.indices import _KNOWN, spread_indices
from keepless.control.trials import op_trials

aten = torch.ops.aten


class Indexing(nn.Module):
    """Ops that read and add by indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 12), nn.Linear(12, 30)
        self.register_buffer("places", torch.tensor([3, 1, 2]))

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        rows = x.flatten(0, 1)[ids.flatten() % 7]
        picked = torch.gather(rows, 1, (ids.flatten() % 12)[:, None])
        pooled = F.max_pool2d(image, 2).square().mean() + F.max_pool3d(image[None], 2).mean()
        fixed = rows[self.places].mean() + self.table(self.places).mean()
        return F.cross_entropy(self.head(rows), ids.flatten() % 30) + picked.mean() + pooled + fixed


def test_ops_of_a_step_are_given_indices_in_their_bounds() -> None:
    """Every op of the captured step runs on them, and each kind that is known got some."""
    model = Indexing()
    flat = flatten_inputs(Inputs(torch.randint(0, 50, (3, 5)), torch.randn(2, 3, 8, 8, requires_grad=True)))
    binding = lower(trace_step(model, flat, batch=None, loss_fn=None, grad_outputs=None), flat, model, StepShape())
    seen: set[Any] = set()
    for code in binding.ops:
        if code is not None and spread_indices(code.call, binding.examples):
            seen.add(code.call.target)
    wanted = {aten.embedding.default, aten.embedding_dense_backward.default, aten.gather.default, aten.index.Tensor}
    pools = {aten.max_pool2d_with_indices_backward.default, aten.max_pool3d_with_indices_backward.default}
    assert wanted | pools | {aten.nll_loss_forward.default, aten.nll_loss_backward.default} <= seen
    for trial in op_trials(binding, model):
        trial.make()()
    assert model.places.tolist() == [3, 1, 2], "the model's own tensors are left alone"


def test_they_are_spread() -> None:
    """Over the whole range; a pool's each to a place of its own."""
    examples = {0: torch.empty(2, 3, 4, 4), 1: torch.empty(2, 3, 8, 8), 2: torch.empty(2, 3, 4, 4, dtype=torch.int64)}
    call = Call(
        aten.max_pool2d_with_indices_backward.default, (Ref(0), Ref(1), [2, 2], [2, 2], [0], [1], False, Ref(2))
    )
    (make,) = spread_indices(call, examples).values()
    found = make(96).view(6, 16)
    assert (found < 64).all()
    assert all(len(set(row.tolist())) == 16 for row in found)
    call = Call(aten.embedding.default, (Ref(0), Ref(1)))
    examples = {0: torch.empty(1000, 8), 1: torch.empty(4, 64, dtype=torch.int64)}
    (make,) = spread_indices(call, examples).values()
    assert len(set(make(256).tolist())) > 200
    assert 0 <= int(make(256).min()) <= int(make(256).max()) < 1000


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_are_none(dtype: torch.dtype) -> None:
    examples = {0: torch.empty(4, 4), 1: torch.empty(4, 4, dtype=dtype)}
    assert spread_indices(Call(aten.index.Tensor, (Ref(0), [Ref(1)])), examples) == {}
    assert aten.index.Tensor in _KNOWN
