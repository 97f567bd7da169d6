"""Bad input: a typed error that names the reason, and a model that is as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, cast

import models as zoo
import numpy as np
import pytest
import torch
from test_control import IDS, everything, same
from torch import nn

import keepless
from keepless.errors import BatchError, CaptureError, DataDependentError, LossError, ParameterError

X = torch.linspace(-2, 2, 48).reshape(6, 8)


@pytest.mark.parametrize(
    "budget",
    [True, False, -1, 0, 0.0, 1.5, -0.5, float("nan"), float("inf"), None, [], "8 bananas", "", "-1GB", "GiB", 2**80],
)
def test_budgets_that_cannot_be_read(budget: Any) -> None:
    """BudgetError, which is a ValueError too."""
    model = zoo.mlp()
    before = everything(model)
    with pytest.raises(keepless.BudgetError) as caught:
        keepless.plan(model, X, budget, cache=False)
    assert isinstance(caught.value, ValueError)
    assert same(before, everything(model))


@pytest.mark.parametrize("budget", [np.int64(2**40), np.float64(0.9), np.int32(2**30), torch.tensor(2**40)])
def test_numbers_of_numpy_are_budgets(budget: Any) -> None:
    """A number is a number."""
    assert keepless.plan(zoo.mlp(), X, budget, cache=False).num_replays == 0


@pytest.mark.parametrize("wrong", [None, "step.plan", 3, lambda x: x])
def test_what_is_no_model_and_no_plan(wrong: Any) -> None:
    """A path for a plan, a function for a model: typed errors that say what was given."""
    model = zoo.mlp()
    plan = keepless.plan(model, X, 2**40, cache=False)
    name = type(wrong).__name__
    with pytest.raises(ParameterError, match=f"The model is a {name}"):
        keepless.plan(wrong, X, 2**40)
    with pytest.raises(ParameterError, match=f"The model is a {name}"):
        keepless.apply(wrong, plan)
    for use in (keepless.apply, lambda model, plan: keepless.verify(model, X, plan)):
        with pytest.raises(keepless.PlanError, match=f"The plan is a {name}"):
            use(model, wrong)
    assert "forward" not in model.__dict__


def test_huge_and_tiny_budgets() -> None:
    """A budget beyond any device plans for everything kept; one byte is infeasible, with the smallest that works."""
    model = zoo.mlp()
    assert keepless.plan(model, X, 2**60, cache=False).num_replays == 0
    with pytest.raises(keepless.InfeasibleBudget) as caught:
        keepless.plan(model, X, 1000, cache=False)
    assert caught.value.smallest_budget >= caught.value.bound > 0
    assert caught.value.blocking
    keepless.plan(model, X, caught.value.smallest_budget, cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["keep_all", "every_k"])
def test_infeasible_for_one_solver(solver: str) -> None:
    """Another solver's refusal states its own lowest budget, which it can plan for, and the default planner's."""
    model, batch = zoo.TinyLM(), keepless.Inputs(IDS, labels=IDS)
    low = keepless.plan(model, batch, 2**40, cache=False).smallest_budget
    with pytest.raises(keepless.InfeasibleBudget, match=f"solver '{solver}': .* default planner's needs") as caught:
        keepless.plan(model, batch, low, solver=solver)
    assert caught.value.smallest_budget > low
    assert f"the default planner with {low} bytes" in str(caught.value)
    assert keepless.plan(model, batch, caught.value.smallest_budget, solver=solver).certificate.solver == solver


class Forward(nn.Module):
    """A forward of one's own over a layer."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.counter, self.seen, self.cache = 0, list[Any](), dict[str, Any]()
        self.hidden = [nn.Parameter(torch.ones(8))]
        self.generator = [torch.Generator()]
        self.run = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, self.layer(x))


def count(m: Any, h: torch.Tensor) -> torch.Tensor:
    m.counter += 1
    return h.sum()


def remember(m: Any, h: torch.Tensor) -> torch.Tensor:
    m.seen.append(h)
    return h.sum()


def cache(m: Any, h: torch.Tensor) -> torch.Tensor:
    m.cache["last"] = h
    return h.sum()


def replace_buffer(m: Any, h: torch.Tensor) -> torch.Tensor:
    m.mean = m.mean * 0.9 + h.detach().mean(0)
    return (h * m.mean).sum()


def seed_inside(m: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return (h * torch.rand(8)).sum()


def python_random(m: Any, h: torch.Tensor) -> torch.Tensor:
    return h.sum() * random.random()


def numpy_random(m: Any, h: torch.Tensor) -> torch.Tensor:
    return h.sum() * float(np.random.rand())


def branch(m: Any, h: torch.Tensor) -> torch.Tensor:
    return h.sum() if h.sum().item() > 0 else h.mean()


def fail(m: Any, h: torch.Tensor) -> torch.Tensor:
    raise ValueError("no such thing")


def fail_at_length(m: Any, h: torch.Tensor) -> torch.Tensor:
    raise ValueError("no such thing:\n- a\n- b")


FORWARDS: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "counter": (count, CaptureError, "counter"),
    "list": (remember, CaptureError, "seen"),
    "dict": (cache, CaptureError, "cache"),
    "buffer replaced": (replace_buffer, CaptureError, "mean"),
    "seed": (seed_inside, CaptureError, "manual_seed"),
    "python random": (python_random, CaptureError, "Python's random"),
    "numpy random": (numpy_random, CaptureError, "NumPy's random"),
    "item": (branch, DataDependentError, "test_bad_input.py"),
    "nonzero": (lambda m, h: h[h > 0].sum(), DataDependentError, "data"),
    "numpy": (lambda m, h: h.sum() * float(h.detach().numpy()[0, 0]), CaptureError, "numpy"),
    "raises": (fail, BatchError, "ValueError: no such thing"),
    "raises in lines": (fail_at_length, BatchError, "ValueError:\n    no such thing:\n    - a\n    - b"),
    "hidden parameter": (lambda m, h: (h * m.hidden[0]).sum(), CaptureError, "requires a gradient"),
    "own generator": (lambda m, h: (h * torch.rand(8, generator=m.generator[0])).sum(), CaptureError, "generator"),
    "not a scalar": (lambda m, h: h, LossError, "not a scalar"),
    "no gradient": (lambda m, h: h.sum().detach(), LossError, "without a gradient"),
    "a string": (lambda m, h: "loss", LossError, "loss"),
    "nothing": (lambda m, h: None, LossError, "loss"),
    "empty dict": (lambda m, h: {}, LossError, "loss"),
    "an object": (lambda m, h: (h.sum(), object()), CaptureError, "object"),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_that_cannot_be_planned(name: str) -> None:
    """The error names what is in the way; model, attributes and generators are as before, and it still trains."""
    forward, error, text = FORWARDS[name]
    model = Forward(forward)
    before = everything(model)
    lists = (list(model.seen), dict(model.cache))
    with pytest.raises(error, match=text):
        keepless.plan(model, X, "1GB", cache=False, engine="graph")
    assert same(before, everything(model))
    assert (model.seen, model.cache) == lists


BATCHES: dict[str, tuple[Any, str]] = {
    "wrong width": (torch.randn(6, 9), "RuntimeError"),
    "wrong dtype": (torch.randn(6, 8).double(), "Double"),
    "too many": ((X, X), "TypeError"),
    "none": ((), "TypeError"),
    "unknown keyword": ({"nonsense": X}, "TypeError"),
    "keys": ({1: X}, "keys"),
    "a number": (3, "int"),
    "None": (None, "NoneType"),
    "sparse": (X.to_sparse(), "sparse"),
    "an object": ((X, object()), "object"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_do_not_fit(name: str) -> None:
    """BatchError, with the forward's own complaint."""
    batch, text = BATCHES[name]
    model = zoo.mlp()
    before = everything(model)
    with pytest.raises(BatchError, match=text):
        keepless.plan(model, batch, "1GB", cache=False)
    assert same(before, everything(model))


def meta_part() -> nn.Module:
    model = zoo.mlp()
    model.get_submodule("module.0").to("meta")
    return model


def hooked() -> nn.Module:
    model = zoo.mlp()
    model.get_submodule("module.0").register_forward_hook(lambda *_: None)
    return model


def sparse_gradient() -> nn.Module:
    return Forward(lambda m, h: nn.functional.embedding(torch.tensor([1]), m.layer.weight, sparse=True).sum())


def checkpointing() -> nn.Module:
    model: Any = zoo.mlp()
    model.is_gradient_checkpointing = True
    return model  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "frozen": (lambda: zoo.mlp().requires_grad_(False), ParameterError, "no trainable parameter"),
    "no parameters": (nn.Tanh, ParameterError, "no trainable parameter"),
    "several devices": (meta_part, ParameterError, "several devices"),
    "hooks": (hooked, CaptureError, "hooks"),
    "sparse gradient": (sparse_gradient, CaptureError, "sparse"),
    "checkpointing": (checkpointing, CaptureError, "checkpoints already"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_planned(name: str) -> None:
    """The error names the reason."""
    make, error, text = MODELS[name]
    with pytest.raises(error, match=text):
        keepless.plan(make(), X, "1GB", cache=False, engine="graph")


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "not a scalar": (lambda out, _: out, "not a scalar"),
    "not a tensor": (lambda out, _: 1.0, "float"),
    "detached": (lambda out, _: out.detach().sum(), "without a gradient"),
    "unrelated": (lambda out, _: torch.ones((), requires_grad=True) * 2, "reaches no output"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_functions_that_are_none(name: str) -> None:
    """LossError says what came back."""
    loss_fn, text = LOSSES[name]
    with pytest.raises(LossError, match=text):
        keepless.plan(nn.Linear(8, 8), X, "1GB", loss_fn=loss_fn, cache=False)


def test_function_modes_are_refused() -> None:
    """A torch-function mode would act twice, or not at all."""

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model = keepless.fit(zoo.mlp(), X, "1GB", cache=False)
    with Mode(), pytest.raises(CaptureError, match="torch-function mode"):
        model(X)
    model(X).backward()


def test_planned_model_is_not_pickled() -> None:
    """Pickling names the way out."""
    import pickle

    model = keepless.fit(zoo.mlp(), X, "1GB", cache=False)
    with pytest.raises(keepless.PlanError, match="remove"):
        pickle.dumps(model)
    pickle.dumps(model.state_dict())


def test_optimizer_of_another_model() -> None:
    """Its bytes would be counted as none."""
    model, other = zoo.mlp(), zoo.mlp()
    with pytest.raises(ParameterError, match="none of the model's"):
        keepless.plan(model, X, "1GB", optimizer=torch.optim.AdamW(other.parameters()), cache=False)
    with pytest.raises(ParameterError, match="int"):
        keepless.plan(model, X, "1GB", optimizer=cast(Any, 5), cache=False)
