"""State that a forward advances, or that changes before the backward: rows 7 to 12 and 20."""

from __future__ import annotations

import warnings

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


def convolutions(**norm: object) -> nn.ModuleList:
    """Three convolution blocks with BatchNorm and dropout."""
    return nn.ModuleList(
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3, **norm), nn.ReLU(), nn.Dropout2d(0.2))
        for _ in range(3)
    )


def each_block(checkpoint: Checkpoint, blocks: nn.ModuleList, *shape: int, steps: int = 3) -> dict[str, object]:
    def loss_of(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x.square().mean()

    return train(blocks, loss_of, batches(*shape, count=steps))


@TABLE.row(7, torch=WRONG)
def batch_norm(checkpoint: Checkpoint) -> dict[str, object]:
    return each_block(checkpoint, convolutions(), 2, 3, 5, 5)


@TABLE.row(7)
def batch_norm_in_eval_mode(checkpoint: Checkpoint) -> dict[str, object]:
    blocks = convolutions()
    for module in blocks.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return each_block(checkpoint, blocks, 2, 3, 5, 5)


@TABLE.row(7, torch=WRONG)
def mode_switched_between_steps(checkpoint: Checkpoint) -> dict[str, object]:
    blocks = convolutions()
    first = each_block(checkpoint, blocks, 2, 3, 5, 5, steps=2)
    blocks.eval()
    second = each_block(checkpoint, blocks, 2, 3, 5, 5, steps=2)
    blocks.train()
    return {"first": first, "eval": second, "train": each_block(checkpoint, blocks, 2, 3, 5, 5, steps=2)}


@TABLE.row(7, torch=WRONG)
def one_batch_norm_called_twice(checkpoint: Checkpoint) -> dict[str, object]:
    block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())

    def loss_of(x: Tensor) -> Tensor:
        x = checkpoint(block, x, use_reentrant=False)
        return checkpoint(block, x, use_reentrant=False).square().mean()

    return train(block, loss_of, batches(4, 6))


@TABLE.row(7, torch=WRONG)
def batch_norm_in_nested_regions(checkpoint: Checkpoint) -> dict[str, object]:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)) for _ in range(3))

    def outer(x: Tensor) -> Tensor:
        x = checkpoint(blocks[0], x, use_reentrant=False).tanh()
        return checkpoint(blocks[2], blocks[1](x), use_reentrant=False)

    return train(blocks, lambda x: checkpoint(outer, x, use_reentrant=False).sin().sum(), batches(4, 6))


@TABLE.row(7, torch=WRONG)
def batch_norm_under_two_backwards(checkpoint: Checkpoint) -> dict[str, object]:
    """Each backward runs the region again; so does a gradient penalty's."""
    block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Tanh())

    def loss_of(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = checkpoint(block, x, use_reentrant=False)
        y.square().mean().backward(retain_graph=True)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.mean() + slope.square().mean()

    return train(block, loss_of, batches(4, 6))


@TABLE.row(7, torch=WRONG)
def instance_norm_with_running_statistics(checkpoint: Checkpoint) -> dict[str, object]:
    block = nn.Sequential(nn.Conv1d(3, 3, 3), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.GELU())
    return each_block(checkpoint, nn.ModuleList([block]), 2, 3, 8)


@TABLE.row(8, torch=WRONG)
def batch_norm_with_cumulative_average(checkpoint: Checkpoint) -> dict[str, object]:
    return each_block(checkpoint, convolutions(momentum=None), 2, 3, 5, 5, steps=4)


class Centred(nn.Module):
    """Keeps a moving average and a counter, and reads both in its forward."""

    def __init__(self, rebind: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.rebind = rebind
        self.register_buffer("mean", torch.full((6,), 0.5))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        with torch.no_grad():
            if self.rebind:
                self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
            else:
                self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
            self.seen += 1
        return torch.tanh((h - self.mean.clone()) * self.mean.clone() / self.seen.clone())


@TABLE.row(9, torch=WRONG)
def moving_average_read_in_forward(checkpoint: Checkpoint) -> dict[str, object]:
    return each_block(checkpoint, nn.ModuleList(Centred() for _ in range(2)), 4, 6)


@TABLE.row(9, torch=WRONG)
def moving_average_bound_anew(checkpoint: Checkpoint) -> dict[str, object]:
    return each_block(checkpoint, nn.ModuleList(Centred(rebind=True) for _ in range(2)), 4, 6)


@TABLE.row(9, torch=WRONG)
def moving_average_of_a_shared_layer(checkpoint: Checkpoint) -> dict[str, object]:
    layer = Centred()
    return each_block(checkpoint, nn.ModuleList([layer, layer, layer]), 4, 6)


@TABLE.row(9, torch=WRONG)
def forward_between_forward_and_backward(checkpoint: Checkpoint) -> dict[str, object]:
    """A second batch goes through the region, without gradients, before the first one's backward."""
    layer = Centred()
    other = torch.randn(4, 6)

    def loss_of(x: Tensor) -> Tensor:
        loss = checkpoint(layer, x, use_reentrant=False).sum()
        with torch.no_grad():
            checkpoint(layer, other, use_reentrant=False)
        return loss

    return train(layer, loss_of, batches(4, 6))


class Counting(nn.Module):
    """Counts its calls in a Python number, and scales by it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return torch.sin(self.linear(x) / self.num_calls)


@TABLE.row(9, rule=EQUAL_OR_REFUSED, torch=WRONG)
def python_counter_of_a_module(checkpoint: Checkpoint) -> dict[str, object]:
    layer = Counting()
    found = train(layer, lambda x: checkpoint(layer, x, use_reentrant=False).sum(), batches(4, 6))
    return {**found, "calls": layer.num_calls}


class Initialised(nn.Module):
    """Sets its own parameters from the first batch (ActNorm), then is affine."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.shift = nn.Parameter(torch.zeros(6))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready.item():
            with torch.no_grad():
                self.scale.div_(x.std(0) + 0.1)
                self.shift.sub_(x.mean(0))
                self.ready.fill_(True)
        return torch.tanh(x * self.scale + self.shift) * x


@TABLE.row(9)
def parameters_set_by_the_first_batch(checkpoint: Checkpoint) -> dict[str, object]:
    return each_block(checkpoint, nn.ModuleList(Initialised() for _ in range(2)), 4, 6)


@TABLE.row(10, torch=WRONG)
def spectral_norm(checkpoint: Checkpoint) -> dict[str, object]:
    layers = (nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)) for _ in range(2))
    return each_block(checkpoint, nn.ModuleList(nn.Sequential(layer, nn.Tanh()) for layer in layers), 4, 6)


@TABLE.row(10, torch=WRONG)
def spectral_norm_by_hook(checkpoint: Checkpoint) -> dict[str, object]:
    layers = (nn.utils.spectral_norm(nn.Linear(6, 6)) for _ in range(2))
    return each_block(checkpoint, nn.ModuleList(nn.Sequential(layer, nn.Tanh()) for layer in layers), 4, 6)


@TABLE.row(11)
def weight_norm(checkpoint: Checkpoint) -> dict[str, object]:
    layers = (nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)) for _ in range(2))
    return each_block(checkpoint, nn.ModuleList(nn.Sequential(layer, nn.Tanh()) for layer in layers), 4, 6)


@TABLE.row(11)
def weight_norm_by_hook(checkpoint: Checkpoint) -> dict[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [nn.utils.weight_norm(nn.Linear(6, 6)) for _ in range(2)]
    return each_block(checkpoint, nn.ModuleList(nn.Sequential(layer, nn.Tanh()) for layer in layers), 4, 6)


@TABLE.row(11, rule=EQUAL_OR_REFUSED, torch=REFUSES)
def cached_parametrization(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def loss_of(x: Tensor) -> Tensor:
        with nn.utils.parametrize.cached():
            return checkpoint(lambda t: layer(layer(t).tanh()).sin(), x, use_reentrant=False).sum()

    return train(layer, loss_of, batches(4, 6))


@TABLE.row(12, torch=WRONG)
def fake_quantisation(checkpoint: Checkpoint) -> dict[str, object]:
    quantisation = torch.ao.quantization
    observer = quantisation.MovingAverageMinMaxObserver

    def fake() -> nn.Module:
        return quantisation.FakeQuantize(observer, quant_min=0, quant_max=255, dtype=torch.quint8)

    blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), fake(), nn.Tanh(), fake()) for _ in range(2))
    return each_block(checkpoint, blocks, 4, 6)


@TABLE.row(20, rule=RAISES, torch=WRONG)
def parameter_changed_before_the_backward(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    loss = checkpoint(model, torch.randn(4, 6, requires_grad=True), use_reentrant=False).sum()
    with torch.no_grad():
        model[2].weight.mul_(2)
    attempt(loss.backward, model)
    return {"gradients": [p.grad for p in model.parameters()]}


@TABLE.row(20, rule=RAISES, torch=WRONG)
def optimizer_step_before_the_backward(checkpoint: Checkpoint) -> dict[str, object]:
    """Two losses over one region, as a GAN's loop has them; the second backward comes after the step."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (checkpoint(model, x.requires_grad_(), use_reentrant=False).sum() for x in batches(4, 6, count=2))
    first.backward()
    optimizer.step()
    attempt(second.backward, model)
    return {"gradients": [p.grad for p in model.parameters()]}


@TABLE.row(20, rule=RAISES, torch=WRONG)
def buffer_changed_before_the_backward(checkpoint: Checkpoint) -> dict[str, object]:
    layer = nn.Linear(6, 6)
    layer.register_buffer("scale", torch.full((6,), 2.0))
    loss = checkpoint(lambda x: torch.tanh(layer(x) * layer.scale), torch.randn(4, 6), use_reentrant=False).sum()
    layer.scale.add_(1)
    attempt(loss.backward, layer)
    return {"gradients": [p.grad for p in layer.parameters()]}


@TABLE.row(20, rule=RAISES, torch=WRONG)
def captured_tensor_changed_before_the_backward(checkpoint: Checkpoint) -> dict[str, object]:
    mask = torch.ones(4, 6)
    x = torch.randn(4, 6, requires_grad=True)
    loss = checkpoint(lambda t: (t.sin() * mask).exp(), x, use_reentrant=False).sum()
    mask[0] = 0
    attempt(loss.backward, {"x": x})
    return {"gradient": x.grad}


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)
