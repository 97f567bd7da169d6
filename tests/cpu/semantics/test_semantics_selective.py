"""With torch's selective checkpointing: ops that the recompute leaves out draw nothing."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

aten = torch.ops.aten


class Noisy(nn.Module):
    """Random signs, then dropout: a recompute that leaves out the first must not give its numbers to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.inner(x))
        x = x * torch.bernoulli(torch.full_like(x, 0.5))
        return nn.functional.dropout(torch.tanh(self.outer(x)), 0.4)


def gradients(run: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Noisy()
    found = []
    for _ in range(3):
        x = torch.randn(8, 16, requires_grad=True)
        run(model, x).pow(2).sum().backward()
        assert x.grad is not None
        found += [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None), torch.rand(2)]
    return found


@pytest.mark.parametrize("saved", [aten.bernoulli.default, aten.addmm.default, aten.tanh.default], ids=str)
def test_saved_ops_leave_the_stream_to_the_others(saved: object, candidate: Callable[..., torch.Tensor]) -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, [saved])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # our own hooks are not a user's: torch has nothing to warn of
        got = gradients(lambda model, x: candidate(model, x, use_reentrant=False, context_fn=contexts))
    for one, other in zip(got, gradients(lambda model, x: model(x)), strict=True):
        assert torch.equal(one, other)


def test_torch_gives_the_first_ops_numbers_to_the_second() -> None:
    """The case has teeth: torch's own function draws another dropout mask."""
    contexts = functools.partial(create_selective_checkpoint_contexts, [aten.bernoulli.default])
    run = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, context_fn=contexts)
    pairs = zip(gradients(run), gradients(lambda model, x: model(x)), strict=True)
    if all(torch.equal(one, other) for one, other in pairs):
        pytest.skip("the installed torch has mended it")


def test_saved_results_are_not_made_again(candidate: Callable[..., torch.Tensor]) -> None:
    runs = {"addmm": 0}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            runs["addmm"] += func is aten.addmm.default
            return func(*args, **(kwargs or {}))

    model, x = Noisy(), torch.randn(8, 16, requires_grad=True)
    contexts = functools.partial(create_selective_checkpoint_contexts, [aten.addmm.default])
    for _ in range(2):
        runs["addmm"] = 0
        with Count():
            candidate(model, x, use_reentrant=False, context_fn=contexts).sum().backward()
        assert runs["addmm"] == 2
