"""In-place changes, and lists that a region appends to: rows 17, 18, 19, 21 and 36."""

from __future__ import annotations

import torch
from rows import (
    EQUAL_OR_REFUSED,
    RAISES,
    REFUSES,
    WRONG,
    Checkpoint,
    Row,
    Table,
    attempt,
    batches,
    judge,
    torch_differs,
    train,
)
from torch import Tensor, nn

TABLE = Table()


@TABLE.row(17)
def inplace_on_activations(checkpoint: Checkpoint) -> dict[str, object]:
    block = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.ELU(inplace=True)
    )

    def region(x: Tensor) -> Tensor:
        h = block(x)
        h = h * 2
        h[:, 0] = x[:, 1]
        return h.add_(x).clamp_(min=-1).sigmoid_()

    return train(block, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(2, 3, 5, 5))


@TABLE.row(18, torch=REFUSES)
def inplace_relu_at_the_boundary(checkpoint: Checkpoint) -> dict[str, object]:
    """The block before gives its output to a region that begins with an in-place ReLU."""
    stem = nn.Conv2d(3, 4, 3, padding=1)
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.2))
    model = nn.ModuleList([stem, block])
    return train(model, lambda x: checkpoint(block, stem(x), use_reentrant=False).square().sum(), batches(2, 3, 5, 5))


@TABLE.row(18, torch=REFUSES, recomputes=None)
def inplace_relu_at_the_boundary_once(checkpoint: Checkpoint) -> dict[str, object]:
    stem = nn.Linear(4, 4)
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    model = nn.ModuleList([stem, block])
    return train(
        model, lambda x: checkpoint(block, stem(x), use_reentrant=False).square().sum(), batches(2, 4, count=1)
    )


@TABLE.row(18, rule=EQUAL_OR_REFUSED, torch=REFUSES, recomputes=None)
def caller_sees_the_change(checkpoint: Checkpoint) -> dict[str, object]:
    """The caller goes on with the input that the region changed, as a residual after an in-place ReLU does."""
    stem = nn.Linear(4, 4)
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    model = nn.ModuleList([stem, block])

    def loss_of(x: Tensor) -> Tensor:
        h = stem(x)
        return (checkpoint(block, h, use_reentrant=False) + h).square().sum()

    return train(model, loss_of, batches(3, 4))


@TABLE.row(18, rule=EQUAL_OR_REFUSED, torch=REFUSES, recomputes=None)
def scratch_without_gradient_is_changed(checkpoint: Checkpoint) -> dict[str, object]:
    """A buffer given as an argument is written in the region, and the caller reads it afterwards."""
    layer = nn.Linear(4, 4)
    seen = []

    def region(x: Tensor, total: Tensor) -> Tensor:
        h = layer(x)
        total.add_(h.detach().sum())
        return torch.sin(h * total.clone())

    def loss_of(x: Tensor) -> Tensor:
        total = torch.ones(())
        loss = checkpoint(region, x, total, use_reentrant=False).sum()
        seen.append(total)
        return loss

    return {**train(layer, loss_of, batches(3, 4)), "seen": seen}


@TABLE.row(19, rule=RAISES)
def input_changed_after_the_region(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(4, 4)
    x = layer(torch.ones(3, 4))
    y = checkpoint(lambda t: torch.sin(t).exp(), x, use_reentrant=False)
    x.mul_(2)
    attempt((y.sum() + x.sum()).backward, layer)
    return {"gradient": layer.weight.grad}


@TABLE.row(19, rule=RAISES)
def data_input_changed_after_the_region(checkpoint: Checkpoint) -> dict[str, object]:
    """A batch without gradient is written over before the backward, as a loader with one pinned buffer may do."""
    layer = nn.Linear(4, 4)
    batch = torch.ones(3, 4)
    y = checkpoint(lambda t: torch.sin(layer(t)), batch, use_reentrant=False)
    batch.fill_(2)
    attempt(y.sum().backward, layer)
    return {"gradient": layer.weight.grad}


@TABLE.row(19)
def unsaved_output_changed_after_the_region(checkpoint: Checkpoint) -> dict[str, object]:
    """Plain autograd saves neither of these; the change is allowed there."""
    layer = nn.Linear(4, 4)

    def loss_of(x: Tensor) -> Tensor:
        y = checkpoint(lambda t: layer(torch.sin(layer(t))), x, use_reentrant=False)
        y.mul_(3).add_(1)
        return y.sum()

    return train(layer, loss_of, batches(3, 4))


@TABLE.row(21, rule=EQUAL_OR_REFUSED, torch=REFUSES)
def memory_of_the_base_of_an_input_changed(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)

    def region(row: Tensor) -> Tensor:
        base: Tensor = row._base  # type: ignore[assignment]
        base[1].mul_(2)
        return torch.sin(layer(row + base[1].clone()))

    def loss_of(x: Tensor) -> Tensor:
        return attempt(lambda: checkpoint(region, x.clone()[0], use_reentrant=False), layer).sum()

    return train(layer, loss_of, batches(4, 6, count=1))


@TABLE.row(36, rule=EQUAL_OR_REFUSED, torch=REFUSES)
def key_value_cache(checkpoint: Checkpoint) -> dict[str, object]:
    """Attention appends its keys and values to a cache that it then attends to."""
    project = nn.Linear(8, 24)
    lengths = []

    def region(x: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        q, k, v = project(x).chunk(3, -1)
        cache.append((k, v))
        keys, values = (torch.cat(parts, 1) for parts in zip(*cache, strict=True))
        return nn.functional.scaled_dot_product_attention(q, keys, values)

    def loss_of(x: Tensor) -> Tensor:
        cache: list[tuple[Tensor, Tensor]] = []
        first = checkpoint(region, x[:, :3], cache, use_reentrant=False)
        loss = first.sum() + checkpoint(region, x[:, 3:], cache, use_reentrant=False).square().sum()
        attempt(lambda: torch.autograd.grad(loss, list(project.parameters()), retain_graph=True), project)
        lengths.append(len(cache))
        return loss

    return {**train(project, loss_of, batches(2, 5, 8)), "lengths": lengths}


@TABLE.row(36, rule=EQUAL_OR_REFUSED, torch=WRONG)
def collected_hidden_states(checkpoint: Checkpoint) -> dict[str, object]:
    """A block appends its output to a list that the caller holds."""
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    states: list[Tensor] = []

    def region(layer: nn.Module, x: Tensor) -> Tensor:
        x = layer(x).tanh()
        states.append(x.detach().clone())
        return x.sin()

    def loss_of(x: Tensor) -> Tensor:
        for layer in layers:
            x = checkpoint(region, layer, x, use_reentrant=False)
        return x.sum()

    return {**train(layers, loss_of, batches(3, 4)), "states": states}


@TABLE.row(21, rule=EQUAL_OR_REFUSED, torch=REFUSES)
def inputs_that_share_memory_one_changed(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)

    def region(whole: Tensor, part: Tensor) -> Tensor:
        whole.mul_(2)
        return torch.sin(layer(part * part))

    def loss_of(x: Tensor) -> Tensor:
        x = x.clone()
        return attempt(lambda: checkpoint(region, x, x[0], use_reentrant=False), layer).sum()

    return train(layer, loss_of, batches(4, 6, count=3))


@TABLE.row(21, rule=EQUAL_OR_REFUSED, torch=REFUSES)
def memory_beside_an_input_changed(checkpoint: Checkpoint) -> dict[str, object]:
    """The input is the first row of a tensor whose second row the region changes through its closure."""
    layer = nn.Linear(6, 6)

    def loss_of(x: Tensor) -> Tensor:
        x = x.clone()

        def region(row: Tensor) -> Tensor:
            x[1].mul_(2)
            return torch.sin(layer(row + x[1].clone()))

        return attempt(lambda: checkpoint(region, x[0], use_reentrant=False), layer).sum()

    return train(layer, loss_of, batches(4, 6, count=3))


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)
