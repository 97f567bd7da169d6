"""Optimizers: predicted state and temporaries against the real step's allocations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from keepless.errors import MeasureError
from keepless.measure import optimizer_footprint
from keepless.measure._profiler import run_traced

SHAPES = [(512, 64), (64,), (64, 256), (256,), (512, 64), (3, 5), (100, 100)]
optim = torch.optim
CASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any], str]] = [
    (optim.SGD, {"lr": 0.1}, "for-loop"),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, "for-loop"),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, "for-loop"),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}, "foreach"),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}, "fused"),
    (optim.Adam, {}, "for-loop"),
    (optim.Adam, {"weight_decay": 0.1}, "for-loop"),
    (optim.Adam, {"amsgrad": True}, "for-loop"),
    (optim.Adam, {"foreach": True}, "foreach"),
    (optim.Adam, {"fused": True}, "fused"),
    (optim.AdamW, {}, "for-loop"),
    (optim.AdamW, {"maximize": True}, "for-loop"),
    (optim.AdamW, {"lr": torch.tensor(1e-3)}, "for-loop"),
    (optim.AdamW, {"foreach": True, "amsgrad": True}, "foreach"),
    (optim.AdamW, {"fused": True, "amsgrad": True}, "fused"),
    (optim.RMSprop, {"momentum": 0.9, "centered": True}, "for-loop"),
    (optim.Adagrad, {}, "for-loop"),
    (optim.ASGD, {}, "for-loop"),
    (optim.Adafactor, {}, "for-loop"),
]


def _params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def _real(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """State bytes and highest temporaries of two real steps."""
    scratch = 0
    for _ in range(2):
        _, events = run_traced(optimizer.step)
        level = peak = 0
        for nbytes in events:
            level += nbytes
            peak = max(peak, level)
        scratch = max(scratch, peak - level)
    leaves = [leaf for state in optimizer.state.values() for leaf in state.values() if isinstance(leaf, torch.Tensor)]
    return sum(leaf.untyped_storage().nbytes() for leaf in leaves), scratch


@pytest.mark.parametrize(("kind", "options", "form"), CASES)
def test_footprint_is_the_real_one(kind: type[torch.optim.Optimizer], options: dict[str, Any], form: str) -> None:
    """State to the byte, temporaries within 64 bytes and never below; nothing of the user's changes."""
    params = _params()
    optimizer = kind(params, **options)
    before = [param.detach().clone() for param in params]
    num_states, generator = len(optimizer.state), torch.get_rng_state()
    found = optimizer_footprint(optimizer, params)
    assert len(optimizer.state) == num_states
    assert torch.equal(generator, torch.get_rng_state())
    assert all(param.grad is None and torch.equal(param, old) for param, old in zip(params, before, strict=True))
    for param in params:
        param.grad = torch.randn_like(param)
    state_nbytes, scratch = _real(optimizer)
    assert found.form == form
    assert found.state_nbytes == state_nbytes
    assert scratch <= found.scratch_nbytes <= scratch + 64
    assert found.seconds_estimate is not None
    assert found.seconds_estimate > 0
    assert optimizer_footprint(optimizer, params).state_nbytes == state_nbytes


def test_loop_keeps_the_previous_denominator() -> None:
    """AdamW's loop needs three times a parameter after one of equal size, and twice for a single one."""
    size = 4 * 1000 * 1000
    pair = [torch.nn.Parameter(torch.empty(1000, 1000)) for _ in range(2)]
    assert optimizer_footprint(optim.AdamW(pair[:1])).scratch_nbytes == pytest.approx(2 * size, abs=64)
    assert optimizer_footprint(optim.AdamW(pair)).scratch_nbytes == pytest.approx(3 * size, abs=64)


def test_only_params_with_gradients_count() -> None:
    """Frozen parameters and those outside `params` get no state; groups keep their own options."""
    params = _params()
    params[0].requires_grad_(False)
    groups = [{"params": params[:3], "momentum": 0.9}, {"params": params[3:], "momentum": 0.0}]
    optimizer = optim.SGD(groups, lr=0.1)
    assert optimizer_footprint(optimizer).state_nbytes == 4 * (64 + 64 * 256)
    assert optimizer_footprint(optimizer, params[1:2]).state_nbytes == 4 * 64
    assert optimizer_footprint(optimizer, []).state_nbytes == 0


def test_hooks_and_schedulers_are_not_called() -> None:
    """The user's hooks, global ones too, and a scheduler's counter do not see the shadow steps."""
    params = _params()
    optimizer = optim.AdamW(params)
    calls: list[object] = []
    optimizer.register_step_pre_hook(lambda *args: calls.append(args))
    handle = register_optimizer_step_post_hook(lambda *args: calls.append(args))
    try:
        scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5)
        optimizer_footprint(optimizer)
    finally:
        handle.remove()
    assert calls == []
    assert scheduler.last_epoch == 0


def test_closures_are_refused() -> None:
    """An optimizer that needs a closure cannot be predicted, and says so."""
    with pytest.raises(MeasureError, match="LBFGS"):
        optimizer_footprint(optim.LBFGS(_params()))
