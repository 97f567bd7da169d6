"""Plans for a device that is not here: captured without weights, lowered to its ops, marked, refused by apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import capture
from torch import nn
from torch.nn.attention import SDPBackend

import keepless
from keepless.capture import Inputs, StepShape, flatten_inputs, lower, trace_step
from keepless.capture.target import Target, TargetFaking, attention_variant
from keepless.cost import find_device
from keepless.cost.model import Origin
from keepless.errors import BudgetError, DeviceError, InfeasibleBudget, ParameterError, PlanError
from keepless.ir import Effect, Graph, Kind


class Attention(nn.Module):
    """Heads of 64, optionally fewer for keys and values, with a mask, dropout, or both."""

    def __init__(
        self, heads: int = 4, groups: int = 4, dropout: float = 0.0, causal: bool = True, mask: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.dropout, self.causal, self.mask = heads, groups, dropout, causal, mask
        self.q = nn.Linear(256, heads * 64)
        self.kv = nn.Linear(256, 2 * groups * 64)
        self.out = nn.Linear(heads * 64, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, 64).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, self.groups, 64).permute(2, 0, 3, 1, 4)
        mask = torch.ones(length, length, dtype=torch.bool).tril() if self.mask else None
        y = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout, self.causal and mask is None, enable_gqa=self.groups != self.heads
        )
        return self.out(y.transpose(1, 2).flatten(2)).float().pow(2).mean()


def captured(model: nn.Module, *args: Any, capability: tuple[int, int] = (8, 9)) -> tuple[Graph, Target]:
    target = Target(capability)
    flat = flatten_inputs(Inputs(*args))
    faking = TargetFaking(torch.device("cpu"), target)
    traced = trace_step(model, flat, batch=args, loss_fn=None, grad_outputs=None, faking=faking)
    return lower(traced, flat, model, StepShape()).graph, target


def names(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops]


FLASH = "aten._scaled_dot_product_flash_attention"
EFFICIENT = "aten._scaled_dot_product_efficient_attention"


def test_half_attention_is_flash_s_with_its_saved_outputs() -> None:
    """Log-sums in float32, one per row; keys of fewer heads are not expanded; dropout is inside, and draws."""
    model = Attention(heads=4, groups=2, dropout=0.1).bfloat16()
    graph, target = captured(model, torch.randn(2, 48, 256).bfloat16())
    forward = next(op for op in graph.ops if op.name == f"{FLASH}.default")
    assert f"{FLASH}_backward.default" in names(graph)
    assert set(target.attention) == {"flash"}
    assert Effect.RNG in forward.effects
    values = [graph.values[v] for v in forward.outputs]
    assert (values[0].shape, values[1].shape, values[1].dtype) == ((2, 4, 48, 64), (2, 4, 48), "float32")
    assert not any("softmax" in name or "mask" in name for name in names(graph))
    keys = [value for value in graph.values if value.kind is Kind.ACTIVATION and value.shape == (2, 4, 48, 64)]
    assert len(keys) == 2, "beside the output and the query's gradient, keys of two heads were expanded to four"


def test_float32_masks_and_old_cards_take_the_efficient_one() -> None:
    x = torch.randn(2, 48, 256)
    graph, target = captured(Attention(dropout=0.1), x)
    assert set(target.attention) == {"efficient"}
    forward = next(op for op in graph.ops if op.name == f"{EFFICIENT}.default")
    assert graph.values[forward.outputs[1]].shape == (2, 4, 64)  # rows rounded to 32
    assert f"{EFFICIENT}_backward.default" in names(graph)
    graph, target = captured(Attention(mask=True).bfloat16(), x.bfloat16())
    assert set(target.attention) == {"efficient"}
    _, target = captured(Attention().half(), x.half(), capability=(7, 5))
    assert set(target.attention) == {"efficient"}
    _, target = captured(Attention().bfloat16(), x.bfloat16(), capability=(7, 5))
    assert set(target.attention) == {"math"}


@pytest.mark.parametrize(
    ("dtype", "head", "mask", "dropout", "causal", "keys", "capability", "variant"),
    [
        (torch.bfloat16, 128, False, 0.0, True, 16, (9, 0), "flash"),
        (torch.float16, 256, False, 0.0, False, 16, (8, 0), "flash"),
        (torch.float16, 256, False, 0.0, False, 16, (8, 9), "efficient"),
        (torch.bfloat16, 64, False, 0.0, True, 17, (8, 0), "efficient"),
        (torch.bfloat16, 64, False, 0.0, False, 17, (8, 0), "flash"),
        (torch.bfloat16, 320, False, 0.0, True, 16, (9, 0), "efficient"),
        (torch.float32, 66, False, 0.0, True, 16, (9, 0), "math"),
        (torch.float64, 64, False, 0.0, True, 16, (9, 0), "math"),
        (torch.float32, 64, True, 0.1, False, 16, (7, 0), "efficient"),
    ],
)
def test_which_attention_cuda_picks(
    dtype: torch.dtype,
    head: int,
    mask: bool,
    dropout: float,
    causal: bool,
    keys: int,
    capability: tuple[int, int],
    variant: str,
) -> None:
    q = torch.empty(1, 2, 16, head, dtype=dtype, device="meta")
    k = torch.empty(1, 2, keys, head, dtype=dtype, device="meta")
    bias = torch.empty(16, keys, dtype=dtype, device="meta") if mask else None
    with torch.nn.attention.sdpa_kernel(
        list(set(SDPBackend.__members__.values()) - {SDPBackend.CUDNN_ATTENTION, SDPBackend.ERROR})
    ):
        assert attention_variant(q, k, k, bias, dropout, causal, False, Target(capability)) == variant


NEW, OLD = {"release": (2, 14), "cudnn": 92400}, {"release": (2, 11), "cudnn": 91900}


@pytest.mark.parametrize(
    ("head", "value", "dropout", "keys", "facts", "capability", "variant"),
    [
        (64, 64, 0.0, 16, OLD, (9, 0), "cudnn"),
        (64, 64, 0.1, 16, OLD, (9, 0), "cudnn"),
        (64, 64, 0.1, 16, NEW, (9, 0), "flash"),
        (64, 64, 0.125, 16, NEW, (10, 0), "cudnn"),
        (64, 64, 0.0, 16, NEW, (8, 9), "flash"),
        (64, 64, 0.0, 16, NEW, (12, 0), "flash"),
        (64, 64, 0.0, 16, {"release": (2, 11), "cudnn": 91002}, (9, 0), "flash"),
        (66, 66, 0.0, 16, NEW, (9, 0), "flash"),
        (192, 192, 0.0, 16, OLD, (9, 0), "cudnn"),
        (192, 192, 0.0, 16, NEW, (9, 0), "flash"),
        (192, 128, 0.0, 16, NEW, (10, 0), "cudnn"),
        (256, 256, 0.0, 16, NEW, (9, 0), "cudnn"),
        (256, 256, 0.0, 16, OLD, (10, 0), "flash"),
        (64, 64, 0.0, 1, NEW, (9, 0), "flash"),
    ],
)
def test_where_cudnn_s_attention_comes_first(
    head: int, value: int, dropout: float, keys: int, facts: dict[str, Any], capability: tuple[int, int], variant: str
) -> None:
    q, k = (torch.empty(1, 2, length, head, dtype=torch.bfloat16, device="meta") for length in (16, keys))
    v = torch.empty(1, 2, keys, value, dtype=torch.bfloat16, device="meta")
    target = Target(capability, **facts)
    assert attention_variant(q, k, v, None, dropout, False, False, target) == variant
    torch.use_deterministic_algorithms(True)
    try:
        assert attention_variant(q, k, v, None, dropout, False, False, target) != "cudnn"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mask", [False, True])
def test_a_hopper_s_attention_is_cudnn_s_with_its_saved_outputs(mask: bool) -> None:
    """Heads, log-sums and gradients as they were captured on an H100 with torch 2.11 (dropout of 0.125 here)."""
    x = torch.randn(2, 48, 256).bfloat16()
    graph, target = captured(Attention(dropout=0.125, mask=mask).bfloat16(), x, capability=(9, 0))
    assert set(target.attention) == {"cudnn"}
    forward = next(op for op in graph.ops if op.name == "aten._scaled_dot_product_cudnn_attention.default")
    values = [graph.values[v] for v in forward.outputs]
    assert (values[0].shape, values[1].shape, values[1].dtype) == ((2, 4, 48, 64), (2, 4, 48, 1), "float32")
    assert Effect.RNG in forward.effects
    assert "aten._scaled_dot_product_cudnn_attention_backward.default" in names(graph)
    plan = keepless.plan(Attention(mask=mask).bfloat16(), x, "1GiB", on="h100")
    assert not plan.signature["on"]["unmapped"]
    assert plan.signature["on"]["attention"] == ["cudnn"]


def test_captures_for_here_are_as_before() -> None:
    """Stand-in kernels are gone after a capture, and after one that fails."""
    model, x = Attention(dropout=0.1), torch.randn(2, 16, 256)
    _, before = capture(model, x)
    captured(model, x)

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    with pytest.raises(keepless.CaptureError):
        captured(Broken(), x)
    _, after = capture(model, x)
    assert names(before.graph) == names(after.graph)
    assert not any("flash_attention.default" in name for name in names(after.graph))
    eager = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])
    assert torch.isfinite(eager).all()


class Net(nn.Module):
    """What autocast treats apart on CUDA: a norm, a softmax, a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.first(x))
        return self.second(y).softmax(-1).mul(0.5).bfloat16().sum()


def test_autocast_casts_by_cuda_s_lists() -> None:
    """On the CPU norm and softmax stay in bfloat16; on CUDA they run in float32, and so is what they save."""
    x = torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        _, here = capture(Net(), x)
        there, target = captured(Net(), x)

    def dtypes(graph: Graph) -> dict[str, str]:
        return {
            op.name: graph.values[op.outputs[0]].dtype for op in graph.ops if op.outputs and op.phase.value == "forward"
        }

    on_cpu, on_cuda = dtypes(here.graph), dtypes(there)
    assert on_cpu["aten.native_layer_norm.default"] == on_cpu["aten._softmax.default"] == "bfloat16"
    assert on_cuda["aten.native_layer_norm.default"] == on_cuda["aten._softmax.default"] == "float32"
    assert on_cuda["aten.sum.default"] == "float32"
    assert on_cuda["aten.addmm.default"] == "bfloat16"
    assert {"layer_norm", "softmax.int", "sum"} <= set(target.casts)


class Block(nn.Module):
    """A model with dropout whose output is its loss."""

    def __init__(self, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))
            for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.pow(2).mean()


@pytest.mark.slow
def test_a_plan_for_a_card_that_is_not_here() -> None:
    """Marked analytic, within its budget, with what it does not know; shares refer to that card's memory."""
    model = Block()
    x = torch.randn(8192, 256)
    optimizer = torch.optim.AdamW(model.parameters())
    widest = keepless.plan(model, x, 0.5, optimizer=optimizer, on="RTX 4090")
    assert widest.budget.limits["device"] == find_device("rtx4090").usable_nbytes // 2
    plan = keepless.plan(model, x, "256MiB", optimizer=optimizer, on=find_device("rtx4090"))
    assert plan.cost.origin is Origin.ANALYTIC
    assert plan.predicted_peak <= plan.budget.limits["device"]
    assert plan.num_replays > 0
    assert plan.on == "rtx4090"
    assert "ANALYTIC: planned for rtx4090" in str(plan)
    assert plan.capture is None
    assert "aten.native_dropout.default" in names(plan.graph)
    step = next(op for op in plan.graph.ops if op.name == "keepless.optimizer")
    assert plan.allocation is not None
    assert plan.allocation.reserved <= plan.budget.limits["device"]
    here = keepless.plan(model, x[:512], "1GiB", optimizer=optimizer)
    mine = next(op for op in here.graph.ops if op.name == "keepless.optimizer")
    assert plan.cost.scratch[step.id] > here.cost.scratch[mine.id], "on CUDA AdamW steps lists of tensors"


@pytest.mark.parametrize("budget", ["64KiB", "1MiB", "12MiB"])
def test_the_smallest_budget_that_an_error_states_is_one_of_reserved_bytes(budget: str) -> None:
    """However far below the tensors' own bytes the budget was: asked for, it is met."""
    model, batch = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)), torch.randn(256, 512)
    options: dict[str, Any] = {"loss_fn": lambda output, _: output.square().mean(), "on": "rtx3060"}
    with pytest.raises(keepless.InfeasibleBudget, match="reserved") as refused:
        keepless.plan(model, batch, budget, **options)
    needed = refused.value.smallest_budget
    assert f"({needed} bytes)" in str(refused.value)
    plan = keepless.plan(model, batch, needed, **options)
    assert plan.smallest_budget == needed
    with pytest.raises(keepless.InfeasibleBudget, match="Not even batch 256 fits") as too_large:
        keepless.max_batch(model, lambda n: torch.randn(n, 512), budget, low=256, **options)
    assert too_large.value.smallest_budget == needed


def test_the_allocator_s_settings_are_those_of_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block(), torch.randn(8192, 256)
    found = {}
    for config in ("", "expandable_segments:True"):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", config)
        allocation = keepless.plan(model, x, "1GiB", on="h100").allocation
        assert allocation is not None
        assert allocation.workspaces == 32 << 20
        found[config] = allocation.mode
    assert found == {"": "segments", "expandable_segments:True": "expandable segments"}


def test_optimizers_that_step_in_the_backward() -> None:
    """Each parameter's update is priced by its bytes; whole gradients never stand together."""
    model, x = Block(), torch.randn(8192, 256)
    optimizer = torch.optim.AdamW(model.parameters())
    plan = keepless.plan(model, x, "1GiB", optimizer=optimizer, on="l40s", rewrites=["optimizer_in_backward"])
    updates = [op for op in plan.graph.ops if op.name == "keepless.update"]
    assert len(updates) == len(list(model.parameters()))
    assert all(plan.cost.seconds[op.id] > 0 for op in updates)


def test_nothing_runs_by_it_and_it_says_how_to_go_on(tmp_path: Path) -> None:
    model, x = Block(), torch.randn(8192, 256)
    plan = keepless.plan(model, x, "1GiB", on="rtx4090")
    plan.save(tmp_path / "card.plan")
    loaded = keepless.load(tmp_path / "card.plan")
    assert (loaded.on, loaded.cost.origin) == ("rtx4090", Origin.ANALYTIC)
    for one in (plan, loaded):
        for use in (
            lambda one=one: keepless.apply(model, one),
            lambda one=one: keepless.verify(model, x, one),
            lambda one=one: keepless.timeline(model, x, one),
        ):
            with pytest.raises(PlanError, match=r"keepless\.plan\(model, batch, 1073741824\)"):
                use()
    assert "forward" not in model.__dict__


def test_planning_elsewhere_needs_no_weights_and_leaves_no_trace() -> None:
    with torch.device("meta"):
        model, x = Block(), torch.empty(8192, 256)
    plan = keepless.plan(model, x, "1GiB", optimizer=torch.optim.AdamW(model.parameters()), on="h100")
    real, y = Block(), torch.randn(8192, 256)
    before = {name: p.clone() for name, p in real.named_parameters()}
    state = torch.get_rng_state()
    again = keepless.plan(real, y, "1GiB", optimizer=torch.optim.AdamW(real.parameters()), on="h100")
    assert again.graph == plan.graph
    assert again.cost.seconds == plan.cost.seconds
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in real.named_parameters())


@pytest.mark.slow
def test_curves_for_a_card_that_is_not_here() -> None:
    curve = keepless.curve(Block(), torch.randn(8192, 256), points=4, strategies=(), on="l4")
    assert curve.as_dict()["costs_origin"] == "analytic"
    assert "ANALYTIC: planned for l4" in str(curve)
    plan = curve.plan("512MiB")
    assert plan.on == "l4"
    assert plan.capture is None
    assert curve.plan(0.9).budget.limits["device"] == int(0.9 * find_device("l4").usable_nbytes)


@pytest.mark.slow
def test_budgets_of_a_card_s_curve_are_those_of_its_plans() -> None:
    """What the allocator holds counts: a plan for a stated budget is no slower than stated, and fits."""
    options: dict[str, Any] = {"points": 5, "strategies": (), "on": "l4"}
    curve = keepless.curve(Block(depth=6), torch.randn(8192, 256), **options)
    budgets = [point.budget for point in curve.points]
    assert budgets == sorted(budgets)
    assert budgets[0] <= curve.smallest_budget
    for budget, seconds in [*((p.budget, p.seconds) for p in curve.points), (curve.smallest_budget, float("inf"))]:
        plan = curve.plan(budget)
        assert plan.predicted_seconds <= seconds
        assert plan.allocation is not None
        assert plan.allocation.reserved < budget
        assert plan.smallest_budget <= budget
    assert curve.plan(curve.baseline_peak).num_replays == 0
    with pytest.raises(InfeasibleBudget) as caught:
        curve.plan(budgets[0] - 1)
    assert caught.value.smallest_budget == budgets[0]


def test_the_caller_s_own_loss_is_run_on_fakes() -> None:
    """Its scratch counts: a cross entropy over logits makes a copy of them, at least."""
    model = nn.Linear(64, 1000)
    x = torch.randn(128, 64)
    target = torch.zeros(128, dtype=torch.long)
    plan = keepless.plan(model, x, "1GiB", loss_fn=lambda output, _: F.cross_entropy(output, target), on="t4")
    loss = plan.graph.loss_op
    assert loss is not None
    assert plan.cost.scratch[loss] >= 128 * 1000 * 4
    assert plan.cost.seconds[loss] > 0


def test_what_cannot_be_planned_elsewhere_is_refused(tmp_path: Path) -> None:
    model, x = Block(), torch.randn(8192, 256)
    with pytest.raises(DeviceError, match="Near it: rtx4090"):
        keepless.plan(model, x, "1GiB", on="rtx409")
    with pytest.raises(ParameterError, match="on= plans a captured step"):
        keepless.plan(model, x, "1GiB", on="l4", engine="eager")
    with pytest.raises(ParameterError, match="land=True runs"):
        keepless.plan(model, x, "1GiB", on="l4", land=True)
    with pytest.raises(InfeasibleBudget) as caught:
        keepless.plan(model, x, "1MiB", on="l4")
    assert caught.value.smallest_budget > 1 << 20
    with pytest.raises(BudgetError):
        keepless.plan(model, x, 1.5, on="l4")
    file = tmp_path / "cpu.json"
    file.write_text('{"type": "cpu", "memory": "8GiB", "bandwidth": 1e10, "rates": {"float32": 1e11}, "source": "x"}')
    with pytest.raises(DeviceError, match="is a cpu"):
        keepless.plan(model, x, "1GiB", on=file)


def test_fused_modules_are_not_mapped_and_widen_the_spread() -> None:
    class Recurrent(nn.Module):
        def __init__(self, kind: type[nn.Module]) -> None:
            super().__init__()
            self.cell = kind(16, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.cell(x)[0].pow(2).mean()

    x = torch.randn(6, 4, 16)
    unknown = keepless.plan(Recurrent(nn.GRU), x, "1GiB", on="rtx3090")
    known = keepless.plan(Recurrent(nn.LSTM), x, "1GiB", on="rtx3090")
    assert unknown.cost.spread > known.cost.spread == find_device("rtx3090").spread
    assert "not known what runs there" in str(unknown)
    assert "aten._cudnn_rnn.default" in names(known.graph)
