"""`keepless.checkpoint` around each block of models that people train: bit for bit as without, and less is saved."""

from __future__ import annotations

import random
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_models import LIBRARY, Case
from checkpoint_nets import OWN
from torch import Tensor

import keepless
from keepless.eager import checkpoint_counters, forget_regions, reset_checkpoint_counters

ZOO = {**LIBRARY, **OWN}


class Saved:
    """The tensors that a forward saves for its backward: distinct storages, without parameters and batch."""

    def __init__(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> None:
        known = [*model.parameters(), *model.buffers(), *batch.values()]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.holders: list[weakref.ref[_Held]] = []

    def pack(self, tensor: Tensor) -> _Held:
        """The pack hook."""
        held = _Held(tensor)
        self.holders.append(weakref.ref(held))
        return held

    def nbytes(self) -> int:
        """What is held now."""
        found = {}
        for reference in self.holders:
            held = reference()
            if held is not None:
                storage = held.tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    found[storage.data_ptr()] = storage.nbytes()
        return sum(found.values())


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _bits(tensor: Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), flat.numpy().tobytes()


def _seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def plain(case: Case) -> None:
    """As it is."""


def checkpointed(case: Case) -> None:
    """A checkpoint around each block."""
    case.install(keepless.checkpoint)


def trained(name: str, prepare: Callable[[Case], None], steps: int = 2) -> tuple[dict[str, Any], int, Case]:
    """So many optimizer steps: everything that comes of them, and the bytes saved at the end of the last forward."""
    _seed(0)
    case = ZOO[name]()
    model = case.model
    prepare(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found: dict[str, Any] = {}
    _seed(1)
    for step in range(steps):
        batch = case.batch(step)
        optimizer.zero_grad()
        saved = Saved(model, batch)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
            output, loss = case.loss(model, batch)
        nbytes = saved.nbytes()
        found[f"{step} output"], found[f"{step} loss"] = _bits(output), _bits(loss)
        loss.backward()
        for key, parameter in model.named_parameters():
            found[f"{step} gradient {key}"] = _bits(parameter.grad)
        optimizer.step()
    for key, tensor in model.state_dict().items():
        found[f"state {key}"] = _bits(tensor)
    for key, tensor in model.named_buffers():
        found[f"buffer {key}"] = _bits(tensor)
    found["draws"] = (_bits(torch.rand(4)), random.random(), float(np.random.rand()))
    return found, nbytes, case


@pytest.mark.parametrize("name", ["layer drop", "item branch"])
def test_later_steps_take_other_ways(name: str) -> None:
    """Eight steps of blocks whose later calls take ways that the watched one did not: bit for bit, and seen as such."""
    forget_regions()
    expected, _, _ = trained(name, plain, steps=8)
    reset_checkpoint_counters()
    got, _, case = trained(name, checkpointed, steps=8)
    assert [key for key in expected if got[key] != expected[key]] == []
    counters = checkpoint_counters()
    assert counters.regions == counters.recomputes == 8 * case.num_blocks
    assert counters.watched > case.num_blocks, "no later call took another way"


@pytest.mark.parametrize("name", ZOO)
def test_as_without_checkpoint(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps: outputs, losses, gradients, parameters, buffers, names, the next draws; less is saved."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="transformers|timm")
        expected, plain_nbytes, _ = trained(name, plain)
        again, _, _ = trained(name, plain)
        assert expected == again, "the model itself is not deterministic"
        forget_regions()
        reset_checkpoint_counters()
        got, nbytes, case = trained(name, checkpointed)
    assert list(got) == list(expected)
    assert [key for key in expected if got[key] != expected[key]] == []
    counters = checkpoint_counters()
    assert counters.regions >= 2 * case.num_blocks
    assert counters.recomputes == counters.regions
    assert counters.direct == 0
    assert nbytes < plain_nbytes


def planned(case: Case, budget: int) -> keepless.Plan:
    """A plan of module calls for the case's first batch."""
    batch, model = case.batch(0), case.model
    calls: list[keepless.Inputs] = []

    def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(keepless.Inputs(*args, **kwargs))
        raise _Noted

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        case.loss(model, batch)
    except _Noted:
        pass
    finally:
        handle.remove()

    def loss_fn(output: Any, _: Any) -> Tensor:
        return case.loss(lambda *args, **kwargs: output, batch)[1]  # type: ignore[arg-type]

    return keepless.plan(model, calls[0], budget, loss_fn=loss_fn, engine="eager")


class _Noted(Exception):
    """The call is known."""


FEW = ("albert", "convnext", "layer drop")
SOME = ("mixtral", "t5", "3D U-Net", "LSTM", "spectral norm", "item branch")
MARKED = [
    pytest.param(name, marks=() if name in FEW else pytest.mark.slow if name in SOME else pytest.mark.exhaustive)
    for name in ZOO
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MARKED)
def test_as_without_a_plan_of_module_calls(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same two steps at the smallest budget of `engine="eager"`, and half the way to everything kept."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="transformers|timm")
        expected, plain_nbytes, _ = trained(name, plain)
        for share in (0.0, 0.5):
            plans: list[keepless.Plan] = []

            def prepare(case: Case, share: float = share, plans: list[keepless.Plan] = plans) -> None:
                everything = planned(case, 1 << 32)
                low, high = everything.smallest_budget, everything.baseline_peak
                plans.append(planned(case, int(low + share * (high - low))))
                keepless.apply(case.model, plans[0])

            got, nbytes, case = trained(name, prepare)
            assert list(got) == list(expected)
            assert [key for key in expected if got[key] != expected[key]] == []
            (plan,) = plans
            assert plan.measured_peak is not None
            assert plan.measured_peak <= plan.budget.limits["device"]
            assert case.model.__dict__["forward"].planned_on_the_spot == 0
            if plan.num_replays:
                assert nbytes < plain_nbytes
