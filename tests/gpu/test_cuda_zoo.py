"""The zoo on a card, by each engine: plain eager's bits at a mid budget and at the smallest, within the budget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import zoo  # noqa: E402
import zoo_more  # noqa: E402

import keepless  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("deterministic"),
]


def frozen(workload: zoo.Workload) -> zoo.Workload:
    """With BatchNorm in evaluation mode."""
    for module in workload.model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    return workload


MODELS: dict[str, Callable[[], zoo.Workload]] = {
    **{name: lambda name=name: zoo.build(name) for name in zoo.BUILDERS},  # type: ignore[misc]
    "t5": lambda: zoo_more.t5(2, 64, 4, 64, 4),
    "moe": lambda: zoo_more.moe(2, 64, 4, 64, 4),
    "convnext": lambda: zoo_more.convnext((1, 1, 2, 1), 32, 64, 8),
    "resnet50 frozen": lambda: frozen(zoo.build("resnet50")),
    "rnn": lambda: zoo_more.rnn(24, 6, 32, 16),
}
CAPTURED = [name for name in MODELS if name != "moe"]
STEPS = 2
SMALL = 2 << 20
"""Bytes of kernels' own constants, which torch allocates once: as much as a hundredth of these small models."""


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings of kernels that have no deterministic form, and of models, are not what is asked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(name: str) -> zoo.Workload:
    torch.manual_seed(0)
    return MODELS[name]().to("cuda")


def trained(workload: zoo.Workload, autocast: Any) -> tuple[list[str], dict[str, str], int]:
    """Losses, everything that the steps change, and the highest bytes that they allocate."""
    trainer = zoo.Trainer(workload, "plain")
    torch.manual_seed(1)
    torch.cuda.reset_peak_memory_stats()
    for number in range(STEPS):
        trainer.optimizer.zero_grad()
        with autocast():
            inputs, targets = workload.batch(number)
            loss = workload.loss_of(workload.forward(inputs), targets)
        loss.backward()
        trainer.optimizer.step()
        trainer.losses.append(float(loss.detach()).hex())
        del inputs, targets, loss
    state = trainer.state()
    state["device generator"] = zoo.digest(torch.cuda.get_rng_state())
    return trainer.losses, state, torch.cuda.max_memory_allocated()


def bf16() -> Any:
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)


CASES = [
    *((name, "graph", nullcontext) for name in CAPTURED),
    *((name, "blocks", nullcontext) for name in MODELS if name != "rnn"),
    *((name, "eager", nullcontext) for name in ("gpt2", "resnet50", "unet3d", "t5", "moe", "rnn")),
    *((name, "graph", bf16) for name in ("gpt2", "vit", "llama", "resnet50", "unet3d")),
    *((name, "blocks", bf16) for name in ("llama", "resnet50")),
    *((name, "eager", bf16) for name in ("gpt2", "unet3d")),
]


@pytest.mark.parametrize(
    ("name", "engine", "autocast"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}{'-bf16' if case[2] is bf16 else ''}") for case in CASES],
)
def test_bits_and_peaks(name: str, engine: str, autocast: Any) -> None:
    with quiet():
        workload = build(name)
        weights = {key: tensor.to("cpu", copy=True) for key, tensor in workload.model.state_dict().items()}
        expected = trained(workload, autocast)
        workload.model.load_state_dict(weights)
        assert trained(workload, autocast)[:2] == expected[:2], "plain eager itself gives other bits each time"
        workload.model.load_state_dict(weights)
        workload.model.zero_grad()
        optimizer = torch.optim.AdamW(workload.model.parameters(), lr=1e-3)
        with autocast():
            everything = workload.plan(zoo.PLENTY, engine=engine, optimizer=optimizer)
            low, high = everything.smallest_budget, everything.baseline_peak
            low = int(low * (1.1 if name == "moe" else 1))  # its routes, and so its sizes, differ from step to step
            middle = int(low + 0.4 * max(high - low, 0))
            plans = [workload.plan(budget, engine=engine, optimizer=optimizer) for budget in (middle, low)]
        for plan in plans:
            workload.model.load_state_dict(weights)
            workload.model.zero_grad()
            torch.cuda.empty_cache()
            keepless.apply(workload.model, plan)
            losses, state, peak = trained(workload, autocast)
            keepless.remove(workload.model)
            print(
                f"{name} {engine}: low {low} high {high} predicted {plan.predicted_peak} measured {peak} reserved"
                f" {torch.cuda.max_memory_reserved()} budget {plan.budget.limits['device']} replays {plan.num_replays}"
            )
            assert losses == expected[0]
            assert {key for key in state if state[key] != expected[1][key]} == set()
            allocated = plan.allocation.allocated
            assert peak <= plan.budget.limits["device"]
            assert peak <= 1.01 * allocated + SMALL, (peak, allocated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["efficient", "flash", "cudnn"])
def test_attention_s_seeds_are_where_trials_make_them(op: str, dtype: Any) -> None:
    """Devices of every output of a real attention kernel, against what trials assume."""
    from keepless import _compat

    target = getattr(torch.ops.aten, f"_scaled_dot_product_{op}_attention").default
    query = torch.randn(2, 2, 64, 64, device="cuda", dtype=dtype)
    options = {"flash": (0.1, False, False), "efficient": (None, True, 0.1), "cudnn": (None, True, 0.1, False, False)}
    try:
        found = target(query, query, query, *options[op])
    except RuntimeError as error:
        pytest.skip(f"this kernel does not run here: {error}")
    where = {i for i, item in enumerate(found) if isinstance(item, torch.Tensor) and item.device.type == "cpu"}
    assert where == set(_compat.host_outputs(target))
