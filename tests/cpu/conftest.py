"""One thread, and generators that start alike, for every test here; a folder to run commands in."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

FACTORIES = """
import torch


def loss_of(output, batch):
    return (output ** 2).mean()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(
            *[torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Dropout(0.1),
                                  torch.nn.Linear(256, 64)) for _ in range(4)])

    def forward(self, x):
        return (self.blocks(x) ** 2).mean()


def tiny():
    return Net(), torch.randn(512, 64)


class Looks(Net):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            assert x.sum().item() < 1e9
        return (x ** 2).mean()


def looks():
    return Looks(), torch.randn(512, 64)


def own_loss():
    return torch.nn.Linear(8, 8), torch.randn(4, 8), loss_of


def frozen():
    return torch.nn.Linear(8, 1).requires_grad_(False), torch.randn(4, 8), loss_of


def sized(batch_size=64, depth=2):
    layers = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(depth)]
    return torch.nn.Sequential(*layers), torch.randn(batch_size, 64), loss_of


def noisy():
    print("a factory that prints")
    return tiny()


def broken():
    raise RuntimeError("the factory is broken")


def wrong():
    return 3


number = 7
"""

CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 64,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(autouse=True)
def _alike() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command in a folder with factories, a config, and a cost cache of its own."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KEEPLESS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "factories", raising=False)

    from keepless.cli.app import app

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, list(words))

    return run
