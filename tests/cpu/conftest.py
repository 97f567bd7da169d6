"""One thread, and generators that start alike, for every test here; a folder to run commands in."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories_text import FACTORIES
from typer.testing import CliRunner

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


LONG = (
    "zoo",
    "demo",
    "peers",
    "card_benchmark",
    "fits",
    "cli_fits",
    "gpu_benchmark",
    "growth",
    "cli_all",
    "docs",
    "chunked_loss",
)
"""Files that take a minute or more: handed out first, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first."""
    long = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: long.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """For fixtures of whole modules, too, which begin before those of a test: on some processors bits hang on it."""
    torch.set_num_threads(1)


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


@pytest.fixture(scope="module", autouse=True)
def _few_objects() -> None:
    """What a collection of garbage looks through, here and in a failed step: not what other files imported and left."""
    gc.collect()
    gc.freeze()


RANKS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module", autouse=True)
def no_ranks_left() -> Iterator[None]:
    """Trainers leave ranks in the environment, and a process group: the next one would take itself for one of many."""
    before = {name: os.environ.get(name) for name in RANKS}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def no_gc() -> Iterator[None]:
    """The cycle collector is off, and what other tests imported is not looked through."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()
