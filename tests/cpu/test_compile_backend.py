"""torch.compile(..., backend="keepless"): Dynamo's graph by a plan, with eager's bits."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import Batch, differences, five_steps, peak_of
from torch import nn

from keepless.errors import InfeasibleBudget, IntegrationError
from keepless.integrations.compiled import backend

if sys.version_info >= (3, 11):
    import tomllib

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


NAME = "keepless"
if NAME not in torch._dynamo.list_backends():  # a checkout that is not installed has no entry points
    torch._dynamo.register_backend(backend, name=NAME)


class Net(nn.Module):
    """Blocks with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.1)) for _ in range(3)]
        self.layers = nn.Sequential(*(module for block in blocks for module in block), nn.Linear(32, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def batches(size: int = 256) -> list[Batch]:
    torch.manual_seed(2)
    return [(torch.randn(size, 32), torch.randint(0, 8, (size,))) for _ in range(5)]


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(budget: Any, plans: list[Any], **options: Any) -> Any:
    def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Any:
        given = {"budget": budget, "optimizer": optimizer, "on_plan": plans.append, **options}
        return torch.compile(loss_of, backend=NAME, options=given, fullgraph=True)

    return prepare


@pytest.fixture(scope="module")
def floor() -> int:
    with pytest.raises(InfeasibleBudget) as failed:
        five_steps(Net, batches(), loss_of, compiled("1KiB", []))
    return failed.value.smallest_budget


@pytest.mark.slow
def test_eagers_bits_within_a_small_budget(floor: int) -> None:
    plans: list[Any] = []
    plain = five_steps(Net, batches(), loss_of, lambda *_: None)
    assert differences(plain, five_steps(Net, batches(), loss_of, compiled(floor, plans))) == []
    assert len(plans) == 2  # one for each model: five_steps goes on with another after the third step
    for plan in plans:
        assert plan.num_replays > 0
        assert plan.predicted_peak <= floor < plan.baseline_peak


@pytest.mark.slow
def test_measured_peaks(floor: int) -> None:
    peaks = []
    batch = batches()[0]
    for budget in (None, floor):
        torch.manual_seed(1)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = loss_of if budget is None else compiled(budget, [])(model, optimizer, batch)
        peaks.append(peak_of(model, optimizer, lambda m=model, s=step: s(m, batch), *batch))
    assert peaks[1] <= floor < peaks[0]


@pytest.mark.slow
def test_a_model_whose_forward_gives_the_loss_among_others(floor: int) -> None:
    """As transformers' do: logits before the loss. Of another batch size Dynamo makes a graph with symbols."""

    class Both(Net):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:  # type: ignore[override]
            logits = super().forward(x)
            return logits.detach(), F.cross_entropy(logits, y)

    losses = {}
    for planned in (False, True):
        torch.manual_seed(1)
        model, plans = Both(), []
        options = {"budget": "1GiB", "on_plan": plans.append}
        step = torch.compile(model, backend=NAME, options=options) if planned else model
        losses[planned] = []
        for size in (16, 24, 40):
            logits, loss = step(*batches(size)[0])
            loss.backward()
            losses[planned] += [logits, loss.detach(), model.layers[0].weight.grad.clone()]
        assert len(plans) == (2 if planned else 0)  # one for 16, one for any size
    assert all(torch.equal(a, b) for a, b in zip(losses[False], losses[True], strict=True))
    assert list(model.state_dict()) == list(Both().state_dict())


def test_evaluation_runs_the_graph_as_it_is() -> None:
    model = Net().eval()
    plans: list[Any] = []
    step = torch.compile(model, backend=NAME, options={"budget": "1GiB", "on_plan": plans.append})
    with torch.no_grad():
        assert torch.equal(step(torch.ones(4, 32)), model(torch.ones(4, 32)))
    assert plans == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (None, "needs a budget"),
        ({"budget": "1GiB", "mode": "fast"}, "no option 'mode'"),
        ({"budget": "1GiB", "rewrites": ("chunked_loss",)}, "takes no option 'rewrites'"),
    ],
)
def test_refused_options(options: Any, says: str) -> None:
    step = torch.compile(loss_of, backend=NAME, options=options)
    with pytest.raises(IntegrationError, match=says):
        step(Net(), batches(4)[0])


def test_a_graph_without_a_loss_is_refused_and_changes_nothing() -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = torch.compile(model, backend=NAME, options={"budget": "1GiB"})
    with pytest.raises(IntegrationError, match="returns the loss"):
        step(torch.ones(4, 32))

    def broken(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = model(x)
        torch._dynamo.graph_break()
        return F.cross_entropy(logits, y)

    with pytest.raises(IntegrationError, match="fullgraph"):
        torch.compile(broken, backend=NAME, options={"budget": "1GiB"})(*batches(4)[0])
    assert differences(before, dict(model.state_dict())) == []


@pytest.mark.exhaustive
def test_a_loss_function_of_the_outputs(floor: int) -> None:
    model, batch, plans = Net(), batches()[0], []
    options = {"budget": floor, "loss_fn": lambda out, _: F.cross_entropy(out[0], batch[1]), "on_plan": plans.append}
    step = torch.compile(model, backend=NAME, options=options)
    F.cross_entropy(step(batch[0]), batch[1]).backward()
    (plan,) = plans
    gradients = [p.grad.clone() for p in model.parameters()]
    assert plan.predicted_peak <= floor
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_entry_point() -> None:
    """torch.compile finds the name where the package is installed with it."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (value,) = project["entry-points"]["torch_dynamo_backends"].values()
    point = importlib.metadata.EntryPoint("keepless", value, "torch_dynamo_backends")
    assert point.load() is backend
