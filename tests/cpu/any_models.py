"""Models that do not capture as a whole, or come in unusual forms; as `Case`s like those of `checkpoint_models`."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from checkpoint_models import _DECODER, Batch, Case, _transformer, generator, wrap
from torch import Tensor, nn


def mixtral_eager() -> Case:
    """Mixtral whose experts are a loop over those that the data chose."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    return _transformer(MixtralForCausalLM(config), 2)


def gpt2_default() -> Case:
    """GPT-2 as its config makes it: its loss is of the default type, and it keeps keys and values for generation."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return _transformer(GPT2LMHeadModel(config), 2)


def whisper() -> Case:
    """Whisper: convolutions, an encoder with layer drop, and a decoder that reads it in every layer."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=48,
        num_mel_bins=8,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=160,
        decoder_ffn_dim=160,
        max_source_positions=40,
        max_target_positions=32,
        dropout=0.1,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )

    def batch(number: int) -> Batch:
        stream = generator(number)
        return {
            "input_features": torch.randn(2, 8, 80, generator=stream),
            "labels": torch.randint(1, 48, (2, 30), generator=stream),
        }

    return _transformer(WhisperForConditionalGeneration(config), 4, batch)


WIDTH = 64


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.mlp(self.norm(x)))


class Looks(Block):
    """Looks at data inside."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mlp(self.norm(x))
        return x + self.drop(hidden) * (1.0 if hidden.sum().item() < 1e9 else 2.0)


@dataclass
class Hidden:
    """What a block may give: no container that torch knows."""

    x: Tensor
    steps: int


class Wraps(Block):
    """Takes and gives a dataclass."""

    def forward(self, hidden: Hidden) -> Hidden:  # type: ignore[override]
        return Hidden(super().forward(hidden.x), hidden.steps + 1)


class Net(nn.Module):
    """Blocks one after the other, and a loss of its own."""

    def __init__(self, *kinds: type[Block]) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(kind() for kind in kinds)
        self.head = nn.Linear(WIDTH, 8)

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Any:
        out = self.head(self.body(self.stem(x)))
        return {"loss": out.square().mean(), "out": out}


class Between(Net):
    """Looks at data between its blocks, and prints."""

    def body(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if x.abs().max().item() > 1e6:
                print(number)
        return x


class Dataclasses(Net):
    """Gives a dataclass."""

    def forward(self, x: Tensor) -> Any:
        out = self.head(self.body(self.stem(x)))
        return Found(out.square().mean(), out)


@dataclass
class Found:
    """An output that torch's pytrees do not know."""

    loss: Tensor
    out: Tensor


class Inner(Net):
    """Its blocks take and give dataclasses."""

    def body(self, x: Tensor) -> Tensor:
        hidden = Hidden(x, 0)
        for block in self.blocks:
            hidden = block(hidden)
        assert float(hidden.x.detach().abs().sum()) >= 0
        return hidden.x / hidden.steps


class Again(Between):
    """Runs its blocks twice."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(super().body(x))


class Drops(Net):
    """Leaves blocks out by Python's random numbers."""

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if random.random() < 0.7:
                x = block(x)
        return x


class Skips(Between):
    """Later blocks read what earlier ones made, several times over, as in an encoder and decoder."""

    def body(self, x: Tensor) -> Tensor:
        first = super().body(x)
        for block in self.blocks:
            x = block(x) + first.tanh()
        return x + first


def _net(make: Callable[[], Net]) -> Case:
    model = make().train()

    def batch(number: int) -> Batch:
        return {"x": torch.randn(3, 40, 8, generator=generator(number))}

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        found = model(**batch)
        return (found["out"], found["loss"]) if isinstance(found, dict) else (found.out, found.loss)

    return Case(model, batch, loss, lambda checkpoint: wrap(model.blocks, checkpoint), len(model.blocks))


MORE: dict[str, Callable[[], Case]] = {
    "mixtral eager experts": mixtral_eager,
    "gpt2 by default": gpt2_default,
    "whisper": whisper,
    "dict": lambda: _net(functools.partial(Net, Block, Block)),
    "break between blocks": lambda: _net(functools.partial(Between, Block, Block, Block)),
    "break inside a block": lambda: _net(functools.partial(Between, Block, Looks, Block)),
    "break inside all blocks": lambda: _net(functools.partial(Net, Looks, Looks, Looks)),
    "dataclass": lambda: _net(functools.partial(Dataclasses, Block, Block, Block)),
    "dataclasses between blocks": lambda: _net(functools.partial(Inner, Wraps, Wraps, Wraps)),
    "blocks twice": lambda: _net(functools.partial(Again, Block, Block)),
    "blocks left out": lambda: _net(functools.partial(Drops, Block, Block, Block, Block)),
    "skips": lambda: _net(functools.partial(Skips, Block, Block)),
}
