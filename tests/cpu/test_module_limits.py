"""Plans of module calls at their limits: odd models, errors, and what planning must leave as it was."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from module_nets import WIDTH, Block, DrawsForces, Net, assert_same, made, sequences, smallest_and_largest, trained
from torch import nn

import keepless
from keepless.errors import (
    CaptureError,
    InfeasibleBudget,
    LossError,
    MeasureError,
    ParameterError,
    PlanError,
    SolverError,
)


def test_what_cannot_be_planned_is_refused() -> None:
    model, batch = made(Net), sequences()
    with pytest.raises(ParameterError, match="engine"):
        keepless.plan(model, batch, "1GiB", engine="nothing")
    with pytest.raises(SolverError, match="module calls"):
        keepless.plan(model, batch, "1GiB", engine="eager", solver="rotor")
    with torch.device("meta"):
        meta = Net()
    with pytest.raises(CaptureError, match="meta"):
        keepless.plan(meta, batch, "1GiB", engine="eager")
    frozen = made(Net).requires_grad_(False)
    with pytest.raises(ParameterError, match="gradient"):
        keepless.plan(frozen, batch, "1GiB", engine="eager")

    class Fickle(Net):
        turns = iter(range(1000))

        def body(self, x: torch.Tensor) -> torch.Tensor:
            return super().body(x) if next(self.turns) % 2 == 0 else self.blocks[0](x)

    with pytest.raises(MeasureError, match="same module calls"):
        keepless.plan(made(Fickle), batch, "1GiB", engine="eager")


def test_an_error_in_the_forward_leaves_the_model_as_it_was() -> None:
    class Broken(Net):
        def body(self, x: torch.Tensor) -> torch.Tensor:
            x = super().body(x)
            raise RuntimeError("broken here")

    model = made(Broken)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken here"):
        keepless.plan(model, sequences(), "1GiB", engine="eager")
    assert torch.equal(torch.get_rng_state(), state)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_what_makes_another_kind_of_step_is_planned_on_the_spot() -> None:
    class Turns(Net):
        def forward(
            self, x: torch.Tensor, y: torch.Tensor, turns: int = 1, scale: float = 1.0
        ) -> dict[str, torch.Tensor]:
            for _ in range(turns - 1):
                x = self.body(x)
            return super().forward(x * scale, y)

    x, y = sequences()
    model = made(Turns)
    model.blocks.requires_grad_(False)
    high = keepless.plan(model, (x, y), "1GiB", engine="eager").baseline_peak
    keepless.fit(model, (x, y), high, engine="eager")
    planned = model.__dict__["forward"]
    model(x, y)
    assert planned.planned_on_the_spot == 0
    model(x, y, turns=3)
    assert planned.planned_on_the_spot == 1
    model(x, y, scale=0.5)
    model(x, y, scale=0.25)
    assert planned.planned_on_the_spot == 2  # floats are one kind
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x, y)
    assert planned.planned_on_the_spot == 3
    model.requires_grad_(True)
    with pytest.raises(InfeasibleBudget, match="plan of its own"):
        model(x, y)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model(x, y)
    assert planned.planned_on_the_spot == 3


def test_a_model_that_calls_itself_is_one_forward() -> None:
    class Recursive(Net):
        def forward(self, x: torch.Tensor, y: torch.Tensor, depth: int = 2) -> dict[str, torch.Tensor]:
            return self(self.body(x), y, depth - 1) if depth else super().forward(x, y)

    model, batch = made(Recursive), sequences()
    low, _ = smallest_and_largest(model, batch)
    keepless.fit(model, batch, low, engine="eager")
    assert_same(trained(made(Recursive), [batch]), trained(model, [batch]))
    assert model.__dict__["forward"].planned_on_the_spot == 0


def test_a_forward_that_differentiates_goes_on_with_its_own_calls() -> None:
    class Twice(DrawsForces):
        def body(self, x: torch.Tensor) -> torch.Tensor:
            return Net.body(self, super().body(x))

    model, batch = made(Twice), sequences()
    low, _ = smallest_and_largest(model, batch)
    plan = keepless.plan(model, batch, low, engine="eager")
    found = keepless.verify(model, batch, plan, repeats=1)
    assert found.equal
    assert found.measured_peak <= low
    assert_same(trained(made(Twice), [batch]), trained(keepless.apply(model, plan), [batch]))


def test_planning_ends_where_the_graph_of_the_caller_begins() -> None:
    encoder, model = nn.Linear(WIDTH, WIDTH), made(Net)
    x, y = sequences()
    keepless.fit(model, (x, y), "1GiB", engine="eager")
    hidden = encoder(x)
    keepless.plan(model, (hidden, y), "1GiB", engine="eager")
    loss = model(hidden, y)["loss"]
    assert model.__dict__["forward"].planned_on_the_spot == 1
    assert encoder.weight.grad is None
    loss.backward()
    assert encoder.weight.grad is not None


def test_planning_leaves_the_batch_and_what_attributes_hold() -> None:
    class Notes:
        def __init__(self) -> None:
            self.count, self.sums = 0, [[0.0]]

    class Changing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.notes, self.cache = Notes(), {"mean": torch.zeros(WIDTH), "all": []}
            self.array = np.zeros(2)
            self.register_buffer("wide", torch.zeros(1).expand(WIDTH))

        def body(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            self.notes.count += 1
            self.notes.sums[0][0] += 1
            self.cache["mean"].add_(1)
            self.cache["all"].append(1)
            self.array += 1
            return super().body(x) + self.wide

    model, (x, y) = made(Changing), sequences()
    before = x.clone()
    keepless.plan(model, (x, y), "1GiB", engine="eager")
    assert torch.equal(x, before)
    assert (model.notes.count, model.notes.sums) == (0, [[0.0]])
    assert model.cache["all"] == []
    assert not model.cache["mean"].any()
    assert not model.array.any()


def test_planning_steps_no_optimizer_in_the_backward() -> None:
    model, batch = made(Net), sequences()
    optimizers = {p: torch.optim.SGD([p], lr=1.0) for p in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    first, *rest = model.parameters()
    handles = [p.register_post_accumulate_grad_hook(step) for p in rest]
    before = copy.deepcopy(model.state_dict())
    plan = keepless.plan(model, batch, "1GiB", engine="eager")
    keepless.verify(model, batch, plan, repeats=1)
    assert_same(before, model.state_dict())
    assert first._post_accumulate_grad_hooks is None
    model(*batch)["loss"].backward()
    assert not torch.equal(before["head.bias"], model.head.bias)
    for handle in handles:
        handle.remove()


def test_a_loss_that_is_not_found_is_named() -> None:
    class Output:
        pass

    for output in ({"logits": 1}, {"loss": None}, (), Output()):

        class Other(Net):
            given = output

            def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
                super().forward(x, y)
                return self.given

        with pytest.raises(LossError, match="loss_fn"):
            keepless.plan(made(Other), sequences(), "1GiB", engine="eager")


def test_planning_needs_no_grad_mode_of_the_caller() -> None:
    model, batch = made(Net), sequences()
    with torch.no_grad():
        plan = keepless.plan(model, batch, "1GiB", engine="eager")
        assert keepless.verify(model, batch, plan, repeats=1).equal


def test_calls_that_cannot_be_recomputed_are_no_regions() -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.relu(self.up(F.relu(x))))

    class InPlace(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.adding = nn.ModuleList(Adding() for _ in range(5))

        def body(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(super().body(x))
            for block in self.adding:
                x += block(x)  # which a recompute of the block would need as it was
            return x

    model, batch = made(InPlace), sequences()
    low, high = smallest_and_largest(model, batch)
    assert low < high
    plan = keepless.plan(model, batch, low, engine="eager")
    assert plan.num_replays > 0
    assert_same(trained(made(InPlace), [batch]), trained(keepless.apply(model, plan), [batch]))


def test_outputs_that_are_objects() -> None:
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor

    class Gives(Net):
        def forward(self, x: torch.Tensor) -> Output:  # type: ignore[override]
            return Output(self.head(self.body(x)))

    def loss_fn(output: Output, _: Any) -> torch.Tensor:
        return output.logits.square().mean()

    model, x = made(Gives), sequences()[0]
    keepless.fit(model, x, "1GiB", engine="eager", loss_fn=loss_fn)
    loss_fn(model(sequences(2)[0]), None).backward()
    assert model.__dict__["forward"].planned_on_the_spot == 1


@pytest.mark.slow
def test_modules_nested_deeply_are_planned_in_time() -> None:
    class Nested(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.block = Block()
            self.inner = Nested(depth - 1) if depth else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.block(x))

    class Deep(Net):
        def __init__(self) -> None:
            super().__init__(1)
            self.nested = Nested(12)

        def body(self, x: torch.Tensor) -> torch.Tensor:
            return self.nested(x)

    model, batch = made(Deep), sequences(1)
    begin = time.perf_counter()
    low, _ = smallest_and_largest(model, batch)
    assert time.perf_counter() - begin < 60  # it took three times as long with each level
    keepless.fit(model, batch, low, engine="eager")
    assert_same(trained(made(Deep), [batch]), trained(model, [batch]))


@pytest.mark.parametrize("engine", ["graph", "blocks", "eager"])
def test_a_refusal_lets_the_batch_go(engine: str, no_gc: None) -> None:
    """At once, not when Python collects: on a full card that may never come."""
    model, batch = made(Net), sequences()
    seen = weakref.ref(batch[0])
    with contextlib.suppress(InfeasibleBudget):
        keepless.plan(model, batch, 4096, engine=engine, cache=False)
    del batch
    assert seen() is None


def test_modules_nested_too_deeply_for_python_are_refused() -> None:
    class Nested(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.inner = Nested(depth - 1) if depth else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(torch.tanh(self.linear(x)))

    model, x = made(lambda: Nested(150)), sequences()[0]
    with pytest.raises(MeasureError, match="setrecursionlimit"):
        keepless.plan(model, x, "1GiB", engine="eager", loss_fn=lambda output, _: output.mean())
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_damaged_description_of_the_batch_is_refused() -> None:
    model, batch = made(Net), sequences()
    plan = keepless.plan(model, batch, "1GiB", engine="eager")
    for arguments in ([[1]], [None, None], [3.5]):
        other = copy.copy(plan)
        other.signature = {**plan.signature, "arguments": arguments}
        with pytest.raises(PlanError):
            keepless.apply(model, other)
        assert "forward" not in model.__dict__


def test_what_a_first_forward_registers_is_taken_out_again() -> None:
    class Grows(Net):
        def body(self, x: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "extra"):
                self.extra = nn.Linear(WIDTH, WIDTH)
            return super().body(self.extra(x))

    model = made(Grows)
    keepless.plan(model, sequences(), "1GiB", engine="eager")
    assert not hasattr(model, "extra")


def test_lazy_parameters_are_refused() -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = nn.LazyLinear(3)

    with pytest.raises(CaptureError, match="lazy"):
        keepless.plan(made(Lazy), sequences(), "1GiB", engine="eager")


def test_a_part_of_a_planned_model_has_no_plan_of_its_own() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.net = nn.Linear(WIDTH, WIDTH), Net()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return self.net(self.first(x), y)

    model, batch = made(Outer), sequences()
    lows = {one: smallest_and_largest(one, batch)[0] for one in (model, model.net)}
    plans = {one: keepless.plan(one, batch, low, engine="eager") for one, low in lows.items()}
    for one, other, words in ((model.net, model, "plan of its own"), (model, model.net, "model around it")):
        keepless.apply(one, plans[one])
        with pytest.raises(PlanError, match=words):
            keepless.plan(other, batch, "1GiB", engine="eager")
        with pytest.raises(PlanError, match=words):
            keepless.apply(other, plans[other])
        keepless.remove(one)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_forward_that_changes_modes_is_planned_as_it_begins() -> None:
    class Evaluates(Net):
        def body(self, x: torch.Tensor) -> torch.Tensor:
            self.blocks[0].eval()
            return super().body(x)

    model, batch = made(Evaluates), sequences()
    keepless.fit(model, batch, smallest_and_largest(model, batch)[0], engine="eager")
    assert model.blocks[0].training
    assert_same(trained(made(Evaluates), [batch]), trained(model, [batch]))


@pytest.mark.slow
def test_a_number_that_changes_with_each_step_is_planned_for_a_few_times_only() -> None:
    class Counted(Net):
        def forward(self, x: torch.Tensor, y: torch.Tensor, step: int = 0, repeats: int = 1) -> Any:  # type: ignore[override]
            for _ in range(repeats):
                x = x * (1 + 0 * step)
                found = super().forward(x, y)
            return found

    model, (x, y) = made(Counted), sequences()
    low, high = smallest_and_largest(model, (x, y))
    keepless.fit(model, (x, y), (low + high) // 2, engine="eager")
    planned = model.__dict__["forward"]
    for step in range(8):
        model.zero_grad()
        model(x, y, step=step)["loss"].backward()
    assert planned.planned_on_the_spot == 3
    model.zero_grad()
    with pytest.raises(InfeasibleBudget):
        model(*sequences(64), step=100)


class KeepsAGradient(nn.Module):
    """Asks for the gradient of an activation, and holds that; without gradients its forward fails."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 1)
        self.hidden: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A scalar loss."""
        hidden = torch.tanh(self.first(x))
        hidden.retain_grad()
        self.hidden = hidden
        loss: torch.Tensor = self.last(hidden).square().mean()
        return loss


def test_a_forward_that_needs_gradients_is_planned() -> None:
    """What it changes is looked for in a forward without gradients, and where that fails in one with them."""
    torch.manual_seed(0)
    plain = KeepsAGradient()
    subject = KeepsAGradient()
    subject.load_state_dict(plain.state_dict())
    x = torch.randn(16, 8)
    subject = keepless.fit(subject, x, "1GiB", engine="eager", cache=False)
    for model in (plain, subject):
        model(x).backward()
    assert plain.hidden is not None
    assert subject.hidden is not None
    assert plain.hidden.grad is not None
    assert subject.hidden.grad is not None
    assert torch.equal(plain.hidden.grad, subject.hidden.grad)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), subject.parameters(), strict=True))
