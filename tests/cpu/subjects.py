"""Models to plan for, each with something that planning could leave changed; and what can be done with one."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models as zoo
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset
from world import World

import keepless
from keepless.capture import Inputs

WIDTH = 8
X = torch.linspace(-2, 2, 6 * WIDTH).reshape(6, WIDTH)
ENGINES = ("graph", "blocks", "eager")


class Blocks(nn.Module):
    """Blocks one after the other; the loss is the mean of squares."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def dense(p: float = 0.2) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(p), nn.Linear(2 * WIDTH, WIDTH))


class Drawn(nn.Module):
    """Dropout that draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dense(0.0)
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (torch.rand(x.shape, generator=self.generator) < 0.8)


class Averaged(nn.Module):
    """A running mean that it writes and a counter in Python, and no copy of either in the state."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.inner = dense()
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)
        self.counts = counts
        self.calls = 0
        self.history: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        if self.counts:
            self.calls += 1
            self.history.append(self.calls)
        return x - self.mean.clone()


class Adapted(nn.Module):
    """A frozen layer and a low-rank one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.frozen(x) + self.up(self.down(x)))


def hooked() -> nn.Module:
    """Hooks of every kind, in an order that is no other's, on the root and on parameters; on a block, too."""
    model = Blocks(dense(), dense(), dense())
    log: list[str] = []
    model.log = log  # type: ignore[assignment]
    for name in ("c", "a", "b"):
        model.register_forward_hook(lambda *_, name=name: log.append(name))
        model.register_forward_pre_hook(lambda *_, name=name: log.append(name))
    model.register_state_dict_pre_hook(lambda *_: None)
    model.register_load_state_dict_post_hook(lambda *_: None)
    block = model.blocks[1]
    block.register_forward_hook(lambda *_: log.append("block"))
    block.register_full_backward_hook(lambda *_: log.append("backward"))
    first, second = list(model.parameters())[:2]
    first.register_hook(lambda grad: log.append("tensor"))
    second.register_post_accumulate_grad_hook(lambda tensor: log.append("accumulated"))
    return model


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))


def mixed() -> nn.Module:
    """BatchNorm in evaluation within a model that trains."""
    model = Blocks(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(3)))
    model.blocks[1].eval()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": zoo.TinyLM,
    "batchnorm": lambda: Blocks(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.1)) for _ in range(3))
    ),
    "spectral norm": lambda: Blocks(
        *(nn.Sequential(spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()) for _ in range(3))
    ),
    "weight norm": lambda: Blocks(*(nn.Sequential(old_weight_norm(), nn.Tanh()) for _ in range(3))),
    "running mean": lambda: Blocks(*(Averaged(False) for _ in range(3))),
    "counter": lambda: Blocks(*(Averaged(True) for _ in range(3))),
    "frozen": lambda: Blocks(*(Adapted() for _ in range(3))),
    "own generator": lambda: Blocks(*(Drawn() for _ in range(3))),
    "evaluation": lambda: Blocks(*(dense() for _ in range(3))).eval(),
    "mixed modes": mixed,
    "hooks": hooked,
}

REFUSED = {("graph", name) for name in ("counter", "own generator", "hooks", "weight norm")} | {
    ("blocks", "weight norm")
}
"""Where an engine says that it cannot plan the model."""


@dataclass
class Subject:
    """A model in the middle of a training: with gradients, optimizer state, and a data loader that has begun.

    Arguments:
        options: that planning needs beside model, batch and budget.
    """

    name: str
    model: nn.Module
    batch: Any
    optimizer: torch.optim.Optimizer
    generators: list[torch.Generator]
    loader: Iterator[Any]
    options: dict[str, Any] = field(default_factory=dict)

    def world(self) -> World:
        """What it is like now."""
        inputs = Inputs.of(self.batch)
        tensors = [t for t in (*inputs.args, *inputs.kwargs.values()) if isinstance(t, Tensor)]
        return World(self.model, self.optimizer, tensors, self.generators, [self.loader])

    def plan(self, engine: str = "auto", budget: Any = "1GiB", **options: Any) -> keepless.Plan:
        """A plan for it."""
        options = {"optimizer": self.optimizer, "cache": False, **self.options, **options}
        return keepless.plan(self.model, self.batch, budget, engine=engine, **options)


def subject(name: str) -> Subject:
    """A fresh one."""
    torch.manual_seed(0)
    model = MODELS[name]()
    ids = torch.arange(18).remainder(23).reshape(2, 9)
    batch: Any = Inputs(ids, labels=ids) if name == "gpt" else X.clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained[:2], "lr": 1e-2}, {"params": trained[2:]}], lr=1e-3)
    inputs = Inputs.of(batch)
    for _ in range(2):
        optimizer.zero_grad()
        zoo.loss_in(model(*inputs.args, **inputs.kwargs)).backward()
        optimizer.step()
    order = torch.Generator().manual_seed(3)
    loader = iter(DataLoader(TensorDataset(torch.arange(10.0)), batch_size=2, shuffle=True, generator=order))
    next(loader)
    generators = [order, *(m.generator for m in model.modules() if isinstance(m, Drawn))]
    options = {"accumulate": True}
    return Subject(name, model, batch, optimizer, generators, loader, options)


def by_file(subject: Subject, plan: keepless.Plan, folder: Path) -> None:
    """The plan goes through a file into the model, and out of it."""
    path = folder / "step.plan"
    plan.save(path)
    keepless.remove(keepless.apply(subject.model, keepless.load(path)))
    path.unlink()


def by_hand(subject: Subject, plan: keepless.Plan, folder: Path) -> None:
    """Into the model twice, and out of it twice."""
    keepless.apply(subject.model, plan)
    keepless.apply(subject.model, plan)
    keepless.remove(keepless.remove(subject.model))


def largest_batch(subject: Subject) -> keepless.Fits:
    """What fits, among batches of two and four rows."""

    def make_batch(size: int) -> Inputs:
        random.random()
        inputs = Inputs.of(subject.batch)
        rows = {id(t): t[:1].repeat_interleave(size, 0) for t in (*inputs.args, *inputs.kwargs.values())}
        args = [rows[id(t)] for t in inputs.args]
        return Inputs(*args, **{name: rows[id(t)] for name, t in inputs.kwargs.items()})

    options = {"optimizer": subject.optimizer, "cache": False, **subject.options}
    return keepless.max_batch(subject.model, make_batch, "1GiB", low=2, high=4, multiple_of=2, **options)


MAKERS: dict[str, Callable[[Subject], Any]] = {
    **{f"plan {engine}": lambda s, engine=engine: s.plan(engine) for engine in ENGINES},
    "plan auto": lambda s: s.plan(),
    "curve": lambda s: keepless.curve(s.model, s.batch, optimizer=s.optimizer, points=3, cache=False, **s.options),
    "estimate": lambda s: keepless.estimate(s.model, s.batch, optimizer=s.optimizer, **s.options),
    "max_batch": largest_batch,
    "infeasible": lambda s: s.plan(budget=20_000),
}
"""What makes something of a model and a batch; a new function is a line here."""

USERS: dict[str, Callable[[Subject, keepless.Plan, Path], Any]] = {
    "apply": by_hand,
    "file": by_file,
    "verify": lambda s, plan, _: keepless.verify(s.model, s.batch, plan, repeats=1),
    "timeline": lambda s, plan, _: keepless.timeline(s.model, s.batch, plan, repeats=1),
    "account": lambda s, plan, _: keepless.account(s.model, s.batch, plan),
}
"""What uses a plan; likewise."""
