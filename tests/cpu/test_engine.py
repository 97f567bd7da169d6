"""Random legal programs leave the bits of plain eager behind, on models that are awkward in one way each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models as zoo
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from keepless.capture import Inputs
from keepless.ir import Phase


class Apply(nn.Module):
    """A function behind a linear layer, its squares averaged."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], width: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(8, width)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer(x)).square().mean()


class Spectrum(nn.Module):
    """Complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.fft.fft(x) @ self.w).abs().pow(2).mean()


class Cube(torch.autograd.Function):
    """A function with a backward of its own, which is not quite its derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.factor = 1.5
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * x * x * ctx.factor


class OneGradient(nn.Module):
    """Two parameters whose gradients are one tensor, and one stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.v = nn.Parameter(torch.randn(8, 8).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.v + self.a + self.b).sum()


class OneStorage(nn.Module):
    """Parameters that are parts of one tensor, and one with holes."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(72)
        self.w, self.b = nn.Parameter(flat[:64].view(8, 8)), nn.Parameter(flat[64:])
        self.holes = nn.Parameter(torch.randn(16, 8)[::2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.w, self.b).tanh(), self.holes).sum()


class PlainTensors(nn.Module):
    """Reads tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.scale, self.shifts = torch.randn(8), [torch.randn(8)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * self.scale + self.shifts[0]).square().mean()


class Clamped(nn.Module):
    """Changes its parameter before it uses it, and its input after."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.layer.weight.clamp_(-0.1, 0.1)
        loss = self.layer(x * 2).square().mean()
        x.add_(1)
        return loss


class Encoder(nn.Module):
    """Torch's own attention and encoder layer."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=p, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, p, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.attention(x, x, x, need_weights=False)[0]).square().mean()


class Indices(nn.Module):
    """An embedding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(23, 8, **options)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).pow(3).mean()


def noise(h: torch.Tensor) -> torch.Tensor:
    h = h + torch.randn_like(h) * 0.1
    h = F.rrelu(F.alpha_dropout(h, 0.2), training=True) * (torch.rand(h.shape[0], 1) < 0.8)
    h = F.gumbel_softmax(h + torch.bernoulli(torch.full((8,), 0.5)))[torch.randperm(h.shape[0])]
    h = h + torch.normal(0.0, 1.0, (8,)) + torch.empty(8).uniform_() + torch.randint(0, 4, (8,))
    return h + torch.empty_like(h).exponential_()


def dropouts(h: torch.Tensor) -> torch.Tensor:
    h = F.dropout(h.t(), 0.3)
    h = F.dropout(h, 1.0) + F.dropout(h, 0.0) + F.dropout(h.expand(2, *h.shape), 0.4).sum(0)
    return F.dropout(F.dropout(h[:, ::2], 1 / 3).clone(), 0.5, inplace=True)


def in_place(h: torch.Tensor) -> torch.Tensor:
    h = h.clone()
    h[:, 0] = 0
    h[1:].mul_(2)
    h.view(-1)[3] = 1
    other = torch.zeros_like(h)
    other.copy_(h)
    other.index_add_(0, torch.tensor([0, 1]), h[:2])
    return other.relu_()


def saved_copies(h: torch.Tensor) -> torch.Tensor:
    h = F.elu_(F.hardtanh_(h * 2, -0.5, 0.5) + h)
    return F.silu(h.clone(), inplace=True) + F.silu(h.t().clone().t(), inplace=True)


class Copies(nn.Module):
    """Outputs that are copies of each other and of what the backward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h = torch.tanh(self.layer(x))
        copy = h.clone()
        return (F.hardtanh_(h * 2) * copy).sum(), h, copy


def checkpointed(h: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda y: F.dropout(torch.tanh(y), 0.3), h, use_reentrant=False)


def images(module: nn.Module) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (zoo.Loss(nn.Sequential(nn.Conv2d(3, 4, 3), module)), torch.randn(2, 3, 8, 8))


def x() -> torch.Tensor:
    return torch.randn(6, 8)


def frozen_statistics() -> nn.Module:
    model: Any = zoo.convnet()
    model.module[1].eval()
    return model


def last(memory_format: Any = torch.channels_last) -> torch.Tensor:
    return torch.randn(2, 3, 12, 12).to(memory_format=memory_format)


def sequences() -> torch.Tensor:
    return torch.randn(3, 5, 4)


IDS = torch.arange(18).remainder(23).reshape(2, 9)

CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mlp": lambda: (zoo.mlp(), x()),
    "mlp p=0.1": lambda: (zoo.mlp(p=0.1), x()),
    "mlp no rows": lambda: (zoo.mlp(), torch.randn(0, 8)),
    "mlp one row": lambda: (zoo.mlp(), torch.randn(1, 8)),
    "mlp bfloat16": lambda: (zoo.mlp().bfloat16(), x().bfloat16()),
    "mlp float16": lambda: (zoo.mlp().half(), x().half()),
    "mlp float64": lambda: (zoo.mlp(p=0.37).double(), x().double()),
    "mlp nan": lambda: (zoo.mlp(), torch.where(x() > 1, float("nan"), 1.0)),
    "mlp leaf input": lambda: (zoo.mlp(), x().requires_grad_()),
    "conv": lambda: (zoo.convnet(), torch.randn(2, 3, 12, 12)),
    "conv channels last": lambda: (zoo.convnet().to(memory_format=torch.channels_last), last()),
    "conv channels last weights": lambda: (
        zoo.convnet().to(memory_format=torch.channels_last),
        last(torch.contiguous_format),
    ),
    "conv channels last input": lambda: (zoo.convnet(), last()),
    "frozen statistics": lambda: (frozen_statistics(), torch.randn(2, 3, 12, 12)),
    "lm": lambda: (zoo.TinyLM(), Inputs(IDS, labels=IDS)),
    "lm fused": lambda: (zoo.TinyLM(fused=True), Inputs(IDS, labels=IDS)),
    "lm one storage": lambda: (zoo.TinyLM(), Inputs(IDS[:, :-1], labels=IDS[:, 1:])),
    "shared layer": lambda: (zoo.Shared(), torch.randn(3, 6)),
    "outputs": lambda: (zoo.Outputs(), torch.randn(4, 5)),
    "outputs leaf input": lambda: (zoo.Outputs(), torch.randn(4, 5, requires_grad=True)),
    "outputs keywords": lambda: (
        zoo.Outputs(),
        Inputs(torch.randn(4, 5), scale=2.0, extra={"bias": [torch.randn(5)]}),
    ),
    "ema": lambda: (zoo.Ema(), torch.randn(3, 4)),
    "cell loop": lambda: (zoo.GruCellLoop(), torch.randn(3, 3, 4)),
    "gru": lambda: (zoo.Recurrent(nn.GRU), sequences()),
    "lstm": lambda: (zoo.Recurrent(nn.LSTM), sequences()),
    "rnn": lambda: (zoo.Recurrent(nn.RNN), sequences()),
    "spectral norm": lambda: (zoo.Loss(nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh())), x()),
    "weight norm": lambda: (zoo.Loss(nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh())), x()),
    "complex": lambda: (Spectrum(), x()),
    "encoder": lambda: (Encoder(0.2), torch.randn(2, 5, 8)),
    "encoder without dropout": lambda: (Encoder(0.0), torch.randn(2, 5, 8)),
    "custom function": lambda: (Apply(Cube.apply), x()),
    "noise": lambda: (Apply(noise), x()),
    "dropouts": lambda: (Apply(dropouts), x()),
    "in place": lambda: (Apply(in_place), x()),
    "saved copies": lambda: (Apply(saved_copies), x()),
    "copies given back": lambda: (Copies(), x()),
    "checkpoint inside": lambda: (Apply(checkpointed), x()),
    "one gradient": lambda: (OneGradient(), x()),
    "one storage": lambda: (OneStorage(), x()),
    "plain tensors": lambda: (PlainTensors(), x()),
    "clamped": lambda: (Clamped(), x()),
    "embedding": lambda: (Indices(padding_idx=0, scale_grad_by_freq=True), IDS),
    "instance norm": images(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "batch norm plain": images(nn.BatchNorm2d(4, affine=False)),
    "batch norm no statistics": images(nn.BatchNorm2d(4, track_running_stats=False)),
    "group norm": images(nn.GroupNorm(2, 4)),
    "prelu": images(nn.PReLU()),
    "bilinear": images(nn.Upsample(scale_factor=2, mode="bilinear")),
    "nearest": images(nn.Upsample(scale_factor=2)),
    "dropout3d": images(nn.Dropout3d(0.2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_programs_equal_plain_eager(name: str) -> None:
    """Outputs, gradients and their strides, buffers and the generator, over two steps of four programs."""
    model, batch = CASES[name]()
    replays = zoo.check_equal(model, batch, programs=3)
    assert replays > 0


def test_a_copy_that_autograd_saves_is_its_source() -> None:
    """An activation that works in place saves a copy of its input; only copies that the caller is given are made."""

    def forward_copies(model: nn.Module) -> int:
        ops = zoo.capture(model, x())[1].graph.ops
        return sum(op.name == "aten.clone.default" and op.phase is Phase.FORWARD for op in ops)

    model = Copies()
    assert (forward_copies(Apply(saved_copies)), forward_copies(model)) == (0, 1)
    flat, binding = zoo.capture(model, x())
    zoo.install(model, flat, binding, zoo.keep_all(binding.graph))
    _, h, copy = model(x())
    assert h.untyped_storage().data_ptr() != copy.untyped_storage().data_ptr()


def test_output_identity_is_eagers() -> None:
    """Outputs that are arguments, parameters or each other are the same objects, as in eager."""
    model = zoo.Outputs()
    batch = torch.randn(4, 5)
    expected = model(batch)
    flat, binding = zoo.capture(model, batch)
    zoo.install(model, flat, binding, zoo.keep_all(binding.graph))
    found = model(batch)
    pairs = ((4, batch), (6, model.w), (7, model.table), (1, found[3]))
    assert [i for i, same in pairs if found[i] is not same] == []
    assert [type(item) for item in found] == [type(item) for item in expected]
    assert [item.requires_grad for item in found[:10]] == [item.requires_grad for item in expected[:10]]


def test_non_leaf_input_gets_its_gradient() -> None:
    """A planned model in the middle of an eager graph: encoder before it, head behind it."""
    encoder, model = nn.Linear(8, 8), zoo.mlp()

    def run(subject: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(1)
        loss = (subject(encoder(batch)) * 2).exp()
        return list(torch.autograd.grad(loss, [*encoder.parameters(), *subject.parameters()]))

    batch = x()
    expected = run(model)
    zoo.planned(model, encoder(batch))
    found = run(model)
    assert all(map(zoo.same_bits, found, expected))
    assert model.__dict__["forward"].counters.steps == 1


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("name", ["mlp", "lm", "conv"])
def test_autocast(name: str, inside: bool) -> None:
    """Under CPU autocast, the casts are those of the captured step, and no cast happens twice."""
    model, batch = CASES[name]()
    inputs = Inputs.of(batch)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = zoo.loss_in(model(*inputs.args, **inputs.kwargs))
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        zoo.planned(model, batch)
    found = run()
    assert model.__dict__["forward"].counters.steps == 1
    assert all(map(zoo.same_bits, found, expected))
