"""Nets whose code does what recomputation finds hard: running statistics, loops, masks, branches, coins, prints."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from checkpoint_models import Batch, Case, Checkpoint, generator
from torch import Tensor, nn


class Regions(nn.Module):
    """A net with its regions marked: `self.region(function, *args)`, a plain call until a checkpoint is installed."""

    checkpoint: Checkpoint | None = None

    def region(self, function: Callable[..., Any], *args: Any) -> Any:
        """The function's result."""
        if self.checkpoint is None:
            return function(*args)
        return self.checkpoint(function, *args, use_reentrant=False)


def _install(model: Any, checkpoint: Checkpoint) -> None:
    object.__setattr__(model, "checkpoint", checkpoint)


def _square_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    found = model(*batch.values())
    return found, found.square().mean()


def _case(model: Regions, num_blocks: int, *shape: int) -> Case:
    model.train()

    def batch(number: int) -> Batch:
        return {"x": torch.randn(*shape, generator=generator(number))}

    return Case(model, batch, _square_loss, functools.partial(_install, model), num_blocks)


def _volume_block(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(channels_in, channels, 3, padding=1),
        nn.BatchNorm3d(channels),
        nn.ReLU(inplace=True),
        nn.Dropout3d(0.1),
        nn.Conv3d(channels, channels, 3, padding=1),
        nn.BatchNorm3d(channels),
        nn.ReLU(inplace=True),
    )


class UNet3d(Regions):
    """Skips live from an encoder block to a decoder block; ReLU works in place on both sides of each region."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, 8, 8]
        self.encoder = nn.ModuleList(_volume_block(a, b) for a, b in itertools.pairwise([1, *widths]))
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, 2) for a, b in itertools.pairwise(widths))
        self.decoder = nn.ModuleList(_volume_block(2 * a, a) for a in widths[:-1])
        self.begin = nn.ModuleList([nn.ReLU(inplace=True) for _ in self.decoder])
        self.head = nn.Conv3d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Volumes in, two channels out."""
        skips = []
        for block in self.encoder[:-1]:
            skips.append(self.region(block, x))
            x = F.max_pool3d(skips[-1], 2)
        x = self.region(self.encoder[-1], x)
        for begin, block, up in zip(self.begin, reversed(self.decoder), reversed(self.up), strict=True):
            joined = torch.cat([up(x), skips.pop()], 1)
            x = self.region(nn.Sequential(begin, block), joined)  # a region that changes its own input
        return self.head(x)  # type: ignore[no-any-return]


class Lstm(Regions):
    """Two layers of `nn.LSTM` in a region, state in and out as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(8, 8, num_layers=2, dropout=0.2, batch_first=True) for _ in range(2))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences in and out."""
        state = None
        for layer in self.layers:
            x, state = self.region(layer, x, state)
            x = self.drop(x)
        return x


class UnrolledCell(Regions):
    """An LSTMCell per step; a region is a few steps, and one module runs in all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 8)

    def chunk(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A few steps."""
        outputs = []
        for step in range(x.shape[1]):
            h, c = self.cell(F.dropout(x[:, step], 0.1, self.training), (h, c))
            outputs.append(h)
        return torch.stack(outputs, 1), h, c

    def forward(self, x: Tensor) -> Tensor:
        """Sequences in and out."""
        h = c = x.new_zeros(x.shape[0], 8)
        found = []
        for part in x.split(4, 1):
            out, h, c = self.region(self.chunk, part, h, c)
            found.append(out)
        return torch.cat(found, 1)


class Gnn(Regions):
    """Messages along the edges that a boolean mask leaves: shapes follow the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8)) for _ in range(2)
        )

    def messages(self, layer: nn.Module, h: Tensor, edges: Tensor, mask: Tensor) -> Tensor:
        """The nodes after one round."""
        source, target = edges[:, mask]
        sent = layer(torch.cat([h[source], h[target]], 1))
        kept = sent[sent.sum(1) > 0]
        return h + torch.zeros_like(h).index_add_(0, target, sent) + kept.mean()

    def forward(self, h: Tensor, edges: Tensor, mask: Tensor) -> Tensor:
        """Nodes in and out."""
        for layer in self.layers:
            h = self.region(self.messages, layer, h, edges, mask)
        return h


def gnn() -> Case:
    """A graph of 12 nodes and 40 edges, another per batch."""
    model = Gnn().train()

    def batch(number: int) -> Batch:
        stream = generator(number)
        edges = torch.randint(0, 12, (2, 40), generator=stream)
        return {"h": torch.randn(12, 8, generator=stream), "e": edges, "m": torch.rand(40, generator=stream) > 0.4}

    return Case(model, batch, _square_loss, functools.partial(_install, model), 2)


class Blocks(Regions):
    """Blocks one after another, each a region."""

    def __init__(self, make: Callable[[], nn.Module], count: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """What the last block gives."""
        for block in self.blocks:
            x = self.region(block, x)
        return x


def _dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))


def _spectral() -> nn.Module:
    spectral = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(spectral(nn.Linear(8, 16)), nn.Tanh(), nn.Dropout(0.1), spectral(nn.Linear(16, 8)))


def _old_spectral() -> nn.Module:
    spectral: Any = nn.utils.spectral_norm
    return nn.Sequential(spectral(nn.Linear(8, 16)), nn.Tanh(), nn.Dropout(0.1), spectral(nn.Linear(16, 8)))


class LayerDrop(nn.Module):
    """Skips its inside by a coin of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside = _dense(), _dense()

    def forward(self, x: Tensor) -> Tensor:
        """With or without the inside."""
        x = self.first(x)
        return x if random.random() < 0.5 else x + self.inside(x)


class ItemBranch(nn.Module):
    """Branches on a value that it read from a tensor, and counts its ways in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = _dense(), _dense()
        self.register_buffer("count", torch.zeros(2, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """One way or the other."""
        hidden = self.one(x)
        way = int(hidden.sum().item() > 0)
        self.count[way] += 1
        return torch.tanh(hidden) if way else hidden + self.other(x)


class Talks(nn.Module):
    """Prints what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = _dense()

    def forward(self, x: Tensor) -> Tensor:
        """As without the print."""
        x = self.inside(x)
        print(f"mean {x.mean().item():.3f}")
        return torch.tanh(x)


OWN: dict[str, Callable[[], Case]] = {
    "3D U-Net": lambda: _case(UNet3d(), 5, 2, 1, 8, 8, 8),
    "LSTM": lambda: _case(Lstm(), 2, 3, 6, 8),
    "unrolled LSTMCell": lambda: _case(UnrolledCell(), 3, 3, 12, 8),
    "GNN": gnn,
    "spectral norm": lambda: _case(Blocks(_spectral), 3, 6, 8),
    "old spectral norm": lambda: _case(Blocks(_old_spectral), 3, 6, 8),
    "layer drop": lambda: _case(Blocks(LayerDrop, 4), 4, 6, 8),
    "item branch": lambda: _case(Blocks(ItemBranch, 4), 4, 6, 8),
    "print": lambda: _case(Blocks(Talks), 3, 6, 8),
}
