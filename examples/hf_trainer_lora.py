"""LoRA in Hugging Face's Trainer within a memory budget: a small random Llama on the manual of Python.

    pip install "keepless[hf]" peft
    python examples/hf_trainer_lora.py

Needs no network and no weights. It trains twice, without Keepless and within half the way from the smallest budget to
what plain training needs, and compares every weight.
"""

from __future__ import annotations

import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from keepless.integrations.hf import KeeplessCallback

LENGTH, BATCH, STEPS = 128, 4, 5


def make_model() -> torch.nn.Module:
    """A Llama that reads bytes, and adapters with dropout."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    lora = LoraConfig(r=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def text() -> list[dict[str, torch.Tensor]]:
    """Rows of bytes: a byte is a token."""
    raw = "".join(topics.values()).encode()
    rows = [torch.tensor(list(raw[i : i + LENGTH])) for i in range(0, BATCH * STEPS * LENGTH, LENGTH)]
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def train(callbacks: list[Any]) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """A training of a few steps, and its weights."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(make_model(), args, train_dataset=text(), callbacks=callbacks)
        trainer.train()
    return trainer, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def main() -> None:
    """Trains with and without a budget."""
    _, plain = train([])

    roomy = KeeplessCallback("8GiB")
    train([roomy])
    assert roomy.plan is not None
    budget = (roomy.plan.smallest_budget + roomy.plan.baseline_peak) // 2

    callback = KeeplessCallback(budget)
    trainer, kept = train([callback])
    print(callback.plan)
    for row in trainer.state.log_history:
        for name, value in row.items():
            if name.startswith("memory/"):
                print(f"{name} {value:.6g}")
    differing = [name for name, tensor in plain.items() if not torch.equal(tensor, kept[name])]
    print(f"weights that differ from plain training's: {len(differing)} of {len(plain)}")
    if differing or callback.measured_peak is None or callback.measured_peak > budget:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
