"""The optimizer in the backward: the same weights bit for bit, less memory, and everything that it refuses."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import zoo
from torch import nn
from update_steps import PLENTY, REWRITES, different, train

import keepless
from keepless.capture import UPDATE
from keepless.control.works import works_of
from keepless.errors import ProgramError, RewriteError, StepError
from keepless.ir import Effect, Graph, Kind, Phase
from keepless.machine import verify
from keepless.measure import measure_peak, optimizer_footprint, optimizer_updates
from keepless.passes import from_order
from keepless.reporting.account import Homes
from keepless.reporting.steps import predicted_steps

optim = torch.optim


def tied() -> tuple[nn.Module, Any]:
    ids = torch.randint(0, 23, (3, 8))
    return models.TinyLM(), {"ids": ids, "labels": ids}


def norms() -> tuple[nn.Module, Any]:
    return models.convnet(), torch.randn(4, 3, 12, 12)


def dropouts() -> tuple[nn.Module, Any]:
    return models.mlp(), torch.randn(5, 8)


def twice() -> tuple[nn.Module, Any]:
    return models.Shared(), torch.randn(2, 6)


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    return optim.AdamW([{"params": params[:2], "weight_decay": 0.5}, {"params": params[2:], "lr": 3e-3}])


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=1e-2)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda m: optim.AdamW(m.parameters()),
    "foreach adamw": lambda m: optim.AdamW(m.parameters(), foreach=True),
    "fused adamw": lambda m: optim.AdamW(m.parameters(), fused=True),
    "amsgrad": lambda m: optim.Adam(m.parameters(), amsgrad=True, foreach=True),
    "momentum": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "fused momentum": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "rmsprop": lambda m: optim.RMSprop(m.parameters(), centered=True),
    "adafactor": lambda m: optim.Adafactor(m.parameters()),
    "tensor lr": lambda m: optim.AdamW(m.parameters(), lr=torch.tensor(1e-3)),
    "two groups": two_groups,
}


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        *((kind, dropouts) for kind in OPTIMIZERS),
        *((kind, make) for kind in ("adamw", "momentum") for make in (tied, norms)),
    ],
    ids=lambda item: getattr(item, "__name__", item),
)
def test_weights_are_the_plain_loops(kind: str, make: Callable[[], tuple[nn.Module, Any]]) -> None:
    """Five steps at the smallest budget: weights, states, buffers, losses and the generator are the same bits."""
    torch.manual_seed(0)
    model, batch = make()
    twin = copy.deepcopy(model)
    expected = train(twin, batch, OPTIMIZERS[kind](twin))
    optimizer = OPTIMIZERS[kind](model)
    smallest = keepless.plan(model, batch, PLENTY, optimizer=optimizer, rewrites=REWRITES, solver="recompute_all")
    plan = keepless.plan(model, batch, smallest.smallest_budget, optimizer=optimizer, rewrites=REWRITES)
    assert any(op.name == UPDATE for op in plan.graph.ops)
    keepless.apply(model, plan, optimizer=optimizer)
    assert different(train(model, batch, optimizer), expected) == []


def test_parameters_without_gradients_stay() -> None:
    """Unused and frozen parameters; a layer that is used twice is updated once, by the whole gradient."""
    torch.manual_seed(0)
    model, batch = twice()
    twin = copy.deepcopy(model)
    expected = train(twin, batch, optim.SGD(twin.parameters(), lr=1e-3, momentum=0.9))
    optimizer = optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    keepless.fit(model, batch, PLENTY, optimizer=optimizer, rewrites=REWRITES)
    assert different(train(model, batch, optimizer), expected) == []


def test_muon_steps_matrix_by_matrix() -> None:
    """Its update of a matrix reads nothing of the others."""
    torch.manual_seed(0)
    model = models.Loss(nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 6, bias=False)))
    batch = torch.randn(5, 8)
    twin = copy.deepcopy(model)
    expected = train(twin, batch, muon(twin))
    optimizer = muon(model)
    keepless.fit(model, batch, PLENTY, optimizer=optimizer, rewrites=REWRITES)
    assert different(train(model, batch, optimizer), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", pytest.param("resnet50", marks=pytest.mark.exhaustive)])
def test_measured_peak_is_below_any_plans_without(name: str, tmp_path: Path) -> None:
    """Whole steps in a process of their own stay within a budget that is infeasible without the rewrite."""
    workload = zoo.build(name)
    options: dict[str, Any] = {"optimizer": optim.AdamW(workload.model.parameters(), lr=1e-3), "release_outputs": True}
    without = workload.plan(PLENTY, **options).smallest_budget
    smallest = workload.plan(PLENTY, rewrites=REWRITES, **options).smallest_budget
    assert smallest < without
    plan = workload.plan(smallest, rewrites=REWRITES, **options)
    path = tmp_path / "step.plan"
    plan.save(path)
    plain = measure_peak("targets:rewritten", {"name": name}, steps=3)
    found = measure_peak("targets:rewritten", {"name": name, "plan_path": str(path)}, steps=3)
    assert found.result == plain.result
    assert found.peak <= smallest < plain.peak
    assert plan.predicted_peak == pytest.approx(found.peak, rel=0.01)
    steps = predicted_steps(plan)
    assert steps["first"].peak == pytest.approx(found.peaks[0], rel=0.01)
    assert steps["steady"].peak == pytest.approx(found.peaks[1], rel=0.01)


# ---- no order of the graph reads a parameter after its update


def demanded(graph: Graph, rng: random.Random) -> list[int]:
    """An order that forgets a random part of the forward's values, and makes again what the backward asks for."""
    forward = [op for op in graph.ops if op.phase is Phase.FORWARD and op.can_replay]
    maker = {v: op for op in forward for v in op.outputs if v not in graph.pinned}
    gone = {v for v in maker if rng.random() < rng.choice((0.3, 1.0))}
    order: list[int] = []
    for op in graph.ops:
        if op.phase is not Phase.BACKWARD:
            order.append(op.id)
            continue
        again: set[int] = set()

        def ask(value: int, again: set[int] = again) -> None:
            if value in gone and value in maker and maker[value].id not in again:
                again.add(maker[value].id)
                for read in maker[value].inputs:
                    ask(read)

        for value in op.inputs:
            ask(value)
        order += [*sorted(again), op.id]
    return order


@pytest.mark.parametrize("make", [tied, norms, dropouts, twice], ids=lambda make: make.__name__)
def test_whatever_is_forgotten_no_replay_needs_an_updated_parameter(
    make: Callable[[], tuple[nn.Module, Any]],
) -> None:
    """Orders that recompute from the inputs on, op for op, keep rule R3."""
    model, batch = make()
    _, binding = models.capture(model, batch, has_optimizer=True, rewrites=REWRITES)
    graph = binding.graph
    assert sum(Effect.UPDATE in op.effects for op in graph.ops) == sum(isinstance(n, str) for n, _ in binding.grads)
    replays = 0
    for seed in range(20):
        program = from_order(graph, demanded(graph, random.Random(seed)))
        verify(graph, program)
        replays += program.num_replays
    assert replays > 50


class Gate(torch.autograd.Function):
    """Its backward reads a value that was made from a weight, after that weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_weight = x.t() @ grad
        return grad @ weight.t(), of_weight * 2


class LateReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Gate.apply(self.first(x).tanh(), self.weight).square().mean()  # type: ignore[no-any-return,no-untyped-call]


def test_updates_wait_for_a_late_reader() -> None:
    """Where a weight's own gradient comes before its last reader, the update comes after that."""
    torch.manual_seed(0)
    model, batch = LateReader(), torch.randn(4, 6)
    _, binding = models.capture(model, batch, has_optimizer=True, rewrites=REWRITES)
    graph = binding.graph
    weight = next(v.id for v in graph.values if v.name == "weight")
    update = next(op for op in graph.ops if Effect.UPDATE in op.effects and weight in op.inputs)
    assert update.id > max(op.id for op in graph.ops if weight in op.inputs and op is not update)
    twin = copy.deepcopy(model)
    expected = train(twin, batch, optim.AdamW(twin.parameters()))
    optimizer = optim.AdamW(model.parameters())
    keepless.fit(model, batch, PLENTY, optimizer=optimizer, rewrites=REWRITES)
    assert different(train(model, batch, optimizer), expected) == []


def test_a_program_that_reads_an_updated_parameter_is_refused() -> None:
    """Rule R3, on programs in which one forward op runs again after everything."""
    model, batch = dropouts()
    _, binding = models.capture(model, batch, has_optimizer=True, rewrites=REWRITES)
    graph = binding.graph
    caught = 0
    for op in graph.ops:
        reads = any(graph.values[v].kind is Kind.PARAM for v in op.inputs)
        if op.phase is Phase.FORWARD and op.can_replay and reads:
            program = from_order(graph, [*range(len(graph.ops)), op.id])
            with pytest.raises(ProgramError, match="was updated before") as found:
                verify(graph, program)
            assert found.value.rule == "R3"
            caught += 1
    assert caught >= 3


# ---- plans, files, other shapes


def test_plan_file_and_other_shapes(tmp_path: Path) -> None:
    """A saved plan says so, steps the optimizer it is given, and other batches are updated in the backward, too."""
    torch.manual_seed(0)
    model, batch = dropouts()
    twin, other = copy.deepcopy(model), torch.randn(9, 8)
    optimizer = optim.AdamW(model.parameters())
    plan = keepless.plan(model, batch, 1 << 20, optimizer=optimizer, rewrites=REWRITES)
    assert "rewrite optimizer_in_backward (same bits)" in str(plan)
    plan.save(tmp_path / "step.plan")
    loaded = keepless.load(tmp_path / "step.plan")
    assert loaded.rewrites == plan.rewrites == REWRITES
    keepless.apply(model, loaded, optimizer=optimizer)
    plain = optim.AdamW(twin.parameters())
    for given in (batch, other, batch, other):
        assert different(train(model, given, optimizer, 2), train(twin, given, plain, 2)) == []
    assert model.forward.counters.captures == 1


def test_remove_takes_hooks_out() -> None:
    """Afterwards gradients stand until the optimizer's step, and a later plan may step another optimizer."""
    model, batch = dropouts()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    plan = keepless.plan(model, batch, 1 << 20, optimizer=optimizer, rewrites=REWRITES)
    keepless.apply(model, plan, optimizer=optimizer)
    keepless.apply(model, plan, optimizer=optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    keepless.remove(model)
    model(batch).backward()
    assert all(p.grad is not None and torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.slow
def test_verify_does_not_step() -> None:
    """Gradients are compared, the peak is measured without them, and a plan that stood stands again."""
    model, batch = tied()
    optimizer = optim.AdamW(model.parameters())
    plan = keepless.plan(model, batch, 1 << 20, optimizer=optimizer, rewrites=REWRITES)
    keepless.apply(model, plan, optimizer=optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    found = keepless.verify(model, batch, plan)
    assert found.equal
    assert abs(found.prediction_error) < 0.05
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    models.loss_in(model(**batch)).backward()
    assert all(p.grad is None for p in model.parameters())
    assert not all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
def test_curve_has_rewritten_plans() -> None:
    """A curve of the rewritten step begins below the plain one's."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(200, 200), nn.Tanh())]
    model, batch = models.Loss(nn.Sequential(*layers)), torch.randn(5, 200)
    options: dict[str, Any] = {"points": 2, "strategies": (), "optimizer": optim.AdamW(model.parameters())}
    plain = keepless.curve(model, batch, **options)
    rewritten = keepless.curve(model, batch, rewrites=REWRITES, **options)
    assert rewritten.smallest_budget < plain.smallest_budget
    assert rewritten.plan(rewritten.smallest_budget).rewrites == REWRITES


# ---- refusals


class Normed(optim.SGD):
    """Clips by the norm of all gradients."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if grads:
            norm = torch.stack([g.norm() for g in grads]).norm()
            for grad in grads:
                grad.div_(norm)
        super().step()


class Counting(optim.SGD):
    """Counts its steps, and slows down by them."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        super().step()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rewrites": ("shorter",)}, "no rewrite 'shorter'. Rewrites: optimizer_in_backward, chunked_loss"),
        ({"rewrites": "optimizer_in_backward"}, "no sequence of names"),
        ({"rewrites": REWRITES, "optimizer": None}, "give it, as optimizer="),
        ({"rewrites": REWRITES, "accumulate": True}, "adds to gradients"),
        ({"rewrites": REWRITES, "engine": "eager"}, "engine='eager'"),
        ({"rewrites": REWRITES, "land": True}, "cannot be landed"),
        ({"rewrites": REWRITES, "optimizer": lambda m: optim.SGD([m.module[0].weight])}, "5 trainable parameters"),
        ({"rewrites": REWRITES, "optimizer": lambda m: Normed(m.parameters())}, "needs all gradients"),
        ({"rewrites": REWRITES, "optimizer": lambda m: Counting(m.parameters())}, "the option count"),
    ],
)
def test_what_is_refused(options: dict[str, Any], match: str) -> None:
    """Each refusal says why, and nothing has changed."""
    model, batch = dropouts()
    maker = options.get("optimizer", lambda m: optim.SGD(m.parameters()))
    generator = torch.get_rng_state()
    with pytest.raises(RewriteError, match=match):
        keepless.plan(model, batch, 1 << 20, **{**options, "optimizer": maker(model) if maker else None})
    assert "forward" not in model.__dict__
    assert torch.equal(generator, torch.get_rng_state())


def test_a_model_that_is_not_captured_is_refused() -> None:
    """Blocks and module calls cannot be rewritten; the reason is that of the capture."""

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x).mean()
            return y if y.item() > 0 else -y

    model = Looks()
    with pytest.raises(RewriteError, match="cannot be captured"):
        keepless.plan(model, torch.randn(2, 8), PLENTY, optimizer=optim.SGD(model.parameters()), rewrites=REWRITES)


def test_apply_needs_the_optimizer() -> None:
    """None, one of another class, and one of other parameters are refused; nothing is put in."""
    model, batch = dropouts()
    plan = keepless.plan(model, batch, 1 << 20, optimizer=optim.SGD(model.parameters()), rewrites=REWRITES)
    with pytest.raises(RewriteError, match="give it to apply"):
        keepless.apply(model, plan)
    with pytest.raises(RewriteError, match="the optimizer SGD, and Adam is given"):
        keepless.apply(model, plan, optimizer=optim.Adam(model.parameters()))
    with pytest.raises(RewriteError, match="does not have it"):
        keepless.apply(model, plan, optimizer=optim.SGD(list(model.parameters())[:1]))
    assert "forward" not in model.__dict__
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_accumulation_is_seen_before_a_second_update() -> None:
    """Two backwards without a step: the second raises, and has updated nothing."""
    model, batch = dropouts()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    keepless.fit(model, batch, 1 << 20, optimizer=optimizer, rewrites=REWRITES)
    model(batch).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(StepError, match=r"second gradient since the last optimizer.step"):
        model(batch).backward()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_standing_gradients_are_refused() -> None:
    """Gradients that stand when the forward begins have no room in such a plan."""
    model, batch = dropouts()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    keepless.fit(model, batch, 1 << 20, optimizer=optimizer, rewrites=REWRITES)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RewriteError, match="stand already"):
        model(batch)


def test_a_kept_graph_is_not_replayed_after_updates() -> None:
    """A second backward through the same step would use new weights: it is an error, as in eager."""
    model, batch = dropouts()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    keepless.fit(model, batch, 1 << 20, optimizer=optimizer, rewrites=REWRITES)
    loss = model(batch)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(StepError, match="has changed since the forward"):
        loss.backward()


@pytest.mark.parametrize("kind", ["adamw", "foreach adamw", "fused adamw", "adafactor", "momentum"])
def test_temporaries_of_one_update(kind: str) -> None:
    """What one parameter's update takes is what a step of an optimizer of that parameter alone takes."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 300))
    optimizer = OPTIMIZERS[kind](model)
    whole = optimizer_footprint(optimizer)
    updates = optimizer_updates(optimizer, dict(model.named_parameters()), whole)
    for name, param in model.named_parameters():
        alone = optimizer_footprint(OPTIMIZERS[kind](nn.ParameterList([param])))
        assert updates[name].scratch_nbytes == alone.scratch_nbytes
    assert max(u.scratch_nbytes for u in updates.values()) <= whole.scratch_nbytes


@pytest.mark.slow
def test_accounts_and_work_know_updates() -> None:
    """A gradient belongs to its parameter's block, and an update moves its share of the optimizer's state."""
    model, batch = tied()
    optimizer = optim.AdamW(model.parameters())
    plan = keepless.plan(model, batch, 1 << 20, optimizer=optimizer, rewrites=REWRITES)
    graph, homes = plan.graph, Homes(plan.graph, plan.signature)
    whole = optimizer_footprint(optimizer)
    footprint = replace(whole, updates=optimizer_updates(optimizer, dict(model.named_parameters()), whole))
    _, binding = models.capture(model, batch, has_optimizer=True, rewrites=REWRITES)
    works = works_of(binding, optimizer=footprint)
    moved = 0
    for op in graph.ops:
        if op.name == UPDATE:
            (gradient,) = (v for v in op.inputs if graph.values[v].kind is Kind.GRAD)
            (param,) = (v for v in op.inputs if graph.values[v].kind is Kind.PARAM)
            assert homes.shares(gradient) == homes.shares(param)
            assert works[op.id].scratch == footprint.updates[graph.values[param].name].scratch_nbytes
            moved += works[op.id].written - 2 * works[op.id].scratch - graph.values[param].nbytes
    assert moved == pytest.approx(whole.state_nbytes, rel=0.01)


@pytest.mark.parametrize("where", ["before", "after", "twice"])
def test_gradients_from_elsewhere_count(where: str) -> None:
    """A penalty on weights in the loop, or a second call, in the same backward: an update waits for all parts."""
    torch.manual_seed(0)
    model, batch = dropouts()
    twin, other = copy.deepcopy(model), torch.randn(5, 8)

    def run(one: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        torch.manual_seed(5)
        for _ in range(3):
            optimizer.zero_grad()
            penalty = torch.zeros(())
            if where == "before":
                penalty = sum((p.square().sum() for p in one.parameters()), penalty)
            loss = one(batch)
            if where == "after":
                penalty = sum((p.square().sum() for p in one.parameters()), penalty)
            if where == "twice":
                penalty = one(other)
            (loss + 0.1 * penalty).backward()
            optimizer.step()
        return [p.detach().clone() for p in one.parameters()]

    expected = run(twin, optim.AdamW(twin.parameters()))
    optimizer = optim.AdamW(model.parameters())
    keepless.fit(model, batch, 1 << 20, optimizer=optimizer, rewrites=REWRITES)
    assert all(models.same_bits(a, b) for a, b in zip(run(model, optimizer), expected, strict=True))
    assert model.forward.counters.steps == (6 if where == "twice" else 3)
