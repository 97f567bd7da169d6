"""Steps with the optimizer in the backward that end before their end: out of memory, interrupted, torn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import nn
from update_steps import PLENTY, REWRITES, different, train

import keepless
from keepless.errors import TornStep
from keepless.execute import drilling
from keepless.ir import Phase, Program, Run

optim = torch.optim


@pytest.mark.slow
def test_out_of_memory_is_survived_until_the_first_update(tmp_path: Path) -> None:
    """An op that finds no memory: the step goes on with the same bits, or, where weights have changed, a typed error.

    No parameter ever holds anything but its old value or the right new one.
    """
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(200, 200), nn.Tanh(), nn.Dropout(0.2))]
    model, batch = models.Loss(nn.Sequential(*layers)), torch.randn(300, 200)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    # A plan that does not depend on measured seconds: how many drills come before the first update would, too.
    plan = keepless.plan(model, batch, PLENTY, optimizer=optimizer, rewrites=REWRITES, solver="keep_all")
    before = [p.detach().clone() for p in model.parameters()]
    failing: list[int] = []
    reasons: list[str] = []

    def hook(program: Program, index: int) -> None:
        if failing and index == failing[0]:
            failing.clear()
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1024 bytes.")

    def step() -> bool:
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)
        keepless.apply(model, plan, optimizer=optimizer, black_box=tmp_path, background=False)
        torch.manual_seed(4)
        try:
            model(batch).backward()
        except keepless.OutOfMemory as error:
            reasons.append(str(error))
            return False
        finally:
            model.zero_grad()
        return True

    with drilling(hook):
        assert step()
        right = [p.detach().clone() for p in model.parameters()]
        ended = {True: 0, False: 0}
        for index, instr in list(enumerate(plan.program))[::3]:
            if isinstance(instr, Run) and plan.graph.ops[instr.op].phase is not Phase.LOSS:
                failing[:] = [index]
                went_on = step()
                if failing:  # an update has no op of the engine's
                    continue
                now = list(model.parameters())
                changed = [not torch.equal(p, old) for p, old in zip(now, before, strict=True)]
                assert all(torch.equal(p, r) for p, r, c in zip(now, right, changed, strict=True) if c)
                assert went_on == all(changed)
                assert went_on or any(changed) or "smallest peak already" in reasons[-1]
                assert went_on or not any(changed) or "has changed since the forward" in reasons[-1]
                ended[went_on] += 1
    assert min(ended.values()) >= 2, ended


def test_an_update_without_memory_is_a_torn_step() -> None:
    """It names the parameter, and those that are updated; the others keep their values."""

    class Failing(optim.SGD):
        """Finds no memory for its third update."""

        count = -1000

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            Failing.count += any(p.grad is not None for group in self.param_groups for p in group["params"])
            if Failing.count == 3:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1024 bytes.")
            super().step()

    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(200, 200), nn.Tanh())]
    model, batch = models.Loss(nn.Sequential(*layers)), torch.randn(30, 200)
    optimizer = Failing(model.parameters(), lr=0.1)
    keepless.fit(model, batch, PLENTY, optimizer=optimizer, rewrites=REWRITES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Failing.count = 0
    with pytest.raises(TornStep, match="no memory for the optimizer's update") as caught:
        model(batch).backward()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert set(caught.value.updated) == changed
    assert len(changed) == 2
    assert not changed & set(caught.value.half_updated)
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))


# ---- backwards that do not come to their end


def interrupted(model: nn.Module, batch: torch.Tensor, where: str) -> None:
    """A step that Ctrl-C ends in its backward, in a hook of one parameter's gradient."""

    def press(grad: torch.Tensor) -> None:
        raise KeyboardInterrupt

    handle = dict(model.named_parameters())[where].register_hook(press)
    with pytest.raises(KeyboardInterrupt):
        models.loss_in(model(batch)).backward()
    handle.remove()


def planned_layers() -> tuple[nn.Module, torch.Tensor, torch.optim.Optimizer]:
    """Six layers whose smallest plan delivers their gradients one by one."""
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(64, 64, bias=False), nn.Tanh())]
    model, batch = models.Loss(nn.Sequential(*layers)), torch.randn(5, 64)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    smallest = keepless.plan(model, batch, PLENTY, optimizer=optimizer, rewrites=REWRITES).smallest_budget
    plan = keepless.plan(model, batch, smallest, optimizer=optimizer, rewrites=REWRITES)
    keepless.apply(model, plan, optimizer=optimizer)
    return model, batch, optimizer


@pytest.mark.parametrize("next_one", ["forward", "step", "another shape"])
def test_an_interrupted_backward_is_told_at_the_next_step(next_one: str) -> None:
    """The names are those whose bits have changed; it is told once, before anything else changes."""
    model, batch, optimizer = planned_layers()
    train(model, batch, optimizer, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    interrupted(model, batch, "module.4.weight")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert 0 < len(changed) < len(before)
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = torch.randn(9, 64)
    go_on = {"forward": lambda: model(batch), "step": optimizer.step, "another shape": lambda: model(other)}[next_one]
    with pytest.raises(TornStep, match=f"{len(changed)} of 6 parameters were updated") as caught:
        go_on()
    assert set(caught.value.updated) == changed
    assert caught.value.half_updated == ()
    assert all(torch.equal(p, now[name]) for name, p in model.named_parameters())
    train(model, batch, optimizer, 2)  # told: the loop may go on


def test_an_interrupted_backward_whose_weights_are_loaded_again_is_not_told() -> None:
    """After load_state_dict training goes on, as if that backward had not been: the same bits."""
    model, batch, optimizer = planned_layers()
    twin = models.Loss(copy.deepcopy(model.module))
    plain = optim.AdamW(twin.parameters(), lr=1e-2)
    train(model, batch, optimizer, 2)
    train(twin, batch, plain, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    interrupted(model, batch, "module.4.weight")
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert different(train(model, batch, optimizer, 2), train(twin, batch, plain, 2)) == []


def test_an_interrupted_update_is_named_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameter in whose update it came may be updated in part."""
    model, batch, optimizer = planned_layers()
    train(model, batch, optimizer, 1)
    own, calls = type(optimizer).step, []

    def pressed(self: Any, closure: Any = None) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(self, closure)

    monkeypatch.setattr(type(optimizer), "step", pressed)
    with pytest.raises(KeyboardInterrupt):
        models.loss_in(model(batch)).backward()
    monkeypatch.setattr(type(optimizer), "step", own)
    with pytest.raises(TornStep, match="may be in part") as caught:
        model(batch)
    assert len(caught.value.updated) == 2
    assert len(caught.value.half_updated) == 1
    assert not set(caught.value.updated) & set(caught.value.half_updated)


def test_an_interrupt_before_any_update_is_nothing() -> None:
    """The last layer's gradient comes first."""
    model, batch, optimizer = planned_layers()
    before = [p.detach().clone() for p in model.parameters()]
    interrupted(model, batch, "module.10.weight")
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    train(model, batch, optimizer, 2)
