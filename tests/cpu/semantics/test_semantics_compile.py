"""`torch.compile` over and under a region: row 48."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.utils.checkpoint
from rows import Checkpoint, Row, Table, batches, judge, train
from torch import Tensor, nn

TABLE = Table()
pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def block(dropout: float = 0.2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(dropout), nn.Linear(6, 4))


def aot_eager(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager")


@TABLE.row(48, recomputes=None, warns=True)
def compiled_over_regions(checkpoint: Checkpoint) -> dict[str, object]:
    blocks = nn.ModuleList(block(dropout=0.0) for _ in range(2))

    def forward(x: Tensor) -> Tensor:
        for layer in blocks:
            x = checkpoint(layer, x, use_reentrant=False).sin()
        return x.sum()

    return train(blocks, aot_eager(forward), batches(3, 4))


@TABLE.row(48, recomputes=None, warns=True)
def compiled_over_regions_with_dropout(checkpoint: Checkpoint) -> dict[str, object]:
    layer = block()
    return train(layer, aot_eager(lambda x: checkpoint(layer, x, use_reentrant=False).sin().sum()), batches(3, 4))


@TABLE.row(48, recomputes=None, warns=True)
def compiled_region(checkpoint: Checkpoint) -> dict[str, object]:
    layer = block()
    compiled = aot_eager(layer)
    return train(layer, lambda x: checkpoint(compiled, x, use_reentrant=False).sin().sum(), batches(3, 4))


@TABLE.row(48, recomputes=None, warns=True)
def compiled_region_of_many_sizes(checkpoint: Checkpoint) -> dict[str, object]:
    """A new size compiles again, between a forward and its backward."""
    layer = block()
    compiled = aot_eager(layer)

    def loss_of(x: Tensor) -> Tensor:
        first = checkpoint(compiled, x, use_reentrant=False).sin().sum()
        return first + checkpoint(compiled, x[1:], use_reentrant=False).cos().sum()

    return train(layer, loss_of, [torch.ones(n, 4) * n for n in (3, 5, 4)])


@TABLE.rows
def test_as_without_checkpoint(row: Row, candidate: Checkpoint) -> None:
    judge(row, candidate)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_ours_in_torchs_place_compiles(monkeypatch: pytest.MonkeyPatch, candidate: Checkpoint) -> None:
    """A graph break inside the region: torch.compile traces ours, which must not call itself for torch's."""

    def region(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x.sigmoid().exp()

    x = torch.linspace(0, 1, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(region(x.sin()).sum(), x)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", candidate)
    compiled = aot_eager(lambda x: torch.utils.checkpoint.checkpoint(region, x.sin(), use_reentrant=False).sum())
    (got,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(expected, got)
