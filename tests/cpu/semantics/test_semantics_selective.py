"""With torch's selective checkpointing: ops that the recompute leaves out draw nothing."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

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


class Gathering(nn.Module):
    """An EMA of activations, of their own shape, and a clone of them: a copy of the one must not be the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.ema: torch.Tensor
        self.register_buffer("ema", torch.zeros(8, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.linear(x))
        self.ema.mul_(0.9).add_(h.detach(), alpha=0.1)
        return torch.exp(h.clone())


@pytest.mark.parametrize("check", ["default", "bitwise"])
def test_copies_of_state_are_nothing_for_a_policy(check: str, candidate: Callable[..., torch.Tensor]) -> None:
    """A policy that saves clones would hand the buffer's copy to the region's own clone."""
    contexts = functools.partial(create_selective_checkpoint_contexts, [aten.clone.default])
    results = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = Gathering()
        for _ in range(3):
            x = torch.randn(8, 16)
            if is_checkpointed:
                y = candidate(model, x, use_reentrant=False, determinism_check=check, context_fn=contexts)
            else:
                y = model(x)
            y.pow(2).sum().backward()
        results.append([model.ema, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_region_inside_copies_its_state_unseen(candidate: Callable[..., torch.Tensor]) -> None:
    """It is watched in the outer's forward and known in its recompute: the outer's policy sees neither."""
    seen: list[str] = []

    def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        seen.append(str(op))
        return CheckpointPolicy.PREFER_RECOMPUTE

    def ops_of(inner: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> list[str]:
        seen.clear()
        model, x = Gathering(), torch.randn(8, 16)
        for _ in range(2):
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            candidate(lambda x: inner(model, x).sin(), x, use_reentrant=False, context_fn=contexts).sum().backward()
        return [op for op in seen if "detach" not in op]

    nested = ops_of(lambda model, x: candidate(model, x, use_reentrant=False))
    assert nested == ops_of(lambda model, x: model(x))


def test_a_second_backward_is_torchs_error(candidate: Callable[..., torch.Tensor]) -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, [aten.sin.default])
    x = torch.randn(3, requires_grad=True)
    out = candidate(lambda x: x.sin().cos().exp(), x, use_reentrant=False, context_fn=contexts).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward an extra time"):
        out.backward(retain_graph=True)


def test_contexts_around_a_recompute_are_entered_again(candidate: Callable[..., torch.Tensor]) -> None:
    class Entered(contextlib.AbstractContextManager[None]):
        count = 0

        def __enter__(self) -> None:
            self.count += 1

        def __exit__(self, *error: object) -> None:
            return None

    again = Entered()
    x = torch.randn(3, requires_grad=True)
    out = candidate(lambda x: x.sin().exp(), x, use_reentrant=False, context_fn=lambda: (Entered(), again)).sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert again.count == 2
