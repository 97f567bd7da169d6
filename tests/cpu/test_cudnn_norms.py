"""BatchNorm by cuDNN in a captured step: how its calls and its reserve are put together, with stand-ins for kernels."""

from __future__ import annotations

from typing import Any

import models as zoo
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import keepless
from keepless import _compat
from keepless.capture import Inputs, cudnn

aten = torch.ops.aten
MARK = 77
SEEN: list[set[int]] = []
"""What reserves held that backwards were given; those of trials hold zeros."""


def stand_in(x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float) -> Any:
    """torch's own kernel, with a reserve that tells whose it is."""
    if mean is None:
        found = (*aten.native_batch_norm.default(x, weight, bias, None, None, training, momentum, eps), None, None)
    else:
        found = aten._native_batch_norm_legit_functional.default(x, weight, bias, mean, var, training, momentum, eps)
    return (*found, torch.full((1024,), MARK, dtype=torch.uint8, device=x.device))


def stand_in_backward(grad: Any, x: Any, weight: Any, of_batch: Any, deviation: Any, eps: float, reserve: Any) -> Any:
    if not isinstance(reserve, _compat.FakeTensor):
        SEEN.append(set(reserve.tolist()))
    args = (grad, x, weight, None, None, of_batch, deviation, True, eps, [True, True, True])
    return aten.native_batch_norm_backward.default(*args)


def stand_in_inference(*args: Any) -> Any:
    return aten._native_batch_norm_legit_no_training.default(*args)


@pytest.fixture
def cudnn_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "runs_by_cudnn", lambda *args: True)
    monkeypatch.setattr(_compat, "batch_norm_reserve_nbytes", lambda x, training: 1024)
    monkeypatch.setattr(cudnn, "cudnn_batch_norm", stand_in)
    monkeypatch.setattr(cudnn, "cudnn_batch_norm_inference", stand_in_inference)
    monkeypatch.setattr(cudnn, "cudnn_batch_norm_backward", stand_in_backward)


@pytest.mark.slow
@pytest.mark.usefixtures("cudnn_everywhere")
def test_the_reserve_goes_from_each_norm_to_its_backward() -> None:
    """Also where a norm is replayed: the bits of plain eager, and the reserve's bytes counted."""
    model, batch = zoo.convnet(), torch.randn(4, 3, 12, 12)
    plan = keepless.plan(model, batch, "1GiB", engine="graph", cache=False)
    names = [op.name for op in plan.graph.ops]
    assert "keepless.stand_in" in names
    assert names.count("keepless.stand_in") == names.count("keepless.stand_in_backward")
    reserves = [value for value in plan.graph.values if value.name.endswith(".reserve")]
    assert [value.nbytes for value in reserves] == [1024] * names.count("keepless.stand_in")
    inputs = Inputs.of(batch)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for budget in (plan.baseline_peak, plan.smallest_budget):
        tight = keepless.plan(model, batch, budget, engine="graph", cache=False)
        keepless.apply(model, tight)
        model.load_state_dict(state)
        SEEN.clear()
        got = [zoo.run_step(model, inputs, seed) for seed in (1, 2)]
        assert [{MARK}] * 2 * names.count("keepless.stand_in") == SEEN
        model.load_state_dict(state)
        keepless.remove(model)
        again = [zoo.run_step(model, inputs, seed) for seed in (1, 2)]
        assert [one.differences(two) for one, two in zip(got, again, strict=True)] == [[], []]
    assert tight.num_replays


@pytest.mark.usefixtures("cudnn_everywhere")
def test_frozen_norms_run_by_cudnn_forward_only() -> None:
    """In evaluation mode the backward is torch's own."""
    model, batch = zoo.convnet(), torch.randn(4, 3, 12, 12)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    plan = keepless.plan(model, batch, "1GiB", engine="graph", cache=False)
    names = [op.name for op in plan.graph.ops]
    assert "keepless.stand_in_inference" in names
    assert "keepless.stand_in_backward" not in names
    assert keepless.verify(model, batch, plan).equal


@pytest.mark.usefixtures("cudnn_everywhere")
def test_norms_without_running_statistics_run_by_cudnn() -> None:
    """Those of instances, and of batches that keep none."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3),
        torch.nn.InstanceNorm2d(6, affine=True),
        torch.nn.ReLU(),
        torch.nn.BatchNorm2d(6, track_running_stats=False),
    )
    planned = keepless.with_loss(model, lambda output, _: output.square().mean())
    batch = torch.randn(4, 3, 12, 12)
    plan = keepless.plan(planned, batch, "1GiB", engine="graph", cache=False)
    names = [op.name for op in plan.graph.ops]
    assert names.count("keepless.stand_in") == names.count("keepless.stand_in_backward") == 2
    assert keepless.verify(planned, batch, plan).equal


def test_what_eager_takes_is_asked() -> None:
    """Of fakes, also where there is no card; never for tensors on the CPU."""
    if not torch.backends.cudnn.enabled or torch.version.cuda is None:
        pytest.skip("this torch has no cuDNN")
    with FakeTensorMode():
        try:
            x, weight = torch.empty(2, 4, 8, 8, device="cuda"), torch.empty(4, device="cuda")
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"this torch makes no fakes of a card: {error}")
        assert cudnn.runs_by_cudnn(x, weight, weight, weight, weight, True, 1e-5)
        assert not cudnn.runs_by_cudnn(x, None, None, weight, weight, True, 1e-5)
        with torch.backends.cudnn.flags(enabled=False):
            assert not cudnn.runs_by_cudnn(x, weight, weight, weight, weight, True, 1e-5)
    x, weight = torch.empty(2, 4, 8, 8), torch.empty(4)
    assert not cudnn.runs_by_cudnn(x, weight, weight, weight, weight, True, 1e-5)
