"""Models that cannot be captured as one graph, and training of them, for tests of plans of module calls."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import keepless

WIDTH = 32


class Block(nn.Module):
    """Attention-free residual block with dropout."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Blocks one after the other; the subclasses do what cannot be captured."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 5)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.body(x)).mean(1)
        return {"loss": F.cross_entropy(logits, y), "logits": logits}


class Branches(Net):
    """Looks at data."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if x.abs().mean().item() < 10 else x
        return x


class LayerDrop(Net):
    """Leaves blocks out by Python's and NumPy's random numbers."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if random.random() < 0.8:
                x = block(x) + float(np.random.rand())
        return x


class Shared(Net):
    """One block, called five times, inside a stage that is called twice."""

    def __init__(self) -> None:
        super().__init__(1)
        self.stage = Stage()

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            x = self.blocks[0](x)
        return self.stage(self.stage(x))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.block(x))


class Counting(Net):
    """Has state of its own: a counter, a list, a running mean, a held activation, a print."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[int] = []
        self.register_buffer("mean", torch.zeros(()))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean())
        print("call", self.calls)
        x = super().body(x)
        self.last = x.detach()
        return x * (1 + self.mean)


class Images(nn.Module):
    """BatchNorm and ReLU in place over volumes, and a long skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.stage(2, 6)
        self.second = self.stage(6, 6)
        self.third = self.stage(12, 4)
        self.head = nn.Linear(4, 5)

    @staticmethod
    def stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv3d(inputs, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True),
            nn.Conv3d(outputs, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        skip = self.first(x)
        x = self.third(torch.cat([skip, self.second(skip)], 1))
        return {"loss": F.cross_entropy(self.head(x.mean((2, 3, 4))), y)}


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__(2)
        self.rnn = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return super().body(self.rnn(x)[0])


class DrawsForces(Net):
    """Differentiates inside its forward."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        energy = super().body(x).square().mean()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force


class Checkpointing(Net):
    """Recomputes a block of its own accord."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = keepless.checkpoint(self.blocks[0], x, use_reentrant=False)
        for block in self.blocks[1:]:
            x = block(x)
        return x


def sequences(batch: int = 4, length: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=draw), torch.randint(0, 5, (batch,), generator=draw)


def volumes(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 8, 8, 8, generator=draw), torch.randint(0, 5, (2,), generator=draw)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "plain": (Net, sequences),
    "branches": (Branches, sequences),
    "layer_drop": (LayerDrop, sequences),
    "shared": (Shared, sequences),
    "counting": (Counting, sequences),
    "images": (Images, volumes),
    "recurrent": (Recurrent, sequences),
    "forces": (DrawsForces, sequences),
    "checkpointing": (Checkpointing, sequences),
}


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make().train()


def seeded(seed: int = 7) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def trained(model: nn.Module, batches: list[tuple[torch.Tensor, ...]]) -> dict[str, Any]:
    """Everything that some steps of AdamW leave."""
    seeded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, grads = [], []
    for x, y in batches:
        optimizer.zero_grad()
        output = model(x, y)
        output["loss"].backward()
        losses.append(output["loss"].detach().clone())
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return {
        "losses": losses,
        "grads": grads,
        "state": copy.deepcopy(model.state_dict()),
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)),
        "own": {name: value for name, value in vars(model).items() if name in ("calls", "seen")},
    }


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Bitwise."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


def smallest_and_largest(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> tuple[int, int]:
    everything = keepless.plan(model, batch, "4GiB", engine="eager")
    assert everything.num_replays == 0
    return everything.smallest_budget, everything.baseline_peak
