"""Predicted bytes of plans of module calls, beside those of their steps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import keepless
from keepless.measure.parts import memory_parts
from keepless.measure.steps import increments


def plan_between(model: nn.Module, batch: Any, share: float, **options: Any) -> keepless.Plan:
    """The plan for a budget between the smallest and everything kept, whose measured peak is within it."""
    ends = keepless.plan(model, batch, "1GiB", **options)
    budget = int(ends.smallest_budget + share * (ends.baseline_peak - ends.smallest_budget))
    plan = keepless.plan(model, batch, budget, **options)
    assert plan.measured_peak is not None
    assert plan.measured_peak <= budget
    return plan


class LargeHead(nn.Module):
    """Logits that are larger than all else, and a loss of the model's own."""

    def __init__(self, width: int = 64, classes: int = 1024) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(3)
        )
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and logits."""
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(x)
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["eager", "blocks"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("own_loss", [True, False])
def test_outputs_that_a_replay_would_make_again_count_once(engine: str, share: float, own_loss: bool) -> None:
    """The caller holds the logits throughout; whether the head runs again or not, the prediction is near."""
    torch.manual_seed(0)
    model = LargeHead()
    batch = {"x": torch.randn(1024, 64), "labels": torch.randint(0, 1024, (1024,))}

    def loss_fn(output: Any, _: Any) -> torch.Tensor:
        return output["loss"]  # type: ignore[no-any-return]

    options: dict[str, Any] = {"engine": engine, "cache": False, "loss_fn": None if own_loss else loss_fn}
    plan = plan_between(model, batch, share, **options)
    assert plan.measured_peak is not None
    assert plan.predicted_peak == pytest.approx(plan.measured_peak, rel=0.01)


class LooksAside(LargeHead):
    """Looks at what its blocks give, in a branch of the graph that no loss depends on."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """As it was."""
        for block in self.blocks:
            x = x + block(x)
            if x.abs().max().item() > 1e6:
                raise AssertionError
        return {"loss": F.cross_entropy(self.head(x)[:, :8], labels % 8)}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["eager", "blocks"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_a_dead_branch_saved_is_not_held(engine: str, share: float) -> None:
    """`x.abs().max().item()` saves `x.abs()` only until its graph is gone, before the next block."""
    torch.manual_seed(0)
    model = LooksAside(width=128, classes=16)
    batch = {"x": torch.randn(1024, 128), "labels": torch.randint(0, 1024, (1024,))}
    plan = plan_between(model, batch, share, engine=engine, cache=False)
    assert plan.measured_peak is not None
    assert plan.predicted_peak == pytest.approx(plan.measured_peak, rel=0.015)


class Dropped(nn.Module):
    """Under autocast no op saves what the modules are given: what it saves was cast."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1), nn.Sequential(nn.Linear(width, width), nn.ReLU()))
            for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A scalar."""
        for block in self.blocks:
            x = block(x).float() * 0.5
        return x.square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_kept_call_holds_no_input_and_casts_end_with_autocast(is_bf16: bool, share: float) -> None:
    """A recomputed call holds its inputs and a generator's state; the step leaves autocast before the backward."""
    torch.manual_seed(0)
    model = Dropped()
    batch = torch.randn(4096, 128)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        plan = plan_between(model, batch, share, engine="eager")
    assert plan.measured_peak is not None
    assert plan.predicted_peak == pytest.approx(plan.measured_peak, rel=0.005)
    assert plan.num_replays == 0 or share < 1.0


class CastsInside(nn.Module):
    """Autocast begins and ends inside the forward, as in what accelerate prepared; weights outweigh activations."""

    def __init__(self, width: int = 192, classes: int = 512) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(3)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of logits in half precision."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for block in self.blocks:
                x = x + block(x)
            logits = self.head(x)
        return {"loss": F.cross_entropy(logits.float(), labels)}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["eager", "blocks"])
@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=pytest.mark.exhaustive), 1.0])
def test_whoever_holds_the_cast_of_a_weight_sends_it_no_gradient(engine: str, share: float) -> None:
    """Autocast holds all casts until it ends, behind the last block; their gradients come from the blocks' own
    backwards, one block at a time."""
    torch.manual_seed(0)
    model = CastsInside()
    batch = {"x": torch.randn(256, 192), "labels": torch.randint(0, 512, (256,))}
    plan = plan_between(model, batch, share, engine=engine, cache=False)
    assert plan.measured_peak is not None
    # Seen: eager +1.2 %, 0.0 and 0.0 % at the three shares, blocks +0.2 %; eager +5 to +12 % without.
    assert 0.999 * plan.measured_peak <= plan.predicted_peak <= 1.015 * plan.measured_peak


class SumsAround(nn.Module):
    """The sums with what goes around a block stand outside of it; a block in the middle outweighs the others."""

    def __init__(self, width: int = 64, times: tuple[int, ...] = (1, 16, 1)) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, more * width), nn.GELU(), nn.Linear(more * width, width)) for more in times
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss."""
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return {"loss": x.square().mean()}


class SumsInPlace(SumsAround):
    """The code around the blocks saves something, too, and both parts of a sum get one gradient."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss."""
        x = self.embed(x)
        for block in self.blocks:
            new = block(x)
            new += x
            x = torch.relu(new)
        return {"loss": x.square().mean()}


Body = Callable[[nn.ModuleList, torch.Tensor], torch.Tensor]


class Around(nn.Module):
    """Blocks of other sizes, and some code around them."""

    def __init__(self, body: Body, width: int = 64, times: tuple[int, ...] = (1, 16, 1), grows: bool = False) -> None:
        super().__init__()
        self.body = body
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width * (1 + grows * place), more * width), nn.GELU(), nn.Linear(more * width, width)
            )
            for place, more in enumerate(times)
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss."""
        return {"loss": self.body(self.blocks, self.embed(x)).square().mean()}


def _scaled(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = 0.7 * x + 0.5 * block(x)
    return x


def _viewed(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    x = x.view(8, -1, x.shape[-1])
    for block in blocks:
        x = x + block(x.reshape(-1, x.shape[-1])).reshape(x.shape)
    return x


def _several(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    first = x
    for block in blocks:
        x = x + first + block(x)
    return x


def _dense(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    found = [x]
    for block in blocks:
        found.append(block(torch.stack(found).sum(0)))
    return torch.stack(found).sum(0)


def _joined(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = torch.cat([x, block(x)], 1)
    return x


def _around_a_copy(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """Nobody saves what stands around a block, and no call is given it."""
    for block in blocks:
        x = x + block(x * 1.0)
    return x


class _KeepsItsOwn(torch.autograd.Function):
    """Keeps what its backward needs without autograd's knowledge."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.own = x.cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        own: torch.Tensor = ctx.own
        return gradient * own


def _kept_by_functions(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = x + block(_KeepsItsOwn.apply(x))
    return x


def _beside_a_cast(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """A cast of a weight that is none of autocast's."""
    weight = blocks.get_parameter("1.0.weight").detach().double()
    for block in blocks:
        x = x + block(x)
    return x + weight.sum().float()


def _with_aside(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    aside = x.new_zeros(())
    for block in blocks:
        new = block(x)
        aside = aside + new.abs().mean()
        x = x + new
    return x + aside


@pytest.mark.parametrize(
    "body",
    [_scaled, _viewed, _several, _dense, _joined, _with_aside, _around_a_copy, _kept_by_functions, _beside_a_cast],
)
def test_gradients_of_other_skips_are_foretold(body: Body) -> None:
    """At the smallest budget, which the middle block's backward decides on."""
    torch.manual_seed(0)
    model = Around(body, grows=body is _joined)
    plan = plan_between(model, {"x": torch.randn(2048, 64)}, 0.0, engine="blocks", cache=False)
    assert plan.measured_peak is not None
    assert 0.999 * plan.measured_peak <= plan.predicted_peak <= 1.015 * plan.measured_peak


class KeepsFeatures(Around):
    """Keeps features for others to read: copies, what goes into blocks, or what comes out of them."""

    which = "copies"

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss."""
        self.features: list[torch.Tensor] = []
        x = self.embed(x)
        for block in self.blocks:
            new = block(x)
            x = x + new
            self.features.append({"copies": x * 2, "given": x, "returned": new}[self.which].detach())
        return {"loss": x.square().mean()}


@pytest.mark.parametrize("which", ["copies", "given", "returned"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_features_that_a_model_keeps_stand_to_the_end(which: str, share: float) -> None:
    torch.manual_seed(0)
    model = KeepsFeatures(_through, times=(1, 4, 4, 1))
    model.which = which
    plan = plan_between(model, {"x": torch.randn(2048, 64)}, share, engine="blocks", cache=False)
    assert plan.measured_peak is not None
    assert 0.999 * plan.measured_peak <= plan.predicted_peak <= 1.015 * plan.measured_peak


class ReadsTables(Around):
    """Reads and changes tensors that stand since before the step, and that are none of its state."""

    def __init__(self) -> None:
        super().__init__(_through)
        self.table = torch.randn(8192, 64)
        self.mean = torch.zeros(2048, 64)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss."""
        self.mean.mul_(0.9).add_(x.detach(), alpha=0.1)
        return super().forward(x + self.table[: len(x)])


def test_tensors_that_stood_before_the_step_are_not_made_in_it() -> None:
    torch.manual_seed(0)
    plan = plan_between(ReadsTables(), {"x": torch.randn(2048, 64)}, 0.0, engine="blocks", cache=False)
    assert plan.measured_peak is not None
    assert 0.999 * plan.measured_peak <= plan.predicted_peak <= 1.015 * plan.measured_peak


@pytest.mark.parametrize(("share", "kind"), [(0.0, SumsAround), (1.0, SumsAround), (0.0, SumsInPlace)])
def test_gradients_that_go_around_a_block_are_foretold(share: float, kind: type[SumsAround]) -> None:
    """They stand throughout the block's backward, once: 0.4 of 19.8 MB here, at the smallest budget."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(2048, 64)}
    plan = plan_between(kind(), batch, share, engine="blocks", cache=False)
    assert plan.measured_peak is not None
    assert 0.999 * plan.measured_peak <= plan.predicted_peak <= 1.015 * plan.measured_peak


class TiedHead(nn.Module):
    """An embedding whose weight is the head's, too: half of its gradient waits for the other through all blocks."""

    def __init__(self, width: int = 64, words: int = 2048) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of the first words."""
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return {"loss": F.cross_entropy(self.head(x[: len(labels)]).float(), labels)}


@pytest.mark.parametrize(("engine", "is_bf16"), [("eager", False), ("eager", True), ("blocks", False)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_part_of_a_tied_gradient_waits_for_the_rest(engine: str, is_bf16: bool, accumulate: bool) -> None:
    """Whether or not autocast cast the weight, and whether or not a gradient stands to which the sum is added.

    By a plan of blocks what goes into the head stands until its backward. Here it is gone before: 128 KiB, 3.3 %.
    """
    torch.manual_seed(0)
    model = TiedHead()
    batch = {"ids": torch.randint(0, 2048, (512,)), "labels": torch.randint(0, 2048, (8,))}
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        plan = keepless.plan(model, batch, "1GiB", engine=engine, accumulate=accumulate, cache=False)
    assert plan.measured_peak is not None
    spare = 0 if engine == "eager" else batch["ids"].numel() * 64 * 4
    assert 0.99 * plan.measured_peak <= plan.predicted_peak <= 1.01 * plan.measured_peak + spare
    moved = {value.name: value.nbytes for value in plan.graph.values}
    assert ("sum.words.weight" in moved) is accumulate


class TiedBlocks(Around):
    """All blocks have the same two weights: their gradients wait from the last block's backward on."""

    def __init__(self) -> None:
        super().__init__(_through, times=(4, 4, 4, 4))
        for block in self.blocks:
            assert isinstance(block, nn.Sequential)
            block[0].weight, block[2].weight = self.blocks[0][0].weight, self.blocks[0][2].weight


def _through(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = x + block(x)
    return x


@pytest.mark.parametrize("accumulate", [False, True])
def test_weights_of_several_blocks_have_one_gradient(accumulate: bool) -> None:
    """Of each block in the backward a part: the first stands, or the sum for a gradient that stands already."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(2048, 64)}
    plan = plan_between(TiedBlocks(), batch, 0.0, engine="blocks", accumulate=accumulate, cache=False)
    assert plan.measured_peak is not None
    assert 0.999 * plan.measured_peak <= plan.predicted_peak <= 1.005 * plan.measured_peak


class _Ring:
    """An object that only the garbage collector frees."""

    def __init__(self) -> None:
        self.itself, self.tensor = self, torch.ones(4096)


@pytest.mark.parametrize("every", [1, 100_000])
def test_bytes_do_not_depend_on_when_python_collects(every: int) -> None:
    """Neither rings from before the call nor its own are freed in the middle of it."""
    device, before = torch.device("cpu"), gc.get_threshold()
    rings = [_Ring() for _ in range(20)]

    def call() -> list[torch.Tensor]:
        for _ in range(20):
            _Ring()
        return [torch.ones(1024) for _ in range(20)]

    gc.set_threshold(every)
    try:
        del rings
        assert increments(call, device) == 20 * 4 * (4096 + 1024)
        parts = memory_parts(lambda mark: (call(), mark(0), call()), device)
        assert [part.peak for part in parts] == [20 * 4 * (4096 + 1024), 2 * 20 * 4 * (4096 + 1024)]
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler's own
def test_blocks_that_are_compiled_in_place_run_as_planned() -> None:
    """`module.compile()` goes around a module's forward: captured blocks became checkpoints, and rose higher."""
    torch.manual_seed(0)
    model, batch = Around(_through, times=(4, 4, 4)), {"x": torch.randn(1024, 64)}
    for block in model.blocks:
        block.compile(backend="aot_eager")
    before = [block._compiled_call_impl for block in model.blocks]
    expected = model(**batch)["loss"]
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    plan = plan_between(model, batch, 0.0, engine="blocks", cache=False)
    seen = keepless.verify(model, batch, plan)
    assert seen.equal
    assert seen.measured_peak <= plan.budget.limits["device"]
    keepless.apply(model, plan)
    losses: list[torch.Tensor] = []

    def step() -> None:
        losses.append(model(**batch)["loss"])
        losses[-1].backward()

    assert plan.graph.start_nbytes + increments(step, torch.device("cpu")) <= plan.budget.limits["device"]
    assert torch.equal(losses[0], expected)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True) if p.grad is not None)
    keepless.remove(model)
    assert [block._compiled_call_impl for block in model.blocks] == before
