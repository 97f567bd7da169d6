"""Small runs of Hugging Face's Trainer, with and without Keepless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import same_bits
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import keepless

LENGTH, BATCH = 48, 4


def llama(layers: int = 2, **options: Any) -> PreTrainedModel:
    """A Llama with dropout in its attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return LlamaForCausalLM(config)


class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Random texts with masks that keep all, or cut the end of every third."""

    def __init__(self, masked: bool = True, padded: bool = False, num: int = 40) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, 128, (num, LENGTH), generator=generator)
        self.masked, self.padded = masked, padded

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {"input_ids": self.ids[index], "labels": self.ids[index].clone()}
        if self.masked:
            row["attention_mask"] = torch.ones(LENGTH, dtype=torch.long)
            if self.padded and index % 3 == 0:
                row["attention_mask"][-8:] = 0
                row["labels"][-8:] = -100
        return row


class Reporter(TrainerCallback):
    """Keeps the logs that it is given, as W&B's and TensorBoard's callbacks do. It comes before the user's."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        self.rows.append(dict(logs))


@dataclass
class Ran:
    """A training that came to its end."""

    trainer: Trainer
    model: torch.nn.Module
    reporter: Reporter
    rng: torch.Tensor

    @property
    def losses(self) -> list[float]:
        """Of training and evaluation, in order, as they were logged."""
        rows = self.trainer.state.log_history
        return [row[key] for row in rows for key in ("loss", "eval_loss", "grad_norm") if key in row]


def run(
    folder: Path,
    model: PreTrainedModel | None,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    data: Any = None,
    resume: str | None = None,
    trainer_class: Any = Trainer,
    model_init: Any = None,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Ran:
    """Five steps, with an evaluation after every second and a checkpoint after the third."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": BATCH,
        "use_cpu": True,
        "report_to": [],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "seed": 5,
    }
    reporter = Reporter()
    arguments = TrainingArguments(**{**settings, **options})
    tokens = Tokens() if data is None else data
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=tokens,
        eval_dataset=torch.utils.data.Subset(tokens, range(8)),
        callbacks=[reporter, *callbacks],
        model_init=model_init,
        **(trainer_options or {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return Ran(trainer, trainer.model, reporter, torch.get_rng_state())


def differences(one: Ran, other: Ran) -> list[str]:
    """Names of what is not the same in two trainings, bit for bit."""
    a, b = one.model.state_dict(), other.model.state_dict()
    found = ["keys"] if list(a) != list(b) else [name for name in a if not same_bits(a[name], b[name])]
    return found + [what for what in ("losses",) if one.losses != other.losses]


def middle(model: torch.nn.Module, optimizer_class: Any = torch.optim.AdamW, **options: Any) -> int:
    """A budget halfway between the smallest and everything kept."""
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    trained = [p for p in model.parameters() if p.requires_grad]
    estimate = keepless.estimate(model, batch, optimizer=optimizer_class(trained), release_outputs=True, **options)
    return (estimate.smallest_budget + estimate.plain_budget) // 2
