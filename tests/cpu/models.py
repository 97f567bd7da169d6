"""Small models that are awkward in one way each, and the comparison of a planned step with plain eager's."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import keepless
from keepless._compat import tree_flatten
from keepless.binding import Binding
from keepless.capture import FlatInputs, Inputs, StepShape, flatten_inputs, lower, trace_step
from keepless.execute import Entry, PlannedForward, make_entry
from keepless.ir import Graph, Phase, Program
from keepless.machine import verify as verify_program
from keepless.passes import from_order, reuse_storage

# ---- comparing


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shapes, dtypes and bits; NaN equals itself, 0.0 is not -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach().contiguous(), b.detach().contiguous()
    if a.dtype is torch.bool:
        return bool(torch.equal(a, b))
    return bool(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)))


@dataclass
class Outcome:
    """Everything that a step leaves behind."""

    tensors: dict[str, torch.Tensor | None] = field(default_factory=dict)

    def differences(self, other: Outcome) -> list[str]:
        """Names of what is not the same, bit for bit."""
        found = []
        for name in sorted(set(self.tensors) | set(other.tensors)):
            a, b = self.tensors.get(name), other.tensors.get(name)
            if (a is None) != (b is None) or (a is not None and b is not None and not same_bits(a, b)):
                found.append(name)
        return found


def loss_in(output: Any) -> torch.Tensor:
    """The loss in a model's output: itself, "loss", or the first element."""
    if isinstance(output, torch.Tensor):
        return output
    found: torch.Tensor = output["loss"] if isinstance(output, dict) else output[0]
    return found


def run_step(
    model: nn.Module, inputs: Inputs, seed: int = 1, loss_of: Callable[[Any], torch.Tensor] = loss_in
) -> Outcome:
    """One step from fresh gradients; what came out of it."""
    leaves, _ = tree_flatten((inputs.args, inputs.kwargs))
    tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    for t in (*model.parameters(), *tensors):
        t.grad = None
        if not t.is_leaf:
            t.retain_grad()
    torch.manual_seed(seed)
    output = model(*inputs.args, **inputs.kwargs)
    flat, _ = tree_flatten(output)
    outcome = Outcome()
    for i, leaf in enumerate(flat):
        if isinstance(leaf, torch.Tensor):
            outcome.tensors[f"output.{i}"] = leaf.detach().clone()
            outcome.tensors[f"requires_grad.{i}"] = torch.tensor(leaf.requires_grad)
    outcome.tensors["rng.forward"] = torch.get_rng_state()
    loss_of(output).backward()
    for name, p in model.named_parameters():
        outcome.tensors[f"grad.{name}"] = None if p.grad is None else p.grad.clone()
        outcome.tensors[f"strides.{name}"] = None if p.grad is None else torch.tensor(p.grad.stride())
    for i, t in enumerate(tensors):
        outcome.tensors[f"grad.input.{i}"] = None if t.grad is None else t.grad.clone()
    for name, b in model.named_buffers():
        outcome.tensors[f"buffer.{name}"] = b.clone()
    outcome.tensors["rng"] = torch.get_rng_state()
    return outcome


def capture(model: nn.Module, batch: Any, **shape: Any) -> tuple[FlatInputs, Binding]:
    """The captured step of a model whose output holds its loss."""
    flat = flatten_inputs(Inputs.of(batch))
    traced = trace_step(model, flat, batch=batch, loss_fn=None, grad_outputs=None)
    return flat, lower(traced, flat, model, StepShape(**shape))


def random_program(graph: Graph, rng: random.Random, density: float = 0.4) -> Program:
    """A legal program with many replays: forward ops run again, in random groups, before random backward ops."""
    order: list[int] = []
    replayable = [
        op.id for op in graph.ops if op.can_replay and op.phase in (Phase.FORWARD, Phase.BACKWARD) and op.outputs
    ]
    done: set[int] = set()
    for op in graph.ops:
        if op.phase is Phase.BACKWARD and rng.random() < density:
            share = rng.choice((0.2, 0.5, 1.0))
            order += [i for i in replayable if i in done and rng.random() < share]
        order.append(op.id)
        done.add(op.id)
    program = from_order(graph, order)
    if rng.random() < 0.75:
        program = reuse_storage(graph, program)
    verify_program(graph, program)
    return program


def keep_all(graph: Graph) -> Program:
    """The program with no replay."""
    return reuse_storage(graph, from_order(graph, range(len(graph.ops))))


def install(model: nn.Module, flat: FlatInputs, binding: Binding, program: Program) -> Entry:
    """Puts one program into a model, without a planner."""
    keepless.remove(model)
    entry = make_entry(model, flat, binding, program)
    model.__dict__["forward"] = PlannedForward(model, [entry], None)
    return entry


def planned(model: nn.Module, batch: Any, seed: int = 0, density: float = 0.4, **shape: Any) -> nn.Module:
    """The model under a random program."""
    flat, binding = capture(model, batch, **shape)
    install(model, flat, binding, random_program(binding.graph, random.Random(seed), density))
    return model


def check_equal(model: nn.Module, batch: Any, *, programs: int = 4, steps: int = 2) -> int:
    """Plain eager and several random programs leave the same bits behind, step after step.

    Returns:
        How many replays ran in all.
    """
    inputs = Inputs.of(batch)
    tensors = [
        *model.parameters(),
        *model.buffers(),
        *(t for t in tree_flatten((inputs.args, inputs.kwargs))[0] if isinstance(t, torch.Tensor)),
    ]
    before = [t.detach().clone() for t in tensors]

    def reset() -> None:
        with torch.no_grad():
            for t, value in zip(tensors, before, strict=True):
                t.detach().copy_(value)

    expected = [run_step(model, inputs, seed) for seed in range(steps)]
    reset()
    replays = 0
    flat, binding = capture(model, batch)
    for number in range(programs):
        program = keep_all(binding.graph) if number == 0 else random_program(binding.graph, random.Random(number))
        install(model, flat, binding, program)
        replays += program.num_replays
        for seed in range(steps):
            found = run_step(model, inputs, seed)
            assert found.differences(expected[seed]) == [], f"program {number}, step {seed}"
        counters = model.__dict__["forward"].counters
        assert (counters.steps, counters.replays) == (steps, 0)
        keepless.remove(model)
        reset()
    return replays


# ---- models


class Loss(nn.Module):
    """Mean of squares of a module's output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x).float().pow(2).mean()


def mlp(width: int = 16, p: float = 0.3) -> nn.Module:
    return Loss(
        nn.Sequential(
            nn.Linear(8, width),
            nn.GELU(),
            nn.Dropout(p),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Dropout(p),
            nn.Linear(width, 4),
        )
    )


def convnet() -> nn.Module:
    return Loss(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.3),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
    )


class Attention(nn.Module):
    """A transformer block, its attention written out or by `scaled_dot_product_attention`."""

    def __init__(self, width: int = 16, heads: int = 2, p: float = 0.2, fused: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads, self.p, self.fused = heads, p, fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, w = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(w, dim=2))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.p)
        else:
            scores = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5)
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
            y = F.dropout(scores.softmax(-1), self.p, self.training) @ v
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(b, t, w)), self.p, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.p, self.training)


class TinyLM(nn.Module):
    """Embeddings, blocks, a tied head; returns a dict, its labels optional."""

    def __init__(self, vocab: int = 23, width: int = 16, blocks: int = 2, fused: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(12, width)
        self.blocks = nn.ModuleList(Attention(width, fused=fused) for _ in range(blocks))
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits, "hidden": x.detach(), "note": None, "length": ids.shape[1]}


class Shared(nn.Module):
    """One layer twice, one parameter unused, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.full((6,), 0.5), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(x)) * self.frozen).exp().sum()


class Outputs(nn.Module):
    """Returns aliases of inputs, of parameters, of each other, and integers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 5))
        self.register_buffer("table", torch.arange(5.0))

    def forward(self, x: torch.Tensor, *, scale: float = 1.0, extra: Any = None) -> tuple[Any, ...]:
        h = (x @ self.w * scale).relu()
        if extra is not None:
            h = h + extra["bias"][0]
        loss = (h * self.table).sum()
        return loss, h, h.t(), h, x, x[1:], self.w, self.table, h.detach(), h.argmax(-1), None, {"name": "x", "n": 3}


class Ema(nn.Module):
    """A buffer that the forward reads and then writes, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("ema", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x @ self.w)
        centred = h - self.ema.clone()
        with torch.no_grad():
            self.ema.mul_(0.9).add_(h.mean(0), alpha=0.1)
            self.count += 1
        return (centred * self.ema.detach().clone()).pow(2).sum() + h.mean()


class GruCellLoop(nn.Module):
    """A recurrent cell, a few times over."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(x.shape[1], 8)
        for step in x:
            h = F.dropout(self.cell(step, h), 0.2, self.training)
        return self.out(h).square().mean()


class Recurrent(nn.Module):
    """A fused recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn: Any = kind(4, 8, num_layers=2, batch_first=True, dropout=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.rnn(x)[0].square().mean()
        return loss


# ---- models whose batch has any size: (model, a batch of a size, its loss where the model has none)


def sized_gpt2() -> tuple[nn.Module, Callable[[int], Any], None]:
    """A GPT-2 of two layers with dropout, on texts of 32 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 64}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, use_cache=False)).train()

    def make_batch(size: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 64, (size, 32))
        return {"input_ids": ids, "labels": ids}

    return model, make_batch, None


def sized_convnet() -> tuple[nn.Module, Callable[[int], Any], Callable[[Any, Any], torch.Tensor]]:
    """Convolutions with BatchNorm and dropout; the loss stays outside."""
    parts: list[nn.Module] = []
    for channels_in, channels in ((3, 8), (8, 8), (8, 16), (16, 16)):
        parts += [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    model = nn.Sequential(*parts, nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return model.train(), lambda size: torch.randn(size, 3, 16, 16), lambda output, _: output.square().mean()


SIZED: dict[str, Callable[[], tuple[nn.Module, Callable[[int], Any], Any]]] = {
    "gpt2": sized_gpt2,
    "convnet": sized_convnet,
}
