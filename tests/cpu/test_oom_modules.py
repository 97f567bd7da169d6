"""Plans of module calls where there is no memory: forwards go on with the same bits, backwards end in typed errors,
and each failure is written down."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from any_models import Between, Block, Looks
from test_oom import CPU_TEXT, around, live_nbytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import keepless
from keepless.control.parts.module_steps import planned_modules
from keepless.machine import Plan, simulate
from keepless.modules.planned import PlannedModules
from keepless.modules.recovery import CHANGES
from keepless.reporting.black_box import black_box_text
from keepless.reporting.black_box_file import read_black_box


class Failing(TorchDispatchMode):
    """The op of one number finds no memory; -1: none."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count - 1 == self.at:
            raise RuntimeError(CPU_TEXT)
        return func(*args, **(kwargs or {}))


class Draws(Between):
    """Draws from Python's random numbers, too."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return super().body(x) * (1.0 + random.random())


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, torch.Tensor, Plan]:
    """A model and a plan of its module calls in which some are kept and some are recomputed.

    The budget is a byte below what keeping everything needs: which plans lie further down, and whether one of them is
    that of the smallest peak, depends on the scratch that this processor's kernels take.
    """
    torch.manual_seed(0)
    model, x = Draws(Looks, Looks, Looks).train(), torch.randn(3, 40, 8)
    kept = keepless.plan(model, x, "1GiB", engine="eager")
    plan = keepless.plan(model, x, kept.predicted_peak - 1, engine="eager")
    assert plan.program.num_replays
    least = keepless.plan(model, x, kept.smallest_budget, engine="eager")
    assert plan.predicted_peak > least.predicted_peak
    assert plan.signature[CHANGES] == ""
    return model, x, plan


def forward_backward(model: nn.Module, x: torch.Tensor, at: int = -1) -> tuple[dict[str, Any], Failing, int]:
    """A step, the mode around it, and how many ops its forward has."""
    model.zero_grad()
    torch.manual_seed(2)
    random.seed(2)
    with Failing(at) as mode:
        loss = model(x)["loss"]
        ops = mode.count
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach(), "draws": (torch.rand(3), random.random())}, mode, ops


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    draws = torch.equal(found["draws"][0], expected["draws"][0]) and found["draws"][1] == expected["draws"][1]
    names = [name for name in expected if name != "draws"]
    return draws and list(found) == list(expected) and all(torch.equal(found[n], expected[n]) for n in names)


def standing(model: nn.Module) -> PlannedModules:
    planned = planned_modules(model)
    assert planned is not None
    return planned


@pytest.mark.slow
def test_random_points_of_an_eager_plan(case: tuple[nn.Module, torch.Tensor, Plan], tmp_path: Path) -> None:
    """Forwards go on, backwards and recomputes raise; the next step is exact, and nothing is left behind."""
    model, x, plan = case
    keepless.apply(model, plan)
    expected, mode, in_forward = forward_backward(model, x)
    expected = forward_backward(model, x)[0]  # regions are watched the first time
    total = mode.count
    before, held = around(), None
    within = [point for point in range(total) if point != in_forward]  # that is torch's seed, made before the backward
    points = random.Random(1).sample(within, total // 3)
    seen: dict[str, int] = {}
    for number, point in enumerate(points):
        folder = tmp_path / str(number)
        keepless.apply(model, plan, black_box=folder)
        try:
            found, *_ = forward_backward(model, x, point)
        except keepless.OutOfMemory as error:
            phase, told, is_torchs = error.phase, str(error), isinstance(error, torch.OutOfMemoryError)
        else:
            phase, told, is_torchs = "forward", "", True
            assert same(found, expected)
        assert is_torchs
        assert (phase == "forward") == (point < in_forward)
        assert ("later steps keep less" in told) == (phase != "forward")
        (path,) = folder.iterdir()
        document: dict[str, Any] = read_black_box(path)
        assert document["phase"] == phase
        assert (document["after"] is not None) == (phase == "forward")
        seen[phase] = seen.get(phase, 0) + 1
        counters = standing(model).counters
        assert (counters.ooms, counters.tightened) == (1, 1)
        assert same(forward_backward(model, x)[0], expected), "the next step"
        assert around() == before
        model.zero_grad()
        held = held or live_nbytes()
        assert live_nbytes() == held, (point, phase)
    assert set(seen) == {"forward", "recompute", "backward"}, (total, seen)
    keepless.remove(model)


def test_what_is_written_about_a_forward(case: tuple[nn.Module, torch.Tensor, Plan], tmp_path: Path) -> None:
    model, x, plan = case
    keepless.apply(model, plan, black_box=tmp_path)
    _, _, in_forward = forward_backward(model, x)
    forward_backward(model, x, in_forward // 2)
    (path,) = tmp_path.iterdir()
    document: dict[str, Any] = read_black_box(path)
    assert document["instruction"]["module"].startswith("blocks.1")
    assert document["instruction"]["source"].startswith("any_models.py:")
    assert document["inputs"] == [{"name": "input 0", "shape": [3, 40, 8], "dtype": "float32"}]
    assert document["suggested_budget"] == plan.smallest_budget
    assert document["after"]["predicted_peak"] < plan.predicted_peak
    phases = document["phases"]
    assert {"forward", "recompute", "loss", "backward"} <= set(phases)
    highest = max(sum(nbytes.values()) for nbytes in phases.values())
    assert highest == document["timeline"]["predicted_peak"] == plan.predicted.peak
    text = black_box_text(document)
    assert "in the module 'blocks.1" in text
    assert "predicted peak of the recompute" in text
    keepless.remove(model)


@pytest.mark.parametrize("engine", ["eager", "blocks"])
def test_on_oom_raise_writes_each_failure_down_once(engine: str, tmp_path: Path) -> None:
    model, x = Between(Block, Block).train(), torch.randn(3, 40, 8)
    plan = keepless.plan(model, x, "1GiB", engine=engine)
    keepless.apply(model, plan, on_oom="raise")
    total = forward_backward(model, x)[1].count
    for number, point in enumerate(range(1, total, 17)):
        folder = tmp_path / str(number)
        keepless.apply(model, plan, on_oom="raise", black_box=folder)
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
            forward_backward(model, x, point)
        assert not isinstance(caught.value, keepless.KeeplessError)
        (path,) = folder.iterdir()
        assert [note for note in caught.value.__notes__ if str(path) in note]
    keepless.remove(model)


@pytest.mark.slow
def test_block_plans_between_their_captured_calls(tmp_path: Path) -> None:
    """Code between captured calls: its forward goes on, its backward raises; no failure comes as it came."""
    model, x = Between(Block, Block).train(), torch.randn(3, 40, 8)
    plan = keepless.plan(model, x, "1GiB", engine="blocks")
    keepless.apply(model, plan)
    expected, mode, in_forward = forward_backward(model, x)
    ended: list[str] = []
    for number, point in enumerate(range(0, mode.count, 5)):
        folder = tmp_path / str(number)
        keepless.apply(model, plan, black_box=folder)
        forward_backward(model, x)
        try:
            found, *_ = forward_backward(model, x, point)
        except keepless.OutOfMemory as error:
            ended.append(error.phase)
        else:
            assert same(found, expected)
            ended.append("went on")
        assert point >= in_forward or ended[-1] == "went on"
        assert len(list(folder.iterdir())) == 1
        assert same(forward_backward(model, x)[0], expected), "the next step"
    assert ended[0] == ended[in_forward // 5] == "went on"
    assert "backward" in ended
    keepless.remove(model)


class Wide(nn.Module):
    """Blocks whose hidden activations are most of what a step takes."""

    def __init__(self, layers: int = 5, width: int = 32) -> None:
        super().__init__()
        rows = [(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))] * layers
        self.blocks = nn.ModuleList([nn.Sequential(*map(copy.deepcopy, row)) for row in rows])

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for block in self.blocks:
            x = x + block(x)
        return {"loss": x.square().mean()}


class Full(TorchDispatchMode):
    """An op after which more bytes live than there are finds no memory."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.most, self.known = most, {p.untyped_storage()._cdata for p in model.parameters()}
        self.live = sum(p.untyped_storage().nbytes() for p in model.parameters())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        if self.live > self.most:
            raise RuntimeError(CPU_TEXT)
        return result

    def forget(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live -= nbytes


@pytest.fixture(scope="module")
def wide() -> tuple[nn.Module, torch.Tensor, Plan]:
    torch.manual_seed(0)
    model, x = Wide().train(), torch.randn(256, 32)
    plan = keepless.plan(model, x, "1GiB", engine="blocks", cache=False)
    assert not plan.program.num_replays
    return model, x, plan


@pytest.mark.parametrize("inside", [False, True], ids=["between", "captured"])
def test_each_failing_backward_tightens_a_plan_of_blocks_by_a_notch(
    inside: bool, wide: tuple[nn.Module, torch.Tensor, Plan], tmp_path: Path
) -> None:
    """In the model's own code, and in a captured call that cannot run again: all calls keep less, bits are the same."""
    model, x, plan = wide
    own = {path: module.__dict__.get("forward") for path, module in model.named_modules()}
    keepless.apply(model, plan, black_box=tmp_path)
    expected = forward_backward(model, x)[0]
    peaks = [plan.predicted_peak]
    for number in range(1, 6):  # four notches, and the smallest
        _, mode, in_forward = forward_backward(model, x)
        at = in_forward + 2 if not inside else mode.count - 12
        with pytest.raises(keepless.OutOfMemory, match="later steps keep less") as caught:
            forward_backward(model, x, at)
        assert ("larger than is held" in str(caught.value)) == inside
        (chosen,) = standing(model).entries.values()
        assert chosen.notches == standing(model).counters.tightened == number
        assert chosen.program is not None
        peaks.append(simulate(plan.graph, chosen.program, plan.cost).peak)
        assert same(forward_backward(model, x)[0], expected), "the next step"
    assert peaks == sorted(set(peaks), reverse=True)
    assert peaks[-1] < plan.smallest_budget
    keepless.remove(model)
    assert {path: module.__dict__.get("forward") for path, module in model.named_modules()} == own
    keepless.apply(model, plan, on_oom="raise", black_box=tmp_path)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        forward_backward(model, x, in_forward + 2)
    assert all(chosen.notches == 0 for chosen in standing(model).entries.values())
    keepless.remove(model)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_blocks_find_a_plan_for_the_memory_that_there_is(
    share: float, wide: tuple[nn.Module, torch.Tensor, Plan], tmp_path: Path
) -> None:
    """A captured call that keeps as little as it can is not the last word: the others keep less, too."""
    model, x, plan = wide
    keepless.apply(model, plan, black_box=tmp_path)
    expected = forward_backward(model, x)[0]
    most = plan.smallest_budget + int(share * (plan.baseline_peak - plan.smallest_budget))
    told = 0
    for _ in range(6):
        model.zero_grad()
        torch.manual_seed(2)
        random.seed(2)
        try:
            with Full(model, most):
                loss = model(x)["loss"]
                loss.backward()
            break
        except keepless.OutOfMemory:
            told += 1
    assert told < 6, "no step completed"
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert same({**found, "loss": loss.detach(), "draws": (torch.rand(3), random.random())}, expected)
    assert standing(model).counters.tightened
    keepless.remove(model)


class Counts(Between):
    """Counts its calls."""

    calls = 0

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().body(x)


class Normed(Between):
    """Keeps statistics in a buffer."""

    def __init__(self, *kinds: type[Block]) -> None:
        super().__init__(*kinds)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))


def hooked(model: nn.Module) -> None:
    model.head.register_forward_hook(lambda *_: None)


CANNOT: dict[str, tuple[type[Between], Callable[[nn.Module], object], str]] = {
    "attribute": (Counts, lambda model: None, "changes the attribute 'calls' of a Counts"),
    "buffer": (Normed, lambda model: None, "changes the buffer .* of a BatchNorm1d"),
    "hook": (Between, hooked, "forward hooks, which would run twice"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_forwards_that_cannot_begin_anew_say_why(name: str, tmp_path: Path) -> None:
    kind, prepare, why = CANNOT[name]
    model, x = kind(Looks, Looks).train(), torch.randn(3, 40, 8)
    plan = keepless.plan(model, x, "1GiB", engine="eager")
    prepare(model)
    keepless.apply(model, plan, black_box=tmp_path)
    _, _, in_forward = forward_backward(model, x)
    with pytest.raises(keepless.OutOfMemory, match=why) as caught:
        forward_backward(model, x, in_forward - 6)
    assert caught.value.phase == "forward"
    assert caught.value.black_box == str(next(tmp_path.iterdir()))
    assert caught.value.suggested_budget == plan.smallest_budget
    assert standing(model).counters.tightened == 1


def test_a_forward_that_always_fails_ends_in_a_typed_error(
    case: tuple[nn.Module, torch.Tensor, Plan], tmp_path: Path
) -> None:
    model, x, plan = case
    keepless.apply(model, plan, black_box=tmp_path)
    expected = forward_backward(model, x)[0]
    model.zero_grad()
    torch.manual_seed(2)
    start = torch.get_rng_state()

    def full(*_: Any) -> torch.Tensor:
        raise RuntimeError(CPU_TEXT)

    model.head.__dict__["forward"], own = full, model.head.__dict__.get("forward")
    try:
        with pytest.raises(keepless.OutOfMemory, match="as little is kept already"):
            model(x)
    finally:
        del model.head.__dict__["forward"]
        if own is not None:
            model.head.__dict__["forward"] = own
    assert torch.equal(torch.get_rng_state(), start)
    assert all(p.grad is None for p in model.parameters())
    assert len(list(tmp_path.iterdir())) == 2
    assert same(forward_backward(model, x)[0], expected)
    keepless.remove(model)


def test_other_errors_and_other_backwards_pass(case: tuple[nn.Module, torch.Tensor, Plan], tmp_path: Path) -> None:
    model, x, plan = case
    model.zero_grad()
    own = torch.autograd.backward, torch.autograd.graph._engine_run_backward
    keepless.apply(model, plan, black_box=tmp_path)
    loss = model(x)["loss"]
    loss.register_hook(lambda grad: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    other = nn.Linear(3, 3)(torch.randn(2, 3)).sum()
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught, Failing(1):
        other.backward()
    assert not isinstance(caught.value, keepless.KeeplessError)
    assert not list(tmp_path.iterdir())
    keepless.remove(model)
    assert (torch.autograd.backward, torch.autograd.graph._engine_run_backward) == own
    assert torch.autograd._engine_run_backward is own[1]
