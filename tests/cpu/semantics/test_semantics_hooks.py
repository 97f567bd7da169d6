"""Hooks of modules and tensors around and inside a region: rows 31, 32 and 33."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rows import EQUAL_OR_REFUSED, WRONG, Checkpoint, Row, Table, batches, judge, torch_differs, train
from torch import Tensor, nn

TABLE = Table()


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 4), nn.Sigmoid())


def observed(checkpoint: Checkpoint, model: nn.Module, seen: list[Any], steps: int = 3) -> dict[str, object]:
    found = train(model, lambda x: checkpoint(model, x, use_reentrant=False).exp().sum(), batches(3, 4, count=steps))
    return {**found, "seen": seen}


@TABLE.row(31, torch=WRONG)
def forward_hooks_that_observe(checkpoint: Checkpoint) -> dict[str, object]:
    """A profiler's hooks before and after every module, the region's own included."""
    model = block()
    seen: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: seen.append(f"pre {name}"))
        module.register_forward_hook(lambda m, args, out, name=name: seen.append(f"post {name}"))
    return observed(checkpoint, model, seen)


@TABLE.row(31, torch=WRONG)
def forward_hooks_that_record_activations(checkpoint: Checkpoint) -> dict[str, object]:
    model = block()
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen.append(output.detach().clone())

    model[1].register_forward_hook(record, with_kwargs=True)
    return observed(checkpoint, model, seen)


@TABLE.row(31, torch=WRONG)
def hooks_added_and_removed_between_steps(checkpoint: Checkpoint) -> dict[str, object]:
    model = block()
    seen: list[Any] = []
    first = observed(checkpoint, model, [])
    handle = model[0].register_forward_hook(lambda m, args, out: seen.append("hook"))
    second = observed(checkpoint, model, seen)
    handle.remove()
    return {"first": first, "second": second, "third": observed(checkpoint, model, seen)}


@TABLE.row(31, torch=WRONG)
def global_forward_hook(checkpoint: Checkpoint) -> dict[str, object]:
    model = block()
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        return observed(checkpoint, model, seen)
    finally:
        handle.remove()


@TABLE.row(31)
def forward_hooks_that_replace(checkpoint: Checkpoint) -> dict[str, object]:
    """A pre-hook scales the input and a hook replaces the output (LoRA by hooks, activation steering)."""
    model = block()
    model[0].register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))
    model[1].register_forward_hook(lambda m, args, out: out.sin() + args[0] ** 2)
    return observed(checkpoint, model, [])


@TABLE.row(31, rule=EQUAL_OR_REFUSED, torch=WRONG)
def hooks_that_observe_beside_hooks_that_replace(checkpoint: Checkpoint) -> dict[str, object]:
    model = block()
    seen: list[str] = []
    model[1].register_forward_hook(lambda m, args, out: seen.append("before"))
    model[1].register_forward_hook(lambda m, args, out: out * out)
    model[1].register_forward_hook(lambda m, args, out: seen.append("after"))
    return observed(checkpoint, model, seen)


@TABLE.row(31)
def hooks_that_set_an_attribute(checkpoint: Checkpoint) -> dict[str, object]:
    """A pre-hook makes the weight that the forward reads, as hooks of reparametrisation do."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    raw = model[0].weight
    del model[0].weight
    model[0].register_parameter("raw", raw)

    def make(module: Any, args: tuple[Any, ...]) -> None:
        module.weight = torch.tanh(module.raw) * 1.5

    model[0].register_forward_pre_hook(make)
    return observed(checkpoint, model, [])


@TABLE.row(31)
def output_hook_that_masks_with_dropout(checkpoint: Checkpoint) -> dict[str, object]:
    model = block()
    model[3].register_forward_hook(lambda m, args, out: nn.functional.dropout(out, 0.4))
    return observed(checkpoint, model, [])


@TABLE.row(32)
def full_backward_hooks(checkpoint: Checkpoint) -> dict[str, object]:
    model = block()
    seen: list[Any] = []
    for name, module in model.named_modules():
        module.register_full_backward_hook(lambda m, gi, go, name=name: seen.append((name, go[0].clone())))
        module.register_full_backward_pre_hook(lambda m, go, name=name: seen.append(f"pre {name}"))

    def loss_of(x: Tensor) -> Tensor:
        return checkpoint(model, x.clone().requires_grad_(), use_reentrant=False).exp().sum()

    return {**train(model, loss_of, batches(3, 4)), "seen": seen}


@TABLE.row(32)
def full_backward_hook_that_replaces(checkpoint: Checkpoint) -> dict[str, object]:
    model = block()
    model[1].register_full_backward_hook(lambda m, gi, go: tuple(g * 2 for g in gi))
    return observed(checkpoint, model, [])


@TABLE.row(32)
def tensor_hooks(checkpoint: Checkpoint) -> dict[str, object]:
    """Hooks on an activation inside, on the region's output, on parameters before and after accumulation."""
    model = block()
    seen: list[str] = []

    def note(word: str) -> Callable[[Tensor], None]:
        return lambda tensor: seen.append(word)

    def region(x: Tensor) -> Tensor:
        h = model[0](x)
        h.register_hook(lambda g: seen.append("inside") or g * 2)  # type: ignore[func-returns-value]
        return model[1:](h).exp()

    def loss_of(x: Tensor) -> Tensor:
        y = checkpoint(region, x, use_reentrant=False)
        y.register_hook(note("output"))
        return y.sum()

    for parameter in model.parameters():
        parameter.register_hook(note("parameter"))
        parameter.register_post_accumulate_grad_hook(note("accumulated"))
    return {**train(model, loss_of, batches(3, 4)), "seen": sorted(seen)}


@TABLE.row(32)
def optimizer_in_the_backward(checkpoint: Checkpoint) -> dict[str, object]:
    """Each parameter is stepped when its gradient is complete; the regions before it are still to be recomputed."""
    blocks = nn.ModuleList(block() for _ in range(3))
    stepped = []

    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None
        stepped.append(tuple(parameter.shape))

    for parameter in blocks.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    losses = []
    for x in batches(3, 4):
        for layer in blocks:
            x = checkpoint(layer, x, use_reentrant=False)
        loss = x.square().sum()
        loss.backward()
        losses.append(loss.detach())
    return {"losses": losses, "stepped": stepped, "parameters": [p.detach().clone() for p in blocks.parameters()]}


@TABLE.row(33)
def hook_of_a_shared_parameter(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(4, 4)
    seen: list[Tensor] = []
    layer.weight.register_hook(lambda g: seen.append(g.clone()))

    def loss_of(x: Tensor) -> Tensor:
        for _ in range(3):
            x = checkpoint(lambda t: torch.sin(layer(t)), x, use_reentrant=False)
        return x.sum()

    return {**train(layer, loss_of, batches(3, 4)), "seen": seen}


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)
