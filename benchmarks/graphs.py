"""The training steps that planners are compared on, captured and measured once, kept as plan files.

    python -m benchmarks.graphs --list
    python -m benchmarks.graphs gpt2-xl lstm-1000      # captures these; the others when they are asked for

Models are built on the meta device: no weights are allocated, ops are measured one at a time. A step's graph and costs
are read from its file with everything kept (`load`), so that solvers can be compared without torch and without noise.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import keepless
from benchmarks import common
from keepless.cost import CostModel
from keepless.ir import Graph
from keepless.machine import load_plan

import zoo  # isort: skip  (found through benchmarks.common)

FOLDER = common.ROOT / "out" / "graphs"


class UNet2d(torch.nn.Module):
    """A U-Net over images, with BatchNorm and skips from every level."""

    def __init__(self, width: int, levels: int, classes: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]

        def block(channels_in: int, channels: int) -> torch.nn.Sequential:
            conv, norm, relu = torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU
            return torch.nn.Sequential(
                *(conv(channels_in, channels, 3, padding=1), norm(channels), relu(inplace=True)),
                *(conv(channels, channels, 3, padding=1), norm(channels), relu(inplace=True)),
            )

        self.encoder = torch.nn.ModuleList([block(a, b) for a, b in zip([3, *widths], widths, strict=False)])
        pairs = list(itertools.pairwise(widths))
        self.up = torch.nn.ModuleList([torch.nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairs])
        self.decoder = torch.nn.ModuleList([block(2 * a, a) for a in widths[:-1]])
        self.head = torch.nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits per pixel."""
        skips: list[torch.Tensor] = []
        for block in self.encoder[:-1]:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.encoder[-1](x)
        for block, up in zip(reversed(self.decoder), reversed(self.up), strict=True):
            x = block(torch.cat([up(x), skips.pop()], 1))
        logits: torch.Tensor = self.head(x)
        return logits


class Unrolled(torch.nn.Module):
    """An LSTMCell over time steps, and a classifier on its last state."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.cell = torch.nn.LSTMCell(width, width)
        self.head = torch.nn.Linear(width, 10)
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of (batch, time, width)."""
        state: tuple[torch.Tensor, torch.Tensor] | None = None
        for number in range(self.steps):
            state = self.cell(x[:, number], state)
        assert state is not None
        logits: torch.Tensor = self.head(state[0])
        return logits


Made = tuple[torch.nn.Module, Any]


def _classifier(model: torch.nn.Module, *shape: int, targets: tuple[int, ...] | None = None) -> Made:
    wrapped = keepless.with_loss(model, lambda output, given: F.cross_entropy(output, given[1]), num_targets=1)
    labels = torch.zeros(targets or shape[:1], dtype=torch.long, device="meta")
    return wrapped.train(), (torch.zeros(*shape, device="meta"), labels)


def _tokens(model: Any, batch: int, length: int) -> Made:
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return model.train(), {"input_ids": ids, "labels": ids}


def _gpt2(layers: int, width: int, heads: int, length: int, batch: int, vocab: int = 50257) -> Made:
    return _tokens(zoo.gpt2(layers, width, heads, length, batch, vocab).model, batch, length)


def _llama(layers: int) -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=1024,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=2816,
        vocab_size=32000,
        use_cache=False,
        attn_implementation="eager",
    )
    return _tokens(LlamaForCausalLM(config), 1, 1024)


def _t5() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        num_layers=12, d_model=768, d_ff=3072, num_heads=12, use_cache=False, vocab_size=32128, decoder_start_token_id=0
    )
    return _tokens(T5ForConditionalGeneration(config), 4, 512)


def _vit_l() -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=24,
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=4096,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        num_labels=1000,
    )
    model = ViTForImageClassification(config).train()
    labels = torch.zeros(8, dtype=torch.long, device="meta")
    return model, {"pixel_values": torch.zeros(8, 3, 224, 224, device="meta"), "labels": labels}


def _torchvision(name: str, batch: int, side: int = 224) -> Made:
    import torchvision

    return _classifier(getattr(torchvision.models, name)(weights=None), batch, 3, side, side)


def _unet3d() -> Made:
    model = zoo.UNet3d(16, 4, 3)
    return _classifier(model, 1, 1, 64, 64, 64, targets=(1, 64, 64, 64))


STEPS: dict[str, Callable[[], Made]] = {
    "gpt2-4": lambda: _gpt2(4, 256, 4, 256, 8, 256),
    "gpt2-xl": lambda: _gpt2(48, 1600, 25, 1024, 1),
    "llama-32": lambda: _llama(32),
    "t5": _t5,
    "vit-l": _vit_l,
    "resnet152": lambda: _torchvision("resnet152", 8),
    "resnet50": lambda: _torchvision("resnet50", 16),
    "vgg16": lambda: _torchvision("vgg16", 8),
    "mobilenet": lambda: _torchvision("mobilenet_v2", 16),
    "densenet121": lambda: _torchvision("densenet121", 8),
    "unet2d": lambda: _classifier(UNet2d(32, 5, 4), 2, 3, 256, 256, targets=(2, 256, 256)),
    "unet3d": _unet3d,
    "lstm-1000": lambda: _classifier(Unrolled(128, 1000), 16, 1000, 128),
}


def capture(name: str, tell: Callable[[str], None] = lambda text: None) -> Path:
    """The file of a step, captured and measured where it is not there yet."""
    path = FOLDER / f"{name}.plan"
    if not path.exists():
        begin = time.perf_counter()
        tell(f"{name}: capture and measure")
        with torch.device("meta"):
            model, batch = STEPS[name]()
        optimizer = torch.optim.AdamW(model.parameters())
        options: dict[str, Any] = {"optimizer": optimizer, "release_outputs": True, "solver": "keep_all"}
        plan = keepless.plan(model, batch, zoo.PLENTY, **options)
        FOLDER.mkdir(parents=True, exist_ok=True)
        plan.save(path)
        tell(f"{name}: {len(plan.graph.ops)} ops in {time.perf_counter() - begin:.1f} s")
    return path


def load(name: str, tell: Callable[[str], None] = lambda text: None) -> tuple[Graph, CostModel]:
    """Graph and costs of a step."""
    plan = load_plan(capture(name, tell))
    return plan.graph, plan.cost


def main() -> None:
    """Captures what is named, or lists what there is."""
    parser = argparse.ArgumentParser("python -m benchmarks.graphs", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *STEPS], help="default: all")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        print("\n".join(STEPS))
        return
    for name in args.names or STEPS:
        capture(name, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
