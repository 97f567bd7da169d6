"""What the meter runs in processes of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import keepless
from keepless.capture import Inputs, StepShape, flatten_inputs, lower, trace_step
from keepless.errors import InfeasibleBudget
from keepless.execute import PlannedForward, make_entry
from keepless.passes import from_order, reuse_storage


def accumulating(planned: bool, width: int = 512, layers: int = 6) -> Callable[[], Any]:
    """A step of large weights and small activations that adds to existing gradients."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.Tanh()]
    model = nn.Sequential(*parts)

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = self.inner(x).square().mean()
            return loss

    subject = Mean()
    batch = torch.randn(64, width)
    for p in subject.parameters():
        p.grad = torch.zeros_like(p)
    if planned:
        flat = flatten_inputs(Inputs.of(batch))
        traced = trace_step(subject, flat, batch=batch, loss_fn=None, grad_outputs=None)
        binding = lower(traced, flat, subject, StepShape(accumulate=True))
        program = reuse_storage(binding.graph, from_order(binding.graph, range(len(binding.graph.ops))))
        subject.__dict__["forward"] = PlannedForward(subject, [make_entry(subject, flat, binding, program)], None)

    def step() -> dict[str, float]:
        loss = subject(batch)
        loss.backward()
        return {"loss": float(loss.detach())}

    return step


def kinds_of_steps(name: str, accumulate: bool, plan_path: str = "") -> Callable[[], Any]:
    """The meter's steps are the first, the steady and an accumulating one; the last needs a plan that accumulates."""
    import zoo

    import keepless

    torch.set_num_threads(1)
    plan = keepless.load(plan_path) if plan_path else None
    if name == "weights":
        torch.manual_seed(0)
        model = nn.Sequential(*[part for _ in range(6) for part in (nn.Linear(512, 512), nn.Tanh())])
        subject = keepless.with_loss(model, lambda output, _: output.square().mean())
        x = torch.randn(64, 512)
        workload = zoo.Workload(subject, lambda _: (x, None), lambda: None)
    else:
        workload = zoo.build(name)
    trainer = zoo.Trainer(workload, "keepless", accumulate=accumulate, plan=plan)
    if not plan_path:
        return lambda: trainer.plan
    count = iter(range(1000))

    def step() -> int:
        number = next(count)
        if number < 2:
            trainer.optimizer.zero_grad()
        trainer.forward_backward(0)
        trainer.optimizer.step()
        return number

    return step


def rewritten(name: str, plan_path: str = "", seed: int = 0) -> Callable[[], Any]:
    """AdamW steps of a small model of the zoo by a saved plan; answers its loss and a digest of all parameters."""
    import zoo

    import keepless

    torch.set_num_threads(1)
    torch.manual_seed(0)
    workload = zoo.gpt2(2, 64, 4, 128, 8, vocab=8192) if name == "vocabulary" else zoo.build(name)
    optimizer = torch.optim.AdamW(workload.model.parameters(), lr=1e-3)
    if plan_path:
        keepless.apply(workload.model, keepless.load(plan_path), optimizer=optimizer)
    torch.manual_seed(seed)

    def step() -> dict[str, str]:
        optimizer.zero_grad()
        inputs, targets = workload.batch(0)
        loss = workload.loss_of(workload.forward(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        parameters = {name: zoo.digest(p) for name, p in workload.model.named_parameters()}
        return {"loss": float(loss.detach()).hex(), "parameters": zoo.digest_all(parameters)}

    return step


def fitting(kind: str, size: int, plan_path: str) -> Callable[[], Any]:
    """Steps of one of `models.SIZED` on a batch of a size, under a saved plan."""
    import models

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, make_batch, loss_fn = models.SIZED[kind]()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = make_batch(size)
    keepless.apply(model, keepless.load(plan_path), background=False)

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        inputs = Inputs.of(batch)
        output = model(*inputs.args, **inputs.kwargs)
        loss = models.loss_in(output) if loss_fn is None else loss_fn(output, batch)
        del output
        loss.backward()
        optimizer.step()
        return {"loss": float(loss.detach()), "unplanned": model.__dict__["forward"].counters.unplanned_calls}

    return step


def planning_within(kind: str, budget: int) -> Callable[[], Any]:
    """Planning alone, of a model with one op of 128 MiB, or of one that reads 64 MiB of frozen weights."""
    torch.set_num_threads(1)
    if kind == "large op":
        model: nn.Module = nn.Sequential(nn.Linear(8, 4096), nn.Tanh(), nn.Linear(4096, 1))
        batch = torch.ones(8192, 8)
    else:
        table = nn.Embedding(64, 1 << 18).requires_grad_(False)
        model, batch = nn.Sequential(table, nn.AdaptiveAvgPool1d(16), nn.Linear(16, 1)), torch.zeros(2, 1).long()
    state = sum(p.nbytes for p in model.parameters())

    def step() -> dict[str, int]:
        try:
            plan = keepless.plan(model, batch, budget, loss_fn=lambda output, _: output.mean(), cache=False)
        except InfeasibleBudget as error:
            return {"state": state, "smallest": error.smallest_budget, "told": "not run" in str(error)}
        return {"state": state, "smallest": plan.smallest_budget, "told": False}

    return step


def steps_of_optimizer(kind: str, options: dict[str, Any], plan_path: str = "") -> Callable[[], Any]:
    """Plain steps of a model of large weights under a plan, with an optimizer of torch's; without a path, the plan."""
    import keepless

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(512, 512, bias=False), nn.Tanh())])
    subject = keepless.with_loss(model, lambda output, _: output.square().mean())
    batch = torch.randn(64, 512)
    optimizer = getattr(torch.optim, kind)(subject.parameters(), **options)
    if not plan_path:
        plan = keepless.plan(subject, batch, "1GiB", optimizer=optimizer, cache=False)
        return lambda: plan
    keepless.apply(subject, keepless.load(plan_path))

    def step() -> None:
        optimizer.zero_grad()
        subject(batch).backward()
        optimizer.step()

    return step
