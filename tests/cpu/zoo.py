"""Models that people train, small but in realistic proportion, with dropout on; and the ways to train them.

A `Workload` is a model with its batches. A `Trainer` trains one as a contender: "plain", "checkpoint" (torch's, on
every block), "keep_all" (the engine with everything kept) or "keepless" (a plan within a budget)::

    trainer = Trainer(build("gpt2"), "keepless", budget=20 * 2**20)
    trainer.step(0)
    trainer.state()          # digests of parameters, buffers and the generator

`target` and `phases` are targets of the meter (`keepless.measure.measure_peak`).
"""

from __future__ import annotations

import gc
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import keepless
from keepless.ir import Kind

PLENTY = 1 << 40
"""A budget that nothing here exceeds, in bytes."""

Batch = tuple[Any, torch.Tensor | None]


@dataclass(frozen=True)
class Workload:
    """A model and what it is trained on.

    Arguments:
        model: in train mode.
        batch: (inputs as the forward takes them, targets of a loss outside of the model) of a batch number.
        checkpoint_blocks: puts torch's non-reentrant checkpoint around every block.
        loss: of (output, targets); None where the forward returns it.
    """

    model: torch.nn.Module
    batch: Callable[[int], Batch]
    checkpoint_blocks: Callable[[], None]
    loss: Callable[[Any, Any], torch.Tensor] | None = None

    def to(self, device: str) -> Workload:
        """The same on another device."""
        if device == "cpu":
            return self

        def batch(number: int) -> Batch:
            moved: Batch = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), self.batch(number))
            return moved

        return replace(self, model=self.model.to(device), batch=batch)

    def forward(self, inputs: Any) -> Any:
        """The model's output."""
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        return self.model(*inputs) if isinstance(inputs, tuple) else self.model(inputs)

    def loss_of(self, output: Any, targets: Any) -> torch.Tensor:
        """The loss, wherever it comes from."""
        if self.loss is not None:
            return self.loss(output, targets)
        found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.loss
        return found

    def plan(self, budget: int, **options: Any) -> keepless.Plan:
        """A plan for batches like number 0."""
        inputs, targets = self.batch(0)
        loss = self.loss
        loss_fn = None if loss is None else (lambda output, _: loss(output, targets))
        return keepless.plan(self.model, inputs, budget, loss_fn=loss_fn, **options)


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + number)


def _hugging_face(model: torch.nn.Module, batch: Callable[[torch.Generator], dict[str, torch.Tensor]]) -> Workload:
    def checkpoint_blocks() -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]

    return Workload(model.train(), lambda number: (batch(_generator(number)), None), checkpoint_blocks)


def gpt2(layers: int, width: int, heads: int, length: int, batch: int, vocab: int = 256) -> Workload:
    """GPT-2 with tied embeddings, dropout 0.1 in four places per layer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": length, "vocab_size": vocab}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, use_cache=False))

    def tokens(generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, vocab, (batch, length), generator=generator)
        return {"input_ids": ids, "labels": ids}

    return _hugging_face(model, tokens)


def bert(layers: int, width: int, heads: int, length: int, batch: int, vocab: int = 512) -> Workload:
    """BERT that classifies sequences."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=vocab,
        max_position_embeddings=length,
        problem_type="single_label_classification",
    )

    def sentences(generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, vocab, (batch, length), generator=generator)
        labels = torch.randint(0, 2, (batch,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return _hugging_face(BertForSequenceClassification(config), sentences)


def vit(layers: int, width: int, heads: int, image: int, patch: int, batch: int) -> Workload:
    """A vision transformer with both of its dropouts on."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=image,
        patch_size=patch,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        num_labels=10,
    )

    def images(generator: torch.Generator) -> dict[str, torch.Tensor]:
        pixels = torch.randn(batch, 3, image, image, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(0, 10, (batch,), generator=generator)}

    return _hugging_face(ViTForImageClassification(config), images)


def llama(layers: int, width: int, heads: int, length: int, batch: int, vocab: int = 512) -> Workload:
    """Llama with grouped queries, rotary positions, eager attention and its dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        intermediate_size=3 * width,
        vocab_size=vocab,
        max_position_embeddings=length,
        attention_dropout=0.1,
        use_cache=False,
        attn_implementation="eager",
    )

    def tokens(generator: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, vocab, (batch, length), generator=generator)
        return {"input_ids": ids, "labels": ids}

    return _hugging_face(LlamaForCausalLM(config), tokens)


def resnet50(width: int, image: int, batch: int) -> Workload:
    """timm's ResNet-50 with BatchNorm, dropout and drop path; the loss stays outside of the model."""
    import timm

    channels = (width, 2 * width, 4 * width, 8 * width)
    model = timm.create_model("resnet50", num_classes=10, drop_rate=0.1, drop_path_rate=0.1, channels=channels).train()

    def images(number: int) -> Batch:
        generator = _generator(number)
        pixels = torch.randn(batch, 3, image, image, generator=generator)
        return pixels, torch.randint(0, 10, (batch,), generator=generator)

    return Workload(model, images, lambda: model.set_grad_checkpointing(True), F.cross_entropy)


class Block3d(torch.nn.Module):
    """Two convolutions of 3 x 3 x 3 with BatchNorm3d, ReLU in place, Dropout3d between."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.is_checkpointed = False
        self.net = torch.nn.Sequential(
            torch.nn.Conv3d(channels_in, channels, 3, padding=1),
            torch.nn.BatchNorm3d(channels),
            torch.nn.ReLU(inplace=True),
            torch.nn.Dropout3d(0.1),
            torch.nn.Conv3d(channels, channels, 3, padding=1),
            torch.nn.BatchNorm3d(channels),
            torch.nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Volumes in, volumes out."""
        if self.is_checkpointed:
            result: torch.Tensor = checkpoint(self.net, x, use_reentrant=False)
            return result
        return self.net(x)  # type: ignore[no-any-return]


class UNet3d(torch.nn.Module):
    """A U-Net over volumes: skips live from the first encoder block to the last decoder block."""

    def __init__(self, width: int, levels: int, classes: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.encoder = torch.nn.ModuleList([Block3d(a, b) for a, b in zip([1, *widths], widths, strict=False)])
        self.up = torch.nn.ModuleList([torch.nn.ConvTranspose3d(b, a, 2, 2) for a, b in itertools.pairwise(widths)])
        self.decoder = torch.nn.ModuleList([Block3d(2 * a, a) for a in widths[:-1]])
        self.head = torch.nn.Conv3d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits per voxel."""
        skips: list[torch.Tensor] = []
        for block in self.encoder[:-1]:
            skips.append(block(x))
            x = F.max_pool3d(skips[-1], 2)
        x = self.encoder[-1](x)
        for block, up in zip(reversed(self.decoder), reversed(self.up), strict=True):
            x = block(torch.cat([up(x), skips.pop()], 1))
        return self.head(x)  # type: ignore[no-any-return]


def unet3d(width: int, volume: int, batch: int, levels: int = 3) -> Workload:
    """The U-Net with its loss in the captured step (`keepless.with_loss`)."""
    net = UNet3d(width, levels, classes=3)
    model = keepless.with_loss(net, lambda output, given: F.cross_entropy(output, given[1]), num_targets=1).train()

    def volumes(number: int) -> Batch:
        generator = _generator(number)
        voxels = torch.randn(batch, 1, volume, volume, volume, generator=generator)
        return (voxels, torch.randint(0, 3, (batch, volume, volume, volume), generator=generator)), None

    def checkpoint_blocks() -> None:
        for module in net.modules():
            if isinstance(module, Block3d):
                module.is_checkpointed = True

    return Workload(model, volumes, checkpoint_blocks)


BUILDERS: dict[str, Callable[..., Workload]] = {
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "llama": llama,
    "resnet50": resnet50,
    "unet3d": unet3d,
}

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "small": {
        "gpt2": {"layers": 4, "width": 64, "heads": 4, "length": 128, "batch": 8},
        "bert": {"layers": 4, "width": 96, "heads": 4, "length": 128, "batch": 8},
        "vit": {"layers": 4, "width": 96, "heads": 4, "image": 64, "patch": 8, "batch": 16},
        "llama": {"layers": 3, "width": 96, "heads": 4, "length": 128, "batch": 4},
        "resnet50": {"width": 16, "image": 64, "batch": 16},
        "unet3d": {"width": 8, "volume": 24, "batch": 2},
    },
    "large": {
        "gpt2": {"layers": 6, "width": 256, "heads": 4, "length": 256, "batch": 8},
        "bert": {"layers": 6, "width": 256, "heads": 4, "length": 256, "batch": 8},
        "vit": {"layers": 6, "width": 192, "heads": 3, "image": 128, "patch": 8, "batch": 8},
        "llama": {"layers": 6, "width": 256, "heads": 4, "length": 256, "batch": 4},
        "resnet50": {"width": 64, "image": 96, "batch": 16},
        "unet3d": {"width": 16, "volume": 48, "batch": 1, "levels": 4},
    },
    "tiny": {"gpt2": {"layers": 2, "width": 16, "heads": 2, "length": 8, "batch": 2}},
}
"""Arguments of the builders. "large" GPT-2 is the demo model."""


def build(name: str, size: str = "small", seed: int = 0) -> Workload:
    """A workload by name, with the same weights for the same seed."""
    torch.manual_seed(seed)
    return BUILDERS[name](**SIZES[size][name])


def digest(tensor: torch.Tensor) -> str:
    """A hash of a tensor's bits in logical order; makes no copy of a contiguous one."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(flat.cpu().numpy())).hexdigest()


class CountOps(TorchDispatchMode):
    """Counts the ops that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Trainer:
    """A training loop with AdamW, one step at a time.

    Arguments:
        workload: what is trained.
        contender: "plain", "checkpoint", "keep_all" or "keepless".
        budget: bytes, for "keepless"; 0 for the smallest budget that a plan is found for.
        accumulate: two batches per step, into gradients that are zeroed in place.
        watch: digests of gradients are recorded in `grads`.
        plan: for "keep_all" and "keepless", where it is made already.
    """

    workload: Workload
    contender: str = "plain"
    budget: int = 0
    accumulate: bool = False
    watch: bool = False
    plan: keepless.Plan | None = None
    losses: list[str] = field(default_factory=list)
    grads: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.workload.model.parameters(), lr=1e-3)
        if self.contender == "checkpoint":
            self.workload.checkpoint_blocks()
        elif self.contender in ("keep_all", "keepless"):
            self.plan = self.plan or self.make_plan()
            keepless.apply(self.workload.model, self.plan)
        elif self.contender != "plain":
            raise ValueError(f"unknown contender {self.contender!r}")

    def make_plan(self) -> keepless.Plan:
        """The contender's plan."""
        options: dict[str, Any] = {
            "optimizer": self.optimizer,
            "accumulate": self.accumulate,
            "release_outputs": True,
        }
        if self.contender == "keep_all":
            return self.workload.plan(PLENTY, solver="keep_all", **options)
        return self.workload.plan(self.budget or self.workload.plan(PLENTY, **options).smallest_budget, **options)

    def step(self, number: int) -> None:
        """One optimizer step; outputs are released before the backward, all but the loss."""
        self.optimizer.zero_grad(set_to_none=not self.accumulate)
        num_batches = 2 if self.accumulate else 1
        for micro in range(num_batches):
            self.forward_backward(num_batches * number + micro)
        if self.watch:
            self.grads.append({n: digest(p.grad) for n, p in self.named_parameters() if p.grad is not None})
        self.optimizer.step()

    def forward_backward(self, number: int) -> None:
        """Gradients of one batch."""
        inputs, targets = self.workload.batch(number)
        loss = self.workload.loss_of(self.workload.forward(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self.losses.append(float(loss.detach()).hex())

    def named_parameters(self) -> list[tuple[str, torch.Tensor]]:
        """Names and parameters, tied ones once."""
        return list(self.workload.model.named_parameters())

    def state(self) -> dict[str, str]:
        """Digests of parameters, buffers and the generator's state, by name."""
        buffers = [(f"buffer {n}", b) for n, b in self.workload.model.named_buffers()]
        found = {name: digest(tensor) for name, tensor in [*self.named_parameters(), *buffers]}
        return {**found, "generator": digest(torch.get_rng_state())}

    def claims(self) -> dict[str, Any]:
        """What the plan says of itself; static bytes are those before the step, but for the batch."""
        plan = self.plan
        if plan is None:
            return {}
        before = [plan.graph.values[value] for value in plan.graph.inputs]
        return {
            "budget": plan.budget.limits["device"],
            "predicted_peak": plan.predicted_peak if plan.allocation is None else plan.allocation.allocated,
            "predicted_reserved": 0 if plan.allocation is None else plan.allocation.reserved,
            "predicted_seconds": plan.predicted_seconds,
            "baseline_peak": plan.baseline_peak,
            "baseline_seconds": plan.baseline_seconds,
            "smallest_budget": plan.smallest_budget,
            "smallest_bound": plan.smallest_bound,
            "num_replays": plan.num_replays,
            "static_nbytes": sum(v.nbytes for v in before if v.kind is not Kind.INPUT),
        }


def digest_all(digests: Mapping[str, str]) -> str:
    """One hash of many."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def target(
    name: str, contender: str, size: str = "small", budget: int = 0, plan_path: str = "", device: str = "cpu"
) -> Any:
    """A target of the meter: one contender; answers losses, what the plan claims, and a hash of the model.

    Arguments:
        plan_path: a saved plan, applied before planning would be.
        device: where it trains.
    """
    plan = keepless.load(plan_path) if plan_path else None
    trainer = Trainer(build(name, size).to(device), contender, budget, plan=plan)
    torch.manual_seed(1)

    def step() -> dict[str, Any]:
        trainer.step(len(trainer.losses))
        state = trainer.state()
        del state["generator"]
        return {"losses": trainer.losses, "state": digest_all(state), **trainer.claims()}

    return step


def planning(name: str, size: str, budget: int) -> Any:
    """A target of the meter whose step is the planning itself."""
    workload = build(name, size)
    optimizer = torch.optim.AdamW(workload.model.parameters())

    def step() -> dict[str, Any]:
        plan = workload.plan(budget, optimizer=optimizer, release_outputs=True)
        return {"predicted_peak": plan.predicted_peak, "budget": budget}

    return step


def between(low: int, high: int, position: float) -> int:
    """From `low` at 0 to `high` at 1, by equal factors."""
    return round(low * (high / low) ** position)


STEPS = 3
"""Training steps of a phase."""
SPANS = STEPS + 2
"""Steps of the meter per phase."""


def phases(name: str, modes: Sequence[str], budgets: Sequence[float], ends: Sequence[int] | None = None) -> Any:
    """A target of the meter that trains contender after contender in one process, the next when the last is gone.

    Per mode: plain, checkpoint, keep_all, then keepless at each budget. Each takes `SPANS` of the meter's steps:
    planning, the training steps, one more under `CountOps`.

    Arguments:
        modes: "fresh" or "accumulate".
        budgets: as positions from 0 (smallest budget) to 1 (everything kept), spaced by equal factors.
        ends: the budgets at 0 and at 1 in bytes, where they are known; checkpoint and keep_all are then left out.
    """
    others = [("plain", 0.0)] if ends else [("plain", 0.0), ("checkpoint", 0.0), ("keep_all", 0.0)]
    todo = [
        (mode == "accumulate", contender, position)
        for mode in modes
        for contender, position in [*others, *(("keepless", position) for position in budgets)]
    ]
    records: list[dict[str, Any]] = []
    state: dict[str, Any] = {"phase": 0, "span": 0, "trainer": None, "ends": tuple(ends or (0, 0))}

    def step() -> list[dict[str, Any]] | None:
        accumulate, contender, position = todo[state["phase"]]
        if state["span"] == 0:
            low, high = state["ends"]
            budget = between(low, high, position) if contender == "keepless" else 0
            state["trainer"] = Trainer(build(name), contender, budget, accumulate, watch=True)
            torch.manual_seed(1)
        elif state["span"] <= STEPS:
            state["trainer"].step(state["span"] - 1)
        else:
            trainer: Trainer = state["trainer"]
            record = {"accumulate": accumulate, "contender": contender, "position": position, **trainer.claims()}
            record |= {"losses": list(trainer.losses), "grads": list(trainer.grads), "state": trainer.state()}
            with CountOps() as counted:
                trainer.step(STEPS)
            records.append({**record, "num_ops": counted.total})
            if contender == "keep_all":
                again = trainer.workload.plan(
                    PLENTY, optimizer=trainer.optimizer, accumulate=accumulate, release_outputs=True
                )
                state["ends"] = (again.smallest_budget, again.baseline_peak)
                del again
            keepless.remove(trainer.workload.model)
            del trainer
            state["trainer"] = None
            state["phase"] += 1
            state["span"] = -1
            gc.collect()
            gc.freeze()  # what libraries hold by now is looked at by no later collection
        state["span"] += 1
        return records if state["phase"] == len(todo) else None

    return step
