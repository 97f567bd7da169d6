"""What goes between blocks and the code around them: gradients are added up as in plain autograd, nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import keepless
from keepless.errors import CaptureError, ParameterError

WIDTH = 32


class Block(nn.Module):
    """Reads its input twice: it is normed, and added at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.a = nn.Linear(WIDTH, 4 * WIDTH)
        self.b = nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Any:
        return x + self.drop(self.b(F.gelu(self.a(self.norm(x)))))


class Net(nn.Module):
    """Blocks, with a graph break before them."""

    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, 4)

    def middle(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if h.sum().item() == 12345.0:
            h = h + 1
        return self.head(self.middle(h))


class OuterSum(Net):
    """The code around the blocks reads what it gave them, and saves nothing of it."""

    def middle(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = h + block(h)
        return h


class Returning(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Returns(Net):
    """Blocks return their input as it is, too."""

    def __init__(self) -> None:
        super().__init__(Returning)

    def middle(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            y, x = block(h)
            h = y + x * 0.1
        return h


class Positioned(Block):
    def forward(self, x: Tensor, position: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x + position) * position


class ParameterGiven(Net):
    """Blocks are given a parameter, and read it twice."""

    def __init__(self) -> None:
        super().__init__(Positioned)
        self.position = nn.Parameter(torch.randn(WIDTH))

    def middle(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, self.position)
        return h


class Attending(Block):
    """Reads a memory twice, and makes or is given a bias that does not lie in memory as its gradient does."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Embedding(32, 4)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None = None) -> Any:  # type: ignore[override]
        if bias is None:
            length = torch.arange(x.shape[1])
            bias = self.table(length[:, None] - length + 16).permute(2, 0, 1).unsqueeze(0)
        q, k, v = (
            t.view(*t.shape[:2], 4, -1).transpose(1, 2) for t in (self.norm(x), self.key(memory), self.value(memory))
        )
        weights = (q @ k.transpose(2, 3) + bias).softmax(-1)
        return super().forward(x + (weights @ v).transpose(1, 2).reshape(x.shape)), bias


class Attends(Net):
    """As a decoder: all blocks read one memory twice each, and share a bias that the first one makes."""

    def __init__(self) -> None:
        super().__init__(Attending)

    def middle(self, h: Tensor) -> Tensor:
        memory, bias = h, None
        for block in self.blocks:
            h, bias = block(h, memory, bias)
        return h


class Twofold(nn.Module):
    """Uses its own layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.linear(self.norm(x)))
        return x + self.linear(F.gelu(self.norm(h)))


class CalledTwice(Net):
    """Each block is called twice, and uses its layers twice in each call."""

    def __init__(self) -> None:
        super().__init__(Twofold)

    def middle(self, h: Tensor) -> Tensor:
        return super().middle(super().middle(h))


class Tied(Net):
    """A weight that blocks use twice is one of the code around them, too."""

    def __init__(self) -> None:
        super().__init__(Twofold)
        for block in self.blocks:
            block.linear.weight = self.first.weight


class Appending(Block):
    def forward(self, states: list[Tensor]) -> Any:  # type: ignore[override]
        states.append(super().forward(states[-1]))


class Lists(Net):
    """Blocks give nothing back, and change a list."""

    def __init__(self) -> None:
        super().__init__(Appending)

    def middle(self, h: Tensor) -> Tensor:
        states = [h]
        for block in self.blocks:
            block(states)
        return torch.stack(states).sum(0)


class Noting(Block):
    def forward(self, x: Tensor, memory: dict[str, Tensor]) -> Any:  # type: ignore[override]
        y = super().forward(x)
        memory["sum"] = memory.get("sum", 0) + y
        return y


class Dicts(Net):
    """Blocks change a dict."""

    def __init__(self) -> None:
        super().__init__(Noting)

    def middle(self, h: Tensor) -> Tensor:
        memory: dict[str, Tensor] = {}
        for block in self.blocks:
            h = block(h, memory)
        return h + memory["sum"]


class Viewing(Block):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, y.view(-1)


class Views(Net):
    """Blocks return a tensor and a view of it, and both get gradients."""

    def __init__(self) -> None:
        super().__init__(Viewing)

    def middle(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            y, flat = block(h)
            h = y + flat.view_as(y) * 0.1
        return h


def loss_fn(output: Tensor, _: Any) -> Tensor:
    return output.square().mean()


def batch_of(step: int, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, WIDTH, generator=generator).requires_grad_(requires_grad)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Two steps: all that comes of them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found: dict[str, Tensor] = {}
    torch.manual_seed(1)
    for step in range(2):
        optimizer.zero_grad()
        loss = loss_fn(model(batch_of(step)), None)
        loss.backward()
        found[f"{step} loss"] = loss.detach()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"{step} {name}"] = parameter.grad.clone()
        optimizer.step()
    return found


def built(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    random.seed(0)
    return kind()


def differing(kind: Callable[[], nn.Module], engine: str) -> list[str]:
    """What differs from plain training, at half of the way between the smallest budget and the plain peak."""
    expected = trained(built(kind))
    model = built(kind)
    low = keepless.plan(model, batch_of(0), 1 << 30, loss_fn=loss_fn, engine=engine)
    budget = (low.smallest_budget + low.baseline_peak) // 2
    plan = keepless.plan(model, batch_of(0), budget, loss_fn=loss_fn, engine=engine)
    keepless.apply(model, plan)
    got = trained(model)
    assert expected.keys() == got.keys()
    return [name for name, tensor in expected.items() if not torch.equal(tensor, got[name])]


@pytest.mark.parametrize("kind", [OuterSum, Returns, ParameterGiven, CalledTwice, Tied, Attends])
def test_gradients_are_added_up_in_the_order_of_plain_autograd(kind: type[Net]) -> None:
    assert differing(kind, "blocks") == []


@pytest.mark.parametrize("kind", [Attends, Tied])
def test_a_backward_again_adds_up_gradients_in_the_same_order(kind: type[Net]) -> None:
    """A second backward replays the blocks' own code: its parts go on one by one, too."""
    grads = []
    for planned in (False, True):
        model = built(kind)
        if planned:
            keepless.fit(model, batch_of(0), 1 << 30, loss_fn=loss_fn, engine="blocks")
        torch.manual_seed(1)
        loss = loss_fn(model(batch_of(0)), None)
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert [name for name, grad in grads[0].items() if grad is not None and not torch.equal(grad, grads[1][name])] == []


def test_a_gradient_of_the_models_input_is_added_up_in_order() -> None:
    class Direct(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum().item() == 12345.0:
                x = x + 1
            return self.head(self.middle(x) + x * 3)

    grads = []
    for planned in (False, True):
        model = built(Direct)
        batch = batch_of(0, requires_grad=True)
        if planned:
            keepless.fit(model, batch, 1 << 30, loss_fn=loss_fn, engine="blocks")
        torch.manual_seed(1)
        loss_fn(model(batch), None).backward()
        assert batch.grad is not None
        grads.append(batch.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("kind", [Lists, Dicts, Views])
def test_blocks_that_cannot_be_segments_are_taken_as_they_are(kind: type[Net]) -> None:
    assert differing(kind, "auto") == []


@pytest.mark.parametrize(("kind", "why"), [(Lists, "list or dict"), (Dicts, "list or dict"), (Views, "views")])
def test_why_they_are_no_segments(kind: type[Net], why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        keepless.plan(built(kind), batch_of(0), 1 << 30, loss_fn=loss_fn, engine="blocks")


def test_a_model_that_changes_its_batch_is_not_captured() -> None:
    class Popping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.linear(batch.pop("x")).square().mean()

    with pytest.raises(CaptureError, match="list or dict"):
        keepless.plan(Popping(), keepless.Inputs({"x": batch_of(0)}), 1 << 30, engine="graph")


class Whole(Net):
    """The same without the break."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.first(x)))


class InFull(Block):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def autocast_step(model: nn.Module) -> list[Tensor | None]:
    """Gradients of a step whose forward alone is under autocast."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(model(batch_of(0)), None)
    loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(("kind", "engine"), [(Whole, "graph"), (Net, "blocks")])
def test_parts_in_full_precision_have_their_backward_in_full(kind: type[Net], engine: str) -> None:
    """Autocast is off in parts of the forward, and where the loop calls backward."""
    expected = autocast_step(built(lambda: kind(InFull)))
    model = built(lambda: kind(InFull))
    with torch.autocast("cpu", torch.bfloat16):
        plan = keepless.plan(model, batch_of(0), 1 << 30, loss_fn=loss_fn, engine=engine)
        assert "plain eager" in str(keepless.verify(model, batch_of(0), plan, loss_fn=loss_fn))
    keepless.apply(model, plan)
    assert all(torch.equal(a, b) for a, b in zip(expected, autocast_step(model), strict=True))


class WithAutocast(nn.Module):
    """Enters autocast itself."""

    def __init__(self, kind: type[Net], block: type[nn.Module]) -> None:
        super().__init__()
        self.net = kind(block)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


@pytest.mark.parametrize("block", [Block, InFull])
def test_blocks_are_captured_under_the_autocast_that_they_run_under(block: type[nn.Module]) -> None:
    expected = trained(built(lambda: WithAutocast(Net, block)))
    model = built(lambda: WithAutocast(Net, block))
    keepless.fit(model, batch_of(0), 1 << 30, loss_fn=loss_fn, engine="blocks")
    got = trained(model)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    segments = [segment for entry in model.forward.entries.values() for segment in entry.segments.values()]  # type: ignore[attr-defined]
    assert segments
    assert all(segment.entry is not None and segment.missed is None for segment in segments)


class WholeTwice(Whole):
    def middle(self, h: Tensor) -> Tensor:
        return super().middle(super().middle(h))


def test_weights_that_autocast_casts_once_for_several_uses() -> None:
    """Their gradients are added up in the lower precision: no captured part does that."""
    model = built(WholeTwice)
    expected = autocast_step(built(WholeTwice))
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(CaptureError, match="cache_enabled=False"):
            keepless.plan(model, batch_of(0), 1 << 30, loss_fn=loss_fn, engine="graph")
        keepless.fit(model, batch_of(0), 1 << 30, loss_fn=loss_fn)
    assert all(torch.equal(a, b) for a, b in zip(expected, autocast_step(model), strict=True))


def test_weights_that_autocast_casts_for_each_use_are_captured() -> None:
    grads = []
    for planned in (False, True):
        model = built(WholeTwice)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            if planned:
                keepless.fit(model, batch_of(0), 1 << 30, loss_fn=loss_fn, engine="graph")
            torch.manual_seed(1)
            loss = loss_fn(model(batch_of(0)), None)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("blocks", [3, [], "", [""], int, [3], "nowhere.*"])
def test_blocks_that_name_nothing(blocks: Any) -> None:
    with pytest.raises(ParameterError, match="blocks="):
        keepless.plan(built(Net), batch_of(0), 1 << 30, loss_fn=loss_fn, blocks=blocks)


def test_parts_are_named_in_the_models_order() -> None:
    plan = keepless.plan(built(Net), batch_of(0), 1 << 30, loss_fn=loss_fn)
    assert plan.parts[0].paths == ("blocks.0", "blocks.1", "blocks.2")


_ASIDE: list[torch.Tensor] = []


class PutsAside(torch.nn.Module):
    """A block that puts a part of the loss where the code around it looks."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)
        )
        self.router = torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What goes on; a loss is put aside."""
        _ASIDE.append(self.router(x).softmax(-1).mean(0).square().sum())
        out: torch.Tensor = self.net(x)
        return out


class LooksAside(torch.nn.Module):
    """Adds what its blocks put aside, and asks for data on the way, so that it has no graph."""

    def __init__(self, needs_all: bool) -> None:
        super().__init__()
        self.needs_all = needs_all
        self.blocks = torch.nn.ModuleList(PutsAside() for _ in range(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss."""
        _ASIDE.clear()
        for block in self.blocks:
            x = x + block(x)
        assert x.abs().max().item() < 1e9
        aside = torch.stack(_ASIDE).sum() if self.needs_all else sum(_ASIDE)
        return {"loss": x.square().mean() + aside}


@pytest.mark.parametrize("needs_all", [False, True])
def test_blocks_that_put_a_loss_aside_are_not_captured(needs_all: bool) -> None:
    """It would be lost: a list that is nobody's attribute is not seen, but the planned step's loss, or failure, is."""
    torch.manual_seed(0)
    model, batch = LooksAside(needs_all), {"x": torch.randn(64, 16)}
    expected = model(**batch)["loss"].detach()
    said = "stack expects a non-empty" if needs_all else f"of the model's own code one of {float(expected)}"
    with pytest.raises(CaptureError, match=said):
        keepless.plan(model, batch, "1GiB", engine="blocks", cache=False)
    plan = keepless.plan(model, batch, "1GiB", cache=False)
    assert plan.engine == "eager"
    assert "puts where code around it looks" in plan.signature["not_blocks"]
    assert keepless.verify(model, batch, plan, repeats=1).equal
