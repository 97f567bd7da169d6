"""The models of `benchmarks.peers.card`: slices of models of one and three billion parameters, ViT-L, a 3D U-Net.

Slices have the widths of the whole model and few of its layers, so that a unit takes seconds and not minutes: bytes and
seconds of a layer are those of the whole model, the share of embeddings and head is larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu import at_bf16
from benchmarks.peers.models import Subject

import zoo  # isort: skip  (found through benchmarks.common)


class RMSNorm(nn.Module):
    """As in Llama: in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return self.weight * wide.to(x.dtype)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat([-other, one], -1) * sin


class LlamaBlock(nn.Module):
    """Grouped queries, rotary positions, SDPA; SwiGLU. Keys and values are repeated as torchtitan does."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.groups, size = heads, groups, width // heads
        self.norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.q = nn.Linear(width, heads * size, bias=False)
        self.k = nn.Linear(width, groups * size, bias=False)
        self.v = nn.Linear(width, groups * size, bias=False)
        self.o = nn.Linear(heads * size, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: [batch, length, width]; cos, sin: [length, width / heads]."""
        batch, length, width = x.shape
        y = self.norm(x)
        q = _turned(self.q(y).view(batch, length, self.heads, -1).transpose(1, 2), cos, sin)
        k = _turned(self.k(y).view(batch, length, self.groups, -1).transpose(1, 2), cos, sin)
        v = self.v(y).view(batch, length, self.groups, -1).transpose(1, 2)
        times = self.heads // self.groups
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        y = self.mlp_norm(x)
        result: torch.Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return result


class Llama(nn.Module):
    """A decoder with its loss, in float32 as in torchtitan."""

    def __init__(
        self, layers: int, width: int, heads: int, groups: int, hidden: int, length: int, vocab: int = 32000
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([LlamaBlock(width, heads, groups, hidden) for _ in range(layers)])
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        size = width // heads
        rates = 500000.0 ** -(torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(length).float(), torch.cat([rates, rates]))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of [batch, length] tokens."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def llama(length: int, batch: int = 1, vocab: int = 32000, **shape: int) -> zoo.Workload:
    """A workload of random tokens."""
    model = Llama(length=length, vocab=vocab, **shape)

    def tokens(number: int) -> zoo.Batch:
        generator = torch.Generator().manual_seed(1000 + number)
        ids = torch.randint(0, vocab, (2, batch, length), generator=generator)
        return (ids[0], ids[1]), None

    return zoo.Workload(model.train(), tokens, lambda: None)


@dataclass(frozen=True)
class Kind:
    """A unit's model.

    Arguments:
        title: for tables.
        build: with the arguments `full`, or `tiny` to try the script.
        blocks: name of the class that is checkpointed.
        copies_to_host: whether `save_on_cpu`, which is slow, takes part.
    """

    title: str
    build: Callable[..., zoo.Workload]
    full: dict[str, Any]
    tiny: dict[str, Any]
    blocks: str
    copies_to_host: bool = False


_TINY = {"layers": 3, "width": 32, "heads": 4, "groups": 2, "hidden": 64, "length": 32, "vocab": 64}
_1B = {"width": 2048, "heads": 32, "groups": 8, "hidden": 8192}
_3B = {"width": 3072, "heads": 24, "groups": 8, "hidden": 8192}

KINDS: dict[str, Kind] = {
    "llama-1b:4k": Kind(
        "Llama of 1B's widths, 8 layers, sequence 4,096, batch 1",
        llama,
        {**_1B, "layers": 8, "length": 4096},
        _TINY,
        "LlamaBlock",
        True,
    ),
    "vit-l:224": Kind(
        "ViT-L, 24 layers, 224 px in patches of 16, batch 32",
        zoo.vit,
        {"layers": 24, "width": 1024, "heads": 16, "image": 224, "patch": 16, "batch": 32},
        {"layers": 3, "width": 32, "heads": 2, "image": 32, "patch": 8, "batch": 4},
        "ViTLayer",
    ),
    "unet3d:128": Kind(
        "3D U-Net, BatchNorm, volumes of 128^3, batch 1",
        zoo.unet3d,
        {"width": 32, "volume": 128, "batch": 1, "levels": 4},
        {"width": 4, "volume": 16, "batch": 1, "levels": 3},
        "Block3d",
    ),
    "llama-1b:16k": Kind(
        "Llama of 1B's widths, 4 layers, sequence 16,384, batch 1",
        llama,
        {**_1B, "layers": 4, "length": 16384},
        _TINY,
        "LlamaBlock",
    ),
    "llama-3b:8k": Kind(
        "Llama of 3B's widths, 4 layers, sequence 8,192, batch 1",
        llama,
        {**_3B, "layers": 4, "length": 8192},
        _TINY,
        "LlamaBlock",
    ),
}
"""Units in order of importance."""


def build(name: str, device: str, quick: bool, seed: int) -> Subject:
    """A model at bf16, its weights made on the device: those of a billion parameters take seconds on the host."""
    kind = KINDS[name]
    torch.manual_seed(seed)
    with torch.device(device):
        made = kind.build(**(kind.tiny if quick else kind.full))
    workload = at_bf16(made, device)
    blocks = tuple(module for module in workload.model.modules() if type(module).__name__ == kind.blocks)
    return Subject(name, "tiny" if quick else "full", workload, blocks)
