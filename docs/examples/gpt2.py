"""A small GPT-2 with random weights, as `keepless report` and the other commands take one: `gpt2:small`."""

import torch
import transformers


def small(batch_size: int = 8, seq_len: int = 128) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model and a batch of random tokens."""
    config = transformers.GPT2Config(
        vocab_size=2048, n_positions=256, n_embd=192, n_layer=6, n_head=6, bos_token_id=0, eos_token_id=0
    )
    config.use_cache = False
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(0, 2048, (batch_size, seq_len))
    return model, {"input_ids": ids, "labels": ids}
