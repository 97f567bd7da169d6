"""A decoder that returns its key-value cache, as Hugging Face's do by default."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import keepless


def test_a_key_value_cache_is_left_out() -> None:
    """The planned output has None in its place, with a warning at the caller's line; loss and gradients are eager's."""
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).train()
    plain = copy.deepcopy(model)
    ids = torch.randint(0, 32, (2, 16))
    with pytest.warns(UserWarning, match="use_cache") as told:
        keepless.fit(model, {"input_ids": ids, "labels": ids}, "1GiB")
    assert {warning.filename for warning in told} == {__file__}
    losses = []
    for subject in (plain, model):
        torch.manual_seed(1)
        output = subject(input_ids=ids, labels=ids)
        output.loss.backward()
        losses.append(output.loss.detach())
    assert output.past_key_values is None
    assert torch.equal(*losses)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert model.config.use_cache
