"""The models of the benchmark: what they are, in which sizes, and which blocks a user would checkpoint.

`build("llama", "full")` is a `Subject` with the same weights each time. "full" sizes have realistic proportions and
steps of 0.2 to 4 seconds on two cores; "tiny" ones are for tests and `--quick`. Dropout is on wherever the
architecture has it. A step is forward, loss, backward and one step of AdamW (foreach).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.common import ZOO as _PATH  # the models of the tests are found through it

import zoo  # isort: skip
import zoo_more  # isort: skip

assert _PATH


@dataclass(frozen=True)
class Family:
    """A model in its sizes.

    Arguments:
        title: what it is, for tables.
        kind: "transformer", "convolutional", "experts" or "recurrent".
        build: of `zoo` or `zoo_more`.
        full, tiny: arguments of `build`.
        blocks: names of the classes that are checkpointed, in the order in which they run.
    """

    title: str
    kind: str
    build: Callable[..., zoo.Workload]
    full: dict[str, Any]
    tiny: dict[str, Any]
    blocks: tuple[str, ...]


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT-2, 6 layers, width 256, sequence 256, batch 8",
        "transformer",
        zoo.gpt2,
        zoo.SIZES["large"]["gpt2"],
        {"layers": 4, "width": 32, "heads": 2, "length": 32, "batch": 2},
        ("GPT2Block",),
    ),
    "gpt2-12": Family(
        "GPT-2, 12 layers, width 768, sequence 512, batch 1",
        "transformer",
        zoo.gpt2,
        {"layers": 12, "width": 768, "heads": 12, "length": 512, "batch": 1, "vocab": 50257},
        {"layers": 4, "width": 48, "heads": 3, "length": 32, "batch": 1},
        ("GPT2Block",),
    ),
    "llama": Family(
        "Llama with grouped queries, 8 layers, width 512, sequence 256, batch 2",
        "transformer",
        zoo.llama,
        {"layers": 8, "width": 512, "heads": 8, "length": 256, "batch": 2, "vocab": 4096},
        {"layers": 4, "width": 32, "heads": 2, "length": 32, "batch": 2},
        ("LlamaDecoderLayer",),
    ),
    "bert": Family(
        "BERT, 6 layers, width 512, sequence 256, batch 4",
        "transformer",
        zoo.bert,
        {"layers": 6, "width": 512, "heads": 8, "length": 256, "batch": 4, "vocab": 8192},
        {"layers": 4, "width": 32, "heads": 2, "length": 32, "batch": 2},
        ("BertLayer",),
    ),
    "vit-b": Family(
        "ViT-B's layers, 4 of 12, width 768, 224 px in patches of 16, batch 8",
        "transformer",
        zoo.vit,
        {"layers": 4, "width": 768, "heads": 12, "image": 224, "patch": 16, "batch": 8},
        {"layers": 4, "width": 32, "heads": 2, "image": 32, "patch": 8, "batch": 4},
        ("ViTLayer",),
    ),
    "resnet50": Family(
        "ResNet-50, BatchNorm, 224 px, batch 4",
        "convolutional",
        zoo.resnet50,
        {"width": 64, "image": 224, "batch": 4},
        {"width": 4, "image": 32, "batch": 4},
        ("Bottleneck",),
    ),
    "convnext": Family(
        "ConvNeXt-T, 224 px, batch 2",
        "convolutional",
        zoo_more.convnext,
        {"depths": (3, 3, 9, 3), "width": 96, "image": 224, "batch": 2},
        {"depths": (1, 1, 2, 1), "width": 8, "image": 32, "batch": 4},
        ("ConvNeXtBlock",),
    ),
    "unet3d": Family(
        "3D U-Net, BatchNorm, volumes of 64^3, batch 1",
        "convolutional",
        zoo.unet3d,
        {"width": 12, "volume": 64, "batch": 1, "levels": 4},
        {"width": 4, "volume": 16, "batch": 1, "levels": 3},
        ("Block3d",),
    ),
    "t5": Family(
        "T5, 6 + 6 layers, width 384, sequences of 256 and 128, batch 4",
        "transformer",
        zoo_more.t5,
        {"layers": 6, "width": 384, "heads": 6, "length": 256, "batch": 4, "vocab": 8192},
        {"layers": 2, "width": 32, "heads": 2, "length": 32, "batch": 2},
        ("T5Block",),
    ),
    "moe": Family(
        "Mixtral, 8 experts, 4 layers, width 384, sequence 256, batch 2",
        "experts",
        zoo_more.moe,
        {"layers": 4, "width": 384, "heads": 6, "length": 256, "batch": 2, "vocab": 4096},
        {"layers": 2, "width": 32, "heads": 2, "length": 16, "batch": 2, "experts": 4},
        ("MixtralDecoderLayer",),
    ),
    "rnn": Family(
        "LSTM cell unrolled over 500 steps, width 256, batch 16",
        "recurrent",
        zoo_more.rnn,
        {"steps": 500, "chunks": 20, "width": 256, "batch": 16},
        {"steps": 16, "chunks": 4, "width": 16, "batch": 4},
        ("Chunk",),
    ),
}


SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"layers": 4, "width": 128, "heads": 4, "length": 128, "batch": 8},
    "unet3d": {"width": 8, "volume": 32, "batch": 1, "levels": 3},
}
"""Sizes between: steps of some 50 ms, for `benchmarks.peers.check`."""


@dataclass(frozen=True)
class Subject:
    """One model that contenders train.

    Arguments:
        name, size: of `FAMILIES`.
        workload: model, batches and loss.
        blocks: what is checkpointed, in order.
    """

    name: str
    size: str
    workload: zoo.Workload
    blocks: tuple[nn.Module, ...]

    @property
    def model(self) -> nn.Module:
        """The trained model."""
        return self.workload.model

    @property
    def params(self) -> list[torch.Tensor]:
        """Trained parameters, tied ones once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def static_nbytes(self) -> int:
        """Bytes of parameters, buffers, gradients and AdamW's state."""
        params = sum(p.nbytes for p in self.params)
        others = [*self.model.buffers(), *(p for p in self.model.parameters() if not p.requires_grad)]
        return 4 * params + sum(tensor.nbytes for tensor in others) + 4 * len(self.params)

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of every contender."""
        return torch.optim.AdamW(self.params, lr=1e-4, foreach=True)


def build(name: str, size: str, seed: int = 0) -> Subject:
    """A model by name, with the same weights for the same seed."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    sizes = {"full": family.full, "tiny": family.tiny, "small": SMALL.get(name, family.tiny)}
    workload = family.build(**sizes[size])
    blocks = tuple(module for module in workload.model.modules() if type(module).__name__ in family.blocks)
    assert blocks, f"{name} has no module of {family.blocks}"
    return Subject(name, size, workload, blocks)
