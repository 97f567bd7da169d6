"""An optimizer's step that finds no memory: refused before anything is changed, or torn by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models as zoo
import pytest
import torch
from torch import nn

import keepless
from keepless.control.rescue import optimizer as guarding
from keepless.errors import MeasureError, ParameterError
from keepless.reporting.black_box_file import read_black_box

BATCH = torch.linspace(-1, 1, 64).reshape(8, 8)


def make(options: dict[str, Any] | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = zoo.mlp()
    return model, torch.optim.AdamW(model.parameters(), 1e-2, **(options or {}))


def apply(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> nn.Module:
    return keepless.fit(model, BATCH, "1GiB", optimizer=optimizer, black_box=folder)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        model(BATCH).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return [t.detach().clone() for t in (*model.parameters(), *state)]


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_a_guarded_optimizer_steps_as_before(options: dict[str, Any], tmp_path: Path) -> None:
    expected = steps(*make(options))
    model, optimizer = make(options)
    found = steps(apply(model, optimizer, tmp_path), optimizer)
    assert all(map(zoo.same_bits, found, expected))
    assert "step" in vars(optimizer)
    keepless.remove(model)
    assert "step" not in vars(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not list(tmp_path.iterdir())


def test_without_an_optimizer_nothing_is_hooked() -> None:
    model, optimizer = make()
    keepless.apply(model, keepless.plan(model, BATCH, "1GiB", optimizer=optimizer))
    assert "step" not in vars(optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_the_probe_asks_for_state_that_is_not_there_and_for_temporaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make({"foreach": True})
    asked: list[int] = []
    monkeypatch.setattr(guarding, "allocate", lambda sizes, device: asked.append(sum(sizes)))
    steps(apply(model, optimizer, tmp_path), optimizer, 3)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    state = guarding._present(optimizer)
    scratch = asked[1]
    assert asked == [state + scratch, scratch, scratch]
    assert state >= 2 * nbytes
    assert scratch > 0


def test_a_probe_that_finds_no_room_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make()
    apply(model, optimizer, tmp_path)
    steps(model, optimizer, 1)
    before = everything(model, optimizer)
    model(BATCH).backward()
    with monkeypatch.context() as patch:
        patch.setattr(guarding, "allocate", fails)
        with pytest.raises(keepless.OutOfMemory, match="Nothing was changed") as caught:
            optimizer.step()
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert caught.value.phase == "optimizer"
    assert all(map(zoo.same_bits, everything(model, optimizer), before))
    document = read_black_box(caught.value.black_box)
    assert document["phase"] == "optimizer"
    assert document["optimizer"]["name"] == "AdamW"  # type: ignore[index]
    optimizer.step()  # there is room again
    assert not all(map(zoo.same_bits, everything(model, optimizer), before))


def failing_at(method: str, number: int, patch: pytest.MonkeyPatch) -> None:
    """The `number`-th call of a method of tensors finds no memory."""
    own: Callable[..., Any] = getattr(torch.Tensor, method)
    calls = [0]

    def run(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return fails() if calls[0] == number else own(*args, **kwargs)

    patch.setattr(torch.Tensor, method, run)


def test_a_step_that_ends_half_way_names_what_it_came_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make({"foreach": False})
    apply(model, optimizer, tmp_path)
    steps(model, optimizer, 2)
    names = [name for name, _ in model.named_parameters()]
    model(BATCH).backward()
    with monkeypatch.context() as patch:
        failing_at("addcdiv_", 3, patch)
        with pytest.raises(keepless.TornStep, match="load a checkpoint") as caught:
            optimizer.step()
    error = caught.value
    assert error.updated == tuple(names[:2])
    assert error.half_updated == (names[2],)
    assert isinstance(error, keepless.errors.StepError)
    assert "can't allocate" in str(error)
    document = read_black_box(error.black_box)
    assert document["optimizer"]["updated"] == names[:2]  # type: ignore[index]


def test_what_a_whole_step_changes_is_looked_at_until_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after many steps, and anew where another parameter gets state: torn steps are told alike."""
    model, optimizer = make({"foreach": False})
    names = [name for name, _ in model.named_parameters()]
    params = list(model.parameters())
    apply(model, optimizer, tmp_path)
    looks: list[int] = []
    own = guarding._changes
    monkeypatch.setattr(guarding, "_changes", lambda *two: [looks.append(1), own(*two)][1])

    def step(fails_at: int = 0) -> None:
        optimizer.zero_grad()
        model(BATCH).backward()
        params[-1].grad = params[-1].grad if has_last else None
        with monkeypatch.context() as patch:
            if fails_at:
                failing_at("addcdiv_", fails_at, patch)
            optimizer.step()

    has_last = False
    for _ in range(5):
        step()
    assert len(looks) == 3  # the first makes state, the second is a whole one, the third the same
    with pytest.raises(keepless.TornStep) as caught:
        step(2)
    assert (caught.value.updated, caught.value.half_updated) == ((names[0],), (names[1],))
    looks.clear()
    has_last = True
    for _ in range(5):
        step()
    assert len(looks) == 2  # from the step on that finds the new state
    with pytest.raises(keepless.TornStep) as caught:
        step(len(names))
    assert (caught.value.updated, caught.value.half_updated) == (tuple(names[:-1]), (names[-1],))


def test_a_first_step_that_ends_half_way_takes_nothing_for_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make({"foreach": False})
    apply(model, optimizer, tmp_path)
    names = [name for name, _ in model.named_parameters()]
    model(BATCH).backward()
    failing_at("addcdiv_", 2, monkeypatch)
    with pytest.raises(keepless.TornStep) as caught:
        optimizer.step()
    # The state of all parameters is made before the first update.
    assert caught.value.updated == ()
    assert set(names[:2]) <= set(caught.value.half_updated)


def test_a_foreach_step_is_half_done_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make({"foreach": True})
    apply(model, optimizer, tmp_path)
    steps(model, optimizer, 2)
    model(BATCH).backward()
    monkeypatch.setattr(torch, "_foreach_addcdiv_", fails)
    with pytest.raises(keepless.TornStep) as caught:
        optimizer.step()
    assert caught.value.updated == ()
    assert caught.value.half_updated == tuple(name for name, _ in model.named_parameters())


def test_a_step_that_fails_before_its_first_write_is_not_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make({"foreach": True})
    apply(model, optimizer, tmp_path)
    steps(model, optimizer, 2)
    model(BATCH).backward()
    before = everything(model, optimizer)
    monkeypatch.setattr(torch, "_foreach_add_", fails)
    with pytest.raises(keepless.OutOfMemory, match="before it changed anything"):
        optimizer.step()
    assert all(map(zoo.same_bits, everything(model, optimizer), before))


def test_other_errors_of_an_optimizer_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make({"foreach": True})
    apply(model, optimizer, tmp_path)

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("something else")

    monkeypatch.setattr(torch, "_foreach_add_", broken)
    model(BATCH).backward()
    with pytest.raises(ValueError, match="something else"):
        optimizer.step()


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_schedulers_and_scalers_go_with_it(scheduler_first: bool, tmp_path: Path) -> None:
    def train(guarded: bool) -> list[torch.Tensor]:
        model, optimizer = make()
        if scheduler_first:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        if guarded:
            apply(model, optimizer, tmp_path)
        if not scheduler_first:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        scaler = torch.amp.GradScaler("cpu")
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(BATCH)).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()  # warns where it does not see the optimizer's steps
        if guarded:
            keepless.remove(model)
            steps(model, optimizer, 1)
            assert not optimizer._optimizer_step_pre_hooks
        else:
            steps(model, optimizer, 1)
        return [p.detach().clone() for p in model.parameters()]

    assert all(map(zoo.same_bits, train(True), train(False)))


def test_an_optimizer_whose_memory_cannot_be_predicted_is_guarded_all_the_same(tmp_path: Path) -> None:
    class Closed(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if closure is None:
                raise RuntimeError("this needs a closure")
            return super().step(closure)

    model = zoo.mlp()
    optimizer = Closed(model.parameters(), 0.1)
    with pytest.raises(MeasureError):
        keepless.plan(model, BATCH, "1GiB", optimizer=optimizer)
    keepless.apply(model, keepless.plan(model, BATCH, "1GiB"), optimizer=optimizer, black_box=tmp_path)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(BATCH)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure)
    assert not all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("rewrites", [(), ("optimizer_in_backward",)])
def test_an_optimizer_that_needs_more_than_the_planned_one_is_refused(rewrites: tuple[str, ...]) -> None:
    """Its state would not be in the budget. What still fits, or needs less, is taken."""
    model = zoo.mlp(256)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    larger = torch.optim.AdamW(model.parameters(), 1e-2, amsgrad=True)
    roomy = keepless.plan(model, BATCH, "1GiB", optimizer=optimizer, rewrites=rewrites)
    tight = keepless.plan(model, BATCH, roomy.baseline_peak, optimizer=optimizer, rewrites=rewrites)
    with pytest.raises(keepless.PlanError, match="Plan again with this optimizer"):
        keepless.apply(model, tight, optimizer=larger)
    assert "forward" not in vars(model)
    keepless.apply(model, roomy, optimizer=larger)
    keepless.remove(model)
    if not rewrites:
        keepless.apply(model, tight, optimizer=torch.optim.SGD(model.parameters(), 1e-2))
        keepless.remove(model)


def test_a_folder_of_black_boxes_that_is_no_path_is_refused() -> None:
    model, optimizer = make()
    plan = keepless.plan(model, BATCH, "1GiB", optimizer=optimizer)
    with pytest.raises(ParameterError, match="black_box=3"):
        keepless.apply(model, plan, optimizer=optimizer, black_box=3)  # type: ignore[arg-type]
    assert "forward" not in vars(model)


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_an_optimizer_that_the_plan_does_not_count_is_refused(engine: str) -> None:
    """An error where its bytes have no room, with the way to plan for it; a warning where they have."""
    model = zoo.mlp(256)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    roomy = keepless.plan(model, BATCH, "1GiB", engine=engine)
    tight = keepless.plan(model, BATCH, roomy.baseline_peak, engine=engine)
    with pytest.raises(keepless.PlanError, match="counts no optimizer, and this AdamW has") as caught:
        keepless.apply(model, tight, optimizer=optimizer)
    assert "keepless.plan(model, batch, budget, optimizer=optimizer)" in str(caught.value)
    assert "forward" not in vars(model)
    assert "step" not in vars(optimizer)
    with pytest.warns(UserWarning, match="the plan counts no optimizer") as told:
        keepless.apply(model, roomy, optimizer=optimizer)
    assert told[0].filename == __file__
    keepless.remove(model)
    keepless.apply(
        model, tight, optimizer=torch.optim.SGD(model.parameters(), 1e-2, foreach=False)
    )  # it fits below the peak
    keepless.remove(model)
    keepless.apply(model, keepless.plan(model, BATCH, "1GiB", engine=engine, optimizer=optimizer))  # not looked after
    keepless.remove(model)
