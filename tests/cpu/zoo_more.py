"""More workloads in the form of `zoo`, for the benchmarks: T5, a mixture of experts, ConvNeXt, an unrolled cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import zoo
from torch import nn


def t5(layers: int, width: int, heads: int, length: int, batch: int, vocab: int = 512) -> zoo.Workload:
    """T5 with dropout 0.1, as many layers in the decoder as in the encoder; targets are half as long as inputs."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=vocab,
        d_model=width,
        d_kv=width // heads,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.1,
        use_cache=False,
        decoder_start_token_id=0,
        pad_token_id=0,
    )

    def texts(generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(1, vocab, (batch, length), generator=generator)
        labels = torch.randint(1, vocab, (batch, length // 2), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return zoo._hugging_face(T5ForConditionalGeneration(config), texts)


def moe(
    layers: int, width: int, heads: int, length: int, batch: int, experts: int = 8, vocab: int = 512
) -> zoo.Workload:
    """Mixtral: two experts per token, grouped queries, attention dropout; the experts run one after the other."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        num_local_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=length,
        attention_dropout=0.1,
        use_cache=False,
    )
    config._experts_implementation = "eager"

    def tokens(generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, vocab, (batch, length), generator=generator)
        return {"input_ids": ids, "labels": ids}

    return zoo._hugging_face(MixtralForCausalLM(config), tokens)


def convnext(depths: tuple[int, ...], width: int, image: int, batch: int) -> zoo.Workload:
    """timm's ConvNeXt with dropout and drop path; the loss stays outside of the model."""
    import timm

    dims = tuple(width * 2**stage for stage in range(len(depths)))
    options = {"depths": depths, "dims": dims, "drop_rate": 0.1, "drop_path_rate": 0.1, "num_classes": 10}
    model = timm.create_model("convnext_tiny", **options).train()

    def images(number: int) -> zoo.Batch:
        generator = zoo._generator(number)
        pixels = torch.randn(batch, 3, image, image, generator=generator)
        return pixels, torch.randint(0, 10, (batch,), generator=generator)

    return zoo.Workload(model, images, lambda: model.set_grad_checkpointing(True), F.cross_entropy)


class Chunk(nn.Module):
    """Some steps of a cell, with dropout on what goes in."""

    def __init__(self, cell: nn.LSTMCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs (batch, steps, width) and the state before; outputs of all steps and the state after."""
        outputs = []
        for step in range(x.shape[1]):
            h, c = self.cell(F.dropout(x[:, step], 0.1, self.training), (h, c))
            outputs.append(h)
        return torch.stack(outputs, 1), h, c


class Unrolled(nn.Module):
    """One LSTMCell over a whole sequence; its steps are written in chunks, which share the cell."""

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__()
        cell = nn.LSTMCell(width, width)
        self.chunks = nn.ModuleList(Chunk(cell) for _ in range(chunks))
        self.head = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean squared error of what is said after every step."""
        h = c = x.new_zeros(x.shape[0], x.shape[2])
        found = []
        for chunk, part in zip(self.chunks, x.chunk(len(self.chunks), 1), strict=True):
            out, h, c = chunk(part, h, c)
            found.append(out)
        return F.mse_loss(self.head(torch.cat(found, 1)), target)


def rnn(steps: int, chunks: int, width: int, batch: int) -> zoo.Workload:
    """The unrolled cell."""
    model = Unrolled(width, chunks).train()

    def sequences(number: int) -> zoo.Batch:
        generator = zoo._generator(number)
        return tuple(torch.randn(batch, steps, width, generator=generator) for _ in range(2)), None

    def checkpoint_blocks() -> None:
        raise NotImplementedError("the benchmarks put checkpoints around chunks themselves")

    return zoo.Workload(model, sequences, checkpoint_blocks)
