"""Training steps of any size, for `benchmarks.growth`: models by their numbers, and what the meter runs of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

import keepless
from benchmarks.common import ZOO as _PATH  # the models of the tests are found through it
from keepless.execute import PlannedForward
from keepless.machine import OPTIMIZER_IN_BACKWARD
from keepless.solve.sizes import Need, largest

import zoo  # isort: skip

assert _PATH

Sizes = dict[str, int]
MODEL_AXES = ("depth", "width")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-4),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-3),
}
"""SGD has no momentum, so that parameters and gradients are all that stands."""


def _hugging_face(model: torch.nn.Module, length: int, batch: int, vocab: int) -> zoo.Workload:
    def tokens(number: int) -> zoo.Batch:
        ids = torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1000 + number))
        return {"input_ids": ids, "labels": ids}, None

    def checkpoint_blocks() -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]

    return zoo.Workload(model.train(), tokens, checkpoint_blocks)


def gpt2(depth: int, width: int, length: int, batch: int, heads: int, positions: int, vocab: int = 256) -> zoo.Workload:
    """GPT-2 with dropout 0.1 in four places a layer, and a table of positions that is as long in every text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": width, "n_head": heads, "n_positions": positions, "vocab_size": vocab}
    config = GPT2Config(**shape, bos_token_id=0, eos_token_id=0, use_cache=False)
    return _hugging_face(GPT2LMHeadModel(keepless.with_depth(config, depth)), length, batch, vocab)


def llama(depth: int, width: int, length: int, batch: int, heads: int, vocab: int = 256) -> zoo.Workload:
    """Llama with grouped queries, torch's fused attention, and no dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        intermediate_size=3 * width,
        vocab_size=vocab,
        max_position_embeddings=1 << 16,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return _hugging_face(LlamaForCausalLM(keepless.with_depth(config, depth)), length, batch, vocab)


def resnet50(width: int, image: int, batch: int) -> zoo.Workload:
    """timm's ResNet-50 with a stem that is as narrow as the rest, BatchNorm, dropout and drop path; the loss is in the
    captured step."""
    import timm

    channels = (width, 2 * width, 4 * width, 8 * width)
    rates = {"drop_rate": 0.1, "drop_path_rate": 0.1}
    stem = {"stem_type": "deep", "stem_width": width // 2}
    net = timm.create_model("resnet50", num_classes=10, channels=channels, **stem, **rates)
    model = keepless.with_loss(net, lambda output, given: F.cross_entropy(output, given[1]), num_targets=1)

    def images(number: int) -> zoo.Batch:
        generator = torch.Generator().manual_seed(1000 + number)
        pixels = torch.randn(batch, 3, image, image, generator=generator)
        return (pixels, torch.randint(0, 10, (batch,), generator=generator)), None

    return zoo.Workload(model.train(), images, lambda: net.set_grad_checkpointing(True))


@dataclass(frozen=True)
class Base:
    """A model at the size where plain just fits, by definition.

    Arguments:
        build: a workload of sizes.
        sizes: its arguments.
        axes: what may grow, and in steps of what.
    """

    build: Callable[..., zoo.Workload]
    sizes: Sizes
    axes: Mapping[str, int]


_TEXT = {"depth": 1, "width": 16, "length": 16, "batch": 1}

BASES: dict[str, Base] = {
    "gpt2": Base(gpt2, {"depth": 4, "width": 128, "length": 256, "batch": 8, "heads": 4, "positions": 2048}, _TEXT),
    "llama": Base(llama, {"depth": 4, "width": 128, "length": 256, "batch": 12, "heads": 4}, _TEXT),
    "resnet50": Base(resnet50, {"width": 16, "image": 128, "batch": 40}, {"batch": 1, "image": 32}),
    "unet3d": Base(zoo.unet3d, {"width": 8, "volume": 32, "batch": 4, "levels": 3}, {"batch": 1, "volume": 4}),
}
QUICK: dict[str, Base] = {
    "gpt2": replace(
        BASES["gpt2"],
        sizes={"depth": 2, "width": 32, "length": 64, "batch": 8, "heads": 2, "positions": 512},
    ),
    "llama": replace(BASES["llama"], sizes={"depth": 2, "width": 32, "length": 64, "batch": 8, "heads": 2}),
    "resnet50": replace(BASES["resnet50"], sizes={"width": 4, "image": 64, "batch": 8}),
    "unet3d": replace(BASES["unet3d"], sizes={"width": 4, "volume": 16, "batch": 2, "levels": 3}),
}
"""The same, small: does it work?"""


@dataclass(frozen=True)
class Subject:
    """A model, what grows, and what trains it.

    Arguments:
        model: of `BASES`.
        sizes: at the base.
        axis: one of `sizes`.
        step: sizes are the base's and those further by multiples of it.
        optimizer: of `OPTIMIZERS`.
    """

    model: str
    sizes: Sizes
    axis: str
    step: int
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        """In rows."""
        return f"{self.model} {self.axis}, {self.optimizer}"

    @property
    def base(self) -> int:
        """The size where plain just fits."""
        return self.sizes[self.axis]

    @property
    def most(self) -> int | None:
        """The largest size that the model takes: its table of positions ends."""
        return self.sizes.get("positions") if self.axis == "length" else None

    @property
    def is_of_model(self) -> bool:
        """Whether the model grows, and not its batch."""
        return self.axis in MODEL_AXES

    def at(self, size: int) -> Sizes:
        """The numbers of a size."""
        return {**self.sizes, self.axis: size}

    def build(self, size: int) -> zoo.Workload:
        """The workload of a size, with the same weights for the same size."""
        torch.manual_seed(0)
        return BASES[self.model].build(**self.at(size))

    def make_optimizer(self, params: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        """For parameters."""
        return OPTIMIZERS[self.optimizer](params)

    def static(self, size: int, *, gradients: bool = True) -> int:
        """Bytes of parameters, buffers, gradients and optimizer state, counted on models without weights."""
        with torch.device("meta"):
            model = self.build(size).model
        params = sum(p.nbytes for p in model.parameters())
        buffers = sum(b.nbytes for b in model.buffers())
        states = {"adamw": 2, "sgd": 0}[self.optimizer]
        return params * (1 + gradients + states) + buffers

    def ceiling(self, budget: int, *, gradients: bool = True) -> int | None:
        """The largest size whose static bytes alone are within a budget; None where they do not grow with the size."""

        def need(size: int) -> Need:
            nbytes = self.static(size, gradients=gradients)
            return Need(nbytes <= budget, nbytes)

        if need(self.base + self.step).value == need(self.base).value:
            return None
        return largest(need, budget, self.base, None, self.step).size


def target(
    model: str, sizes: Sizes, optimizer: str, contender: str = "plain", plan_path: str = ""
) -> Callable[[], dict[str, Any]]:
    """A target of the meter: whole training steps, outputs dropped before the backward, always on the same batch.

    Arguments:
        contender: "checkpoint" puts torch's on every block.
        plan_path: a saved plan to train under.
    """
    torch.manual_seed(0)
    workload = BASES[model].build(**sizes)
    if contender == "checkpoint":
        workload.checkpoint_blocks()
    trained = OPTIMIZERS[optimizer](list(workload.model.parameters()))
    if plan_path:
        plan = keepless.load(plan_path)
        stepped = trained if OPTIMIZER_IN_BACKWARD in plan.rewrites else None
        keepless.apply(workload.model, plan, optimizer=stepped, background=False)
    batch = workload.batch(0)
    torch.manual_seed(1)

    def step() -> dict[str, Any]:
        trained.zero_grad()
        loss = workload.loss_of(workload.forward(batch[0]), batch[1])
        loss.backward()  # type: ignore[no-untyped-call]
        trained.step()
        forward = workload.model.__dict__.get("forward")
        unplanned = forward.counters.unplanned_calls if isinstance(forward, PlannedForward) else 0
        return {"loss": float(loss.detach()), "unplanned": unplanned}

    return step
