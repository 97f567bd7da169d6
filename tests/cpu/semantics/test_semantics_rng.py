"""Random streams: rows 1, 3, 4, 5, 35, 55, and 61 (the graph engine's)."""

from __future__ import annotations

import random

import numpy as np
import torch
from rows import EQUAL_OR_REFUSED, WRONG, Checkpoint, Row, Table, batches, draws, judge, torch_differs, train
from torch import Tensor, nn

TABLE = Table()


class Block(nn.Module):
    """A transformer block with dropout on attention weights and outputs."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=0.2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(x)


@TABLE.row(1)
def transformer_with_dropout(checkpoint: Checkpoint) -> dict[str, object]:
    blocks = nn.ModuleList(Block() for _ in range(3))

    def loss_of(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return (x**2).mean()

    return train(blocks, loss_of, batches(2, 5, 8))


@TABLE.row(1)
def stream_is_left_as_the_forward_left_it(checkpoint: Checkpoint) -> dict[str, object]:
    x = torch.randn(4, 8, requires_grad=True)
    y = checkpoint(lambda t: nn.functional.dropout(t, 0.4).sin(), x, use_reentrant=False)
    between = torch.rand(3)
    y.sum().backward()
    return {"y": y, "gradient": x.grad, "between": between, "draws": draws()}


@TABLE.row(1, torch=WRONG)
def states_are_restored_whatever_is_asked(checkpoint: Checkpoint) -> dict[str, object]:
    """`preserve_rng_state=False` is accepted; masks are the forward's all the same."""
    x = torch.ones(64, requires_grad=True)
    y = checkpoint(
        lambda t: nn.functional.dropout(t, 0.5).exp(), x, use_reentrant=False, preserve_rng_state=False
    ).sum()
    y.backward()
    return {"y": y, "gradient": x.grad, "draws": draws()}


@TABLE.row(3, torch=WRONG)
def own_generator(checkpoint: Checkpoint) -> dict[str, object]:
    noise = torch.Generator().manual_seed(7)
    model = nn.Linear(8, 8)

    def region(x: Tensor) -> Tensor:
        h = model(x)
        return (h * torch.rand(h.shape, generator=noise)).tanh()

    return train(model, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(4, 8), noise)


class NoisyLayer(nn.Module):
    """Holds its own generator, as samplers and augmentations do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.bernoulli(torch.full_like(x, 0.7), generator=self.generator)
        return torch.relu(self.linear(x * keep)) * x


@TABLE.row(3, torch=WRONG)
def generator_of_a_module(checkpoint: Checkpoint) -> dict[str, object]:
    layers = nn.ModuleList(NoisyLayer() for _ in range(2))

    def loss_of(x: Tensor) -> Tensor:
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.square().mean()

    return train(layers, loss_of, batches(4, 8), *(layer.generator for layer in layers))


@TABLE.row(4, rule=EQUAL_OR_REFUSED, torch=WRONG)
def python_random(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Linear(8, 8)

    def region(x: Tensor) -> Tensor:
        return model(x * random.uniform(0.5, 1.5)).tanh() * random.random()

    return train(model, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(4, 8))


@TABLE.row(4, rule=EQUAL_OR_REFUSED, torch=WRONG)
def numpy_random(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Linear(8, 8)

    def region(x: Tensor) -> Tensor:
        scale = torch.from_numpy(np.random.rand(*x.shape).astype(np.float32))
        return model(x * scale).tanh() * float(np.random.normal())

    return train(model, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(4, 8))


@TABLE.row(4, rule=EQUAL_OR_REFUSED, torch=WRONG)
def stochastic_depth_by_python_random(checkpoint: Checkpoint) -> dict[str, object]:
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def region(x: Tensor) -> Tensor:
        return (x + block(x) * (2.0 if random.random() < 0.5 else 0.5)).sin()

    return train(block, lambda x: checkpoint(region, x, use_reentrant=False).square().sum(), batches(4, 8, count=6))


@TABLE.row(5)
def fork_rng_and_a_seed_inside(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Linear(8, 8)

    def region(x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, 0.2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            x = nn.functional.dropout(model(x).tanh(), 0.5)
        return nn.functional.dropout(x.sin(), 0.3)

    return train(model, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(4, 8))


@TABLE.row(5)
def manual_seed_inside(checkpoint: Checkpoint) -> dict[str, object]:
    model = nn.Linear(8, 8)

    def region(x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, 0.2)
        torch.manual_seed(23)
        return nn.functional.dropout(model(x).tanh(), 0.3)

    return train(model, lambda x: checkpoint(region, x, use_reentrant=False).sum(), batches(4, 8))


@TABLE.row(35)
def lstm_with_dropout(checkpoint: Checkpoint) -> dict[str, object]:
    lstm = nn.LSTM(6, 5, num_layers=2, dropout=0.4, bidirectional=True, batch_first=True)

    def loss_of(x: Tensor) -> Tensor:
        y, (h, c) = checkpoint(lstm, x, use_reentrant=False)
        return y.square().mean() + h.sum() + c.sin().sum()

    return train(lstm, loss_of, batches(3, 4, 6))


@TABLE.row(35)
def packed_gru(checkpoint: Checkpoint) -> dict[str, object]:
    gru = nn.GRU(6, 5, num_layers=2, dropout=0.3, batch_first=True)

    def region(x: Tensor) -> tuple[Tensor, Tensor]:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2, 1]), batch_first=True)
        y, h = gru(packed)
        return nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0], h

    def loss_of(x: Tensor) -> Tensor:
        y, h = checkpoint(region, x, use_reentrant=False)
        return y.square().mean() + h.sum()

    return train(gru, loss_of, batches(3, 4, 6))


@TABLE.row(55)
def nested_with_dropout(checkpoint: Checkpoint) -> dict[str, object]:
    blocks = nn.ModuleList(Block() for _ in range(2))

    def inner(block: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.dropout(checkpoint(block, x, use_reentrant=False), 0.1)

    def outer(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(inner, block, nn.functional.dropout(x, 0.1), use_reentrant=False)
        return x.sin()

    return train(blocks, lambda x: checkpoint(outer, x, use_reentrant=False).square().sum(), batches(2, 5, 8))


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@TABLE.torch_differs
def test_torch_differs(row: Row) -> None:
    torch_differs(row)


def test_budget_below_all_with_a_random_op() -> None:
    """Row 61: the graph engine at its smallest budget draws no second mask; its replays are counted."""
    import keepless

    blocks = nn.Sequential(
        *(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 32)) for _ in range(3))
    )
    model = keepless.with_loss(blocks, lambda output, batch: output.square().mean())
    batch = torch.randn(64, 32)
    widest = keepless.plan(model, batch, "1GiB")
    plan = keepless.plan(model, batch, widest.smallest_budget)
    result = keepless.verify(model, batch, plan)
    assert result.equal, result
    assert result.num_replays > 0
