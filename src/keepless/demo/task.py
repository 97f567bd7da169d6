"""What is trained: GPT-2's architecture with random weights, on text that every Python brings along."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Task:
    """A model and its data, both the same on every run.

    Arguments:
        layers, width, heads: of the model.
        sequence: tokens of one text.
        batch: texts of one step.
        dropout: probability, everywhere that GPT-2 has dropout.
        learning_rate: of AdamW.
        seed: of the weights, the dropout and the choice of texts.
    """

    layers: int = 6
    width: int = 256
    heads: int = 4
    sequence: int = 256
    batch: int = 8
    dropout: float = 0.1
    learning_rate: float = 1e-3
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"GPT-2, {self.layers} layers, width {self.width}, sequence {self.sequence}, batch {self.batch}, "
            f"dropout {self.dropout}, AdamW"
        )


def build_model(task: Task) -> Any:
    """The model, its weights drawn from the task's seed, in training mode."""
    with quiet_transformers():
        from transformers import AutoModelForCausalLM, GPT2Config

        models: Any = AutoModelForCausalLM

        config = GPT2Config(
            vocab_size=256,
            n_positions=task.sequence,
            n_embd=task.width,
            n_layer=task.layers,
            n_head=task.heads,
            resid_pdrop=task.dropout,
            embd_pdrop=task.dropout,
            attn_pdrop=task.dropout,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        torch.manual_seed(task.seed)
        model = models.from_config(config)
        model.loss_type = "ForCausalLM"
        return model.train()


def english() -> bytes:
    """The language reference that comes with Python, as one text."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")


def batches(task: Task, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of byte tokens, one per step, the same on every run."""
    text = torch.frombuffer(bytearray(english()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(task.seed)
    found = []
    for _ in range(count):
        starts = torch.randint(0, len(text) - task.sequence, (task.batch,), generator=generator)
        tokens = torch.stack([text[start : start + task.sequence] for start in starts.tolist()]).long()
        found.append({"input_ids": tokens, "labels": tokens})
    return found


def hash_parameters(model: torch.nn.Module) -> str:
    """SHA-256 over the bytes of all parameters, in order."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the hints and deprecations that transformers prints while it is imported and builds a model."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
