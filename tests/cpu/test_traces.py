"""Planning leaves no trace: all that it could change is, bit for bit and object for object, as it was."""

from __future__ import annotations

import copy
import gc
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from subjects import ENGINES, MAKERS, MODELS, REFUSED, USERS, Blocks, Subject, X, dense, subject
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

import keepless
from keepless.errors import KeeplessError

FEW = ("gpt", "batchnorm", "own generator", "hooks")
NAMES = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in MODELS]


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """What torch and Keepless set up once in a process is not the planning's."""
    for engine in ENGINES:
        one = subject("batchnorm")
        keepless.verify(one.model, one.batch, one.plan(engine), repeats=1)
    gc.collect()
    gc.unfreeze()  # the world has how many objects are frozen


def made(function: str, name: str) -> bool:
    """Whether something came of it; an error of ours is an answer, too."""
    one = subject(name)
    before = one.world()
    try:
        MAKERS[function](one)
        is_made = True
    except KeeplessError as error:
        print(f"{type(error).__name__}: {error}")
        is_made = False
    assert before.differences() == []
    return is_made


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", MAKERS)
def test_making(function: str, name: str) -> None:
    """Whatever is planned, and by what engine, and where the answer is no."""
    engine = {"curve": "graph", "estimate": "graph", "max_batch": "graph"}.get(function, function.removeprefix("plan "))
    refused = (engine, name) in REFUSED or function == "infeasible"
    assert made(function, name) is not refused


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ENGINES)
def test_using(engine: str, name: str, tmp_path: Path) -> None:
    """A plan that is applied and removed, saved and loaded, verified, timed: with any other in the model, too."""
    if (engine, name) in REFUSED:
        pytest.skip("this engine does not plan this model")
    one = subject(name)
    plan = one.plan(engine)
    others = [other for other in (None, engine, *ENGINES) if (other, name) not in REFUSED]
    for other in dict.fromkeys(others):
        if other is not None:
            keepless.apply(one.model, plan if other == engine else one.plan(other))
        before = one.world()
        for function, use in USERS.items():
            if other is None or function not in ("apply", "file"):
                use(one, plan, tmp_path)
                assert before.differences() == [], (function, other)
    assert torch.is_grad_enabled()


class Written(torch.nn.Module):
    """Multiplies by a buffer, which autograd saves, and writes it before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.scale.mul_(0.5)
        return torch.tanh(self.layer(x)) * self.scale


@pytest.mark.parametrize("engine", ["blocks", "eager"])
def test_graphs_from_before_are_valid(engine: str) -> None:
    """A backward whose forward ran before planning: trial steps write the buffer that it saved, and put it back."""
    model = Blocks(dense(), Written(), dense())
    results = []
    for plans in (False, True):
        one, x = copy.deepcopy(model), X.clone()
        torch.manual_seed(1)
        loss = one(x)
        if plans:
            keepless.verify(one, x, keepless.plan(one, x, "1GiB", engine=engine, cache=False), repeats=1)
        loss.backward()
        results.append([p.grad for p in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


CHANGES: dict[str, Callable[[Subject], object]] = {
    "blocks.0.0.weight:": lambda s: s.model.blocks[0][0].weight.data.add_(1e-6),
    "blocks.0.0.bias:": lambda s: setattr(s.model.blocks[0][0].bias, "grad", s.model.blocks[0][0].bias.grad.clone()),
    "blocks.0.1.running_mean:": lambda s: s.model.blocks[0][1].running_mean.mul_(1.0),
    "blocks.0.1.weight:": lambda s: s.model.blocks[0][1].weight.register_hook(print),
    "model.blocks.0.0._forward_pre_hooks items:": lambda s: s.model.blocks[0][0].register_forward_pre_hook(print),
    "model.blocks.0.3 attributes:": lambda s: s.model.blocks[0][3].eval(),
    "model. attributes:": lambda s: setattr(s.model, "note", 1),
    "optimizer group 0:": lambda s: s.optimizer.param_groups[0].update(lr=1.0),
    "optimizer state 0 step:": lambda s: next(iter(s.optimizer.state.values()))["step"].add_(1),
    "generator 0:": lambda s: torch.rand(1, generator=s.generators[0]),
    "other 0 attributes:": lambda s: next(s.loader),
    "torch's random numbers:": lambda s: torch.rand(1),
    "Python's random numbers:": lambda s: random.random(),
    "NumPy's random numbers:": lambda s: np.random.random(),
    "torch: _global_forward_hooks:": lambda s: register_module_forward_hook(print),
    "torch: deterministic:": lambda s: torch.use_deterministic_algorithms(True),
    "torch: torch._dynamo.config:": lambda s: setattr(torch._dynamo.config, "recompile_limit", 9),
    "python: garbage:": lambda s: gc.disable(),
    "python: warnings:": lambda s: warnings.simplefilter("always"),
    "process: environment:": lambda s: os.environ.update(KEEPLESS_NOTE="1"),
    "process: files:": lambda s: s.options.update(file=os.open("/dev/null", os.O_RDONLY)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_comparison_sees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One change at a time, and nothing but that."""
    one = subject("batchnorm")
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit), warnings.catch_warnings():
        before = one.world()
        assert before.differences() == []
        made = CHANGES[name](one)
        found = before.differences()
        torch.use_deterministic_algorithms(False)
        gc.enable()
        os.environ.pop("KEEPLESS_NOTE", None)
        if isinstance(made, RemovableHandle):
            made.remove()
        if "file" in one.options:
            os.close(one.options["file"])
    assert [text for text in found if text.startswith(name)], found
    assert len(found) <= 2
