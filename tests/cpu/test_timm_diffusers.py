"""timm's and diffusers' own switches with keepless.checkpoint in them, and keepless.fit on their models."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import Batch, differences, five_steps, peak_of
from torch import nn

import keepless
from keepless.errors import InfeasibleBudget, IntegrationError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def timm_model() -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model("test_resnet", num_classes=8, drop_rate=0.1, drop_path_rate=0.1).train()


def timm_batches() -> list[Batch]:
    torch.manual_seed(2)
    return [(torch.randn(8, 3, 32, 32), torch.randint(0, 8, (8,))) for _ in range(5)]


def timm_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
        dropout=0.1,
    ).train()


def unet_batches() -> list[Batch]:
    """Noisy latents, times, text, noise."""
    torch.manual_seed(2)
    return [
        (torch.randn(4, 4, 8, 8), torch.randint(0, 1000, (4,)), torch.randn(4, 6, 16), torch.randn(4, 4, 8, 8))
        for _ in range(5)
    ]


def unet_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.mse_loss(model(*batch[:3], return_dict=False)[0], batch[3])


@pytest.fixture(scope="module")
def timm_plain() -> dict[str, Any]:
    return five_steps(timm_model, timm_batches(), timm_loss, lambda *_: None)


@pytest.fixture(scope="module")
def unet_plain() -> dict[str, Any]:
    return five_steps(unet, unet_batches(), unet_loss, lambda *_: None)


# ---- their switches


def test_timms_switch_counts_each_batch_once(timm_plain: dict[str, Any]) -> None:
    from keepless.integrations.timm import set_grad_checkpointing

    models = []

    def ours(model: nn.Module, *_: Any) -> None:
        set_grad_checkpointing(model)
        models.append(model)

    def theirs(model: nn.Module, *_: Any) -> None:
        model.set_grad_checkpointing(True)

    assert differences(timm_plain, five_steps(timm_model, timm_batches(), timm_loss, ours)) == []
    for model in models:
        set_grad_checkpointing(model, False)
    twice = differences(timm_plain, five_steps(timm_model, timm_batches(), timm_loss, theirs))
    assert any("running_mean" in name for name in twice)  # what torch's checkpoint does, which stands again


def test_timms_switch_keeps_less() -> None:
    from keepless.integrations.timm import set_grad_checkpointing

    peaks = {}
    for on in (False, True):
        model, batch = timm_model(), timm_batches()[0]
        set_grad_checkpointing(model, on)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        peaks[on] = peak_of(model, optimizer, lambda m=model, b=batch: timm_loss(m, b), *batch)
        set_grad_checkpointing(model, False)
    assert peaks[True] < 0.95 * peaks[False]


def test_timms_own_function_is_back_when_the_last_model_is_gone() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from keepless.integrations.timm import set_grad_checkpointing

    shared = timm.models._manipulate
    one, other = timm_model(), timm_model()
    set_grad_checkpointing(one)
    set_grad_checkpointing(other)
    set_grad_checkpointing(one, False)
    assert shared.torch is not torch
    assert shared.torch.nn is torch.nn
    del other
    gc.collect()
    assert shared.torch is torch
    with pytest.raises(IntegrationError, match="set_grad_checkpointing"):
        set_grad_checkpointing(nn.Linear(2, 2))


def test_diffusers_switch(unet_plain: dict[str, Any]) -> None:
    calls = []

    def recomputed(*args: Any) -> Any:
        calls.append(args[0])
        return keepless.checkpoint(*args, use_reentrant=False)

    def on(model: Any, *_: Any) -> None:
        model.enable_gradient_checkpointing(gradient_checkpointing_func=recomputed)

    assert differences(unet_plain, five_steps(unet, unet_batches(), unet_loss, on)) == []
    assert len(calls) >= 5


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
def test_diffusers_switch_takes_the_function_itself() -> None:
    peaks = {}
    for on in (False, True):
        model, batch = unet(), unet_batches()[0]
        if on:
            model.enable_gradient_checkpointing(gradient_checkpointing_func=keepless.checkpoint)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        peaks[on] = peak_of(model, optimizer, lambda m=model, b=batch: unet_loss(m, b), *batch)
    assert peaks[True] < 0.95 * peaks[False]


# ---- fit


def smallest(build: Any, batch: Batch, loss_fn: Any, inputs: Any) -> int:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(InfeasibleBudget) as failed:
        keepless.plan(model, inputs(batch), "1KiB", optimizer=optimizer, loss_fn=loss_fn, release_outputs=True)
    return failed.value.smallest_budget


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "batches", "loss_of", "loss_fn", "inputs"),
    [
        (timm_model, timm_batches, timm_loss, lambda b: lambda out, _: F.cross_entropy(out, b[1]), lambda b: b[0]),
        pytest.param(
            unet,
            unet_batches,
            unet_loss,
            lambda b: lambda out, _: F.mse_loss(out[0], b[3]),
            lambda b: keepless.Inputs(*b[:3], return_dict=False),
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["timm", "diffusers"],
)
def test_fit(build: Any, batches: Any, loss_of: Any, loss_fn: Any, inputs: Any, request: Any) -> None:
    plain = request.getfixturevalue("timm_plain" if build is timm_model else "unet_plain")
    given = batches()
    budget = smallest(build, given[0], loss_fn(given[0]), inputs)
    plans = []

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        options = {"optimizer": optimizer, "loss_fn": loss_fn(batch), "release_outputs": True}
        keepless.fit(model, inputs(batch), budget, on_plan=lambda plan: plans.append((plan, model)), **options)

    assert differences(plain, five_steps(build, given, loss_of, fit)) == []
    plan, model = plans[-1]
    assert plan.num_replays > 0
    assert plan.predicted_peak <= budget < plan.baseline_peak
    assert model.forward.counters.captures == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    measured = peak_of(
        model, optimizer, lambda: loss_of(model, given[0]), *given[0][: None if loss_of is unet_loss else 1]
    )
    assert measured <= budget
