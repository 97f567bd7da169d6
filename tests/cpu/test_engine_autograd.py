"""A planned step under everything that autograd can ask of it, against plain eager."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import models as zoo
import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import nn

import keepless
from keepless.capture import Inputs
from keepless.errors import ReplayError, StaleTensorError, StepError
from keepless.execute.codegen import STEP_FILE
from keepless.execute.nodes import Step

X = torch.linspace(-2, 2, 48).reshape(6, 8)
Y = X.flip(0).contiguous()
IDS = torch.arange(18).remainder(23).reshape(2, 9)
LM = Inputs(IDS, labels=IDS)


class Aux(nn.Module):
    """A loss, and outputs that it does not depend on, one with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.aside = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h = F.dropout(torch.tanh(self.trunk(x)), 0.3)
        return self.head(h).square().mean(), self.aside(h), h


class Saved(nn.Module):
    """Returns an activation that its backward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(self.layer(x))
        return h.square().sum(), h


def pair(make: Callable[[], nn.Module] = zoo.mlp, batch: Any = X, seed: int = 3) -> tuple[nn.Module, nn.Module]:
    """A plain model and a planned copy."""
    plain = make()
    return plain, zoo.planned(copy.deepcopy(plain), batch, seed)


def both(plain: Any, subject: Any, run: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Runs on both from equal generators; the generators must be equal afterwards."""
    results = []
    states = []
    for model in (plain, subject):
        for part in model if isinstance(model, tuple) else (model,):
            part.zero_grad()
        torch.manual_seed(1)
        results.append(run(model))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    return results[0], results[1]


def check_grads(plain: nn.Module, subject: nn.Module) -> None:
    for (name, p), (_, q) in zip(plain.named_parameters(), subject.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or zoo.same_bits(p.grad, q.grad), name


def counters(model: nn.Module) -> Any:
    return model.__dict__["forward"].counters


def live_steps() -> int:
    """Generated programs that have not ended."""
    return sum(type(o).__name__ == "generator" and o.gi_code.co_filename == STEP_FILE for o in gc.get_objects())


@pytest.mark.parametrize("name", ["mlp", "conv", "lm"])
def test_two_backwards(name: str) -> None:
    """retain_graph gives the same gradients twice; a third backward is autograd's error."""
    make, batch = {"mlp": (zoo.mlp, X), "conv": (zoo.convnet, torch.randn(2, 3, 12, 12)), "lm": (zoo.TinyLM, LM)}[name]
    plain, subject = pair(make, batch)
    inputs = Inputs.of(batch)

    def run(model: nn.Module) -> None:
        loss = zoo.loss_in(model(*inputs.args, **inputs.kwargs))
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="a second time"):
            loss.backward()

    both(plain, subject, run)
    check_grads(plain, subject)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), subject.buffers(), strict=True))
    assert counters(subject).replays == 1


def test_used_twice_without_retain() -> None:
    """A second backward without retain_graph is an error, and the next step is exact."""
    plain, subject = pair()
    loss = subject(X)
    loss.backward()
    with pytest.raises(StepError, match="retain_graph=True"):
        loss.backward()
    both(plain, subject, lambda m: m(X).backward())
    check_grads(plain, subject)


def test_second_derivatives() -> None:
    """Gradients of gradients of all parameters."""
    plain, subject = pair()

    def run(model: nn.Module) -> None:
        grads = torch.autograd.grad(model(X), list(model.parameters()), create_graph=True)
        sum((g.square().sum() for g in grads), torch.zeros(())).backward()

    both(plain, subject, run)
    check_grads(plain, subject)


@pytest.mark.parametrize("how", ["twice", "second derivatives", "another layout"])
@pytest.mark.filterwarnings("ignore:A gradient from outside:UserWarning")
def test_hooks_of_leaves_run_once_where_the_forward_runs_again(how: str) -> None:
    """Hooks of parameters and inputs, which change gradients, see each whole gradient once: not in the backward of the
    replayed forward, too, that is inside of the caller's."""
    torch.manual_seed(2)
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    inputs = [torch.randn(6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    subject = keepless.fit(
        copy.deepcopy(plain), inputs[1], "1GB", loss_fn=lambda output, _: output.square().sum(), cache=False
    )
    seen: dict[int, list[float]] = {id(plain): [], id(subject): []}
    of = {id(plain): inputs[0], id(subject): inputs[1]}
    for model in (plain, subject):
        norms = seen[id(model)]
        for leaf in (*model.parameters(), of[id(model)]):

            def look(gradient: torch.Tensor, norms: list[float] = norms) -> torch.Tensor:
                norms.append(gradient.norm().item())
                return gradient * 2

            leaf.register_hook(look)

    def run(model: nn.Module) -> None:
        output = model(of[id(model)])
        if how == "twice":
            output.square().sum().backward(retain_graph=True)
            output.square().sum().backward()
        elif how == "another layout":
            output.backward(torch.randn(8, 6, dtype=torch.float64).t())
        else:
            grads = torch.autograd.grad(output.square().sum(), list(model.parameters()), create_graph=True)
            sum((g.square().sum() for g in grads), torch.zeros(())).backward()

    both(plain, subject, run)
    if how == "second derivatives":  # sums over the loss's graph and the model's, in another order: as below
        for p, q in zip(plain.parameters(), subject.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    else:
        check_grads(plain, subject)
        assert zoo.same_bits(inputs[0].grad, inputs[1].grad)
    assert sorted(seen[id(plain)]) == pytest.approx(sorted(seen[id(subject)]))
    assert counters(subject).replays == 1


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_a_gradient_that_an_input_retains_comes_once() -> None:
    """`retain_grad` of what the model is given, where the forward runs again in a backward with `create_graph`."""
    torch.manual_seed(2)
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    subject = keepless.fit(
        copy.deepcopy(plain),
        torch.randn(6, 8, requires_grad=True),
        "1GB",
        loss_fn=lambda output, _: output.square().sum(),
        cache=False,
    )
    found = []
    for model in (plain, subject):
        given = X.clone().requires_grad_() * 2
        given.retain_grad()
        (grad,) = torch.autograd.grad(model(given).square().sum(), given, create_graph=True)
        model(given).square().sum().backward(create_graph=True)
        found.append((grad, given.grad))
        model.zero_grad()  # else they hold their graph, and it them
    torch.testing.assert_close(found[0], found[1])
    assert counters(subject).replays == 2


def test_gradient_penalty() -> None:
    """Loss and penalty together: the two graphs' gradients are added in another order, so the last bits may differ."""
    x = X.clone().requires_grad_()
    plain, subject = pair(batch=x)

    def run(model: nn.Module) -> None:
        loss = model(x)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + g.square().sum()).backward(inputs=list(model.parameters()))

    both(plain, subject, run)
    for p, q in zip(plain.parameters(), subject.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("which", [[0], [-1], [2, 0], [-1, 0]])
def test_some_gradients(which: list[int]) -> None:
    """autograd.grad and backward(inputs=) give those gradients and no others."""
    plain, subject = pair()

    def chosen(model: nn.Module) -> list[torch.Tensor]:
        return [list(model.parameters())[i] for i in which]

    expected, found = both(plain, subject, lambda m: torch.autograd.grad(m(X), chosen(m)))
    assert all(map(zoo.same_bits, expected, found))
    assert all(p.grad is None for p in subject.parameters())
    both(plain, subject, lambda m: m(X).backward(inputs=chosen(m)))
    check_grads(plain, subject)


COMBINATIONS: dict[str, Callable[[Any], Any]] = {
    "loss": lambda o: o[0],
    "other": lambda o: o[1].square().sum(),
    "hidden": lambda o: o[2].exp().sum(),
    "both": lambda o: o[0] + o[1].square().sum(),
    "all": lambda o: o[0] * 2 + o[1].square().sum() + o[2].sum(),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_other_outputs(name: str) -> None:
    """A backward from any outputs, also those that the plan has no gradients for; hooks never see None."""
    plain, subject = pair(Aux)
    hooked: list[bool] = []
    for p in subject.parameters():
        p.register_hook(lambda g: hooked.append(g is None))
    both(plain, subject, lambda m: COMBINATIONS[name](m(X)).backward())
    check_grads(plain, subject)
    assert counters(subject).replays == (0 if name == "loss" else 2)
    if name in ("loss", "both", "all"):
        assert not any(hooked)


def test_outputs_one_by_one() -> None:
    """Two backwards through one step, from different outputs."""
    plain, subject = pair(Aux)

    def run(model: nn.Module) -> None:
        loss, other, _ = model(X)
        other.square().sum().backward(retain_graph=True)
        loss.backward()

    both(plain, subject, run)
    check_grads(plain, subject)


def test_logits_instead_of_loss() -> None:
    """A language model's logits, alone and beside the loss."""
    plain, subject = pair(zoo.TinyLM, LM)
    both(plain, subject, lambda m: m(IDS, labels=IDS)["logits"].square().mean().backward())
    check_grads(plain, subject)

    def run(model: nn.Module) -> None:
        out = model(IDS, labels=IDS)
        (out["loss"] + out["logits"].square().mean()).backward()

    both(plain, subject, run)
    check_grads(plain, subject)


def test_interleaved_steps() -> None:
    """Two models, and two forwards of one before its backwards, and two calls in one loss."""
    plain, subject = pair()
    plain2, subject2 = pair(seed=5)

    def run(models: Any) -> None:
        first, second = models
        one, two, three = first(X), second(Y), first(Y)
        (one * 2).backward()
        two.backward()
        three.backward()
        (first(X) + first(Y) * 3).backward()

    both((plain, plain2), (subject, subject2), run)
    check_grads(plain, subject)
    check_grads(plain2, subject2)


def test_tangents_stay_the_callers() -> None:
    """A gradient that the caller passes in, or that autograd expands, is never written into."""
    plain = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 4), nn.Tanh(), nn.Dropout(0.2))
    subject = keepless.fit(copy.deepcopy(plain), X, budget="1GB", loss_fn=lambda out, _: out.sum(), cache=False)
    given = torch.randn(6, 4)
    before = given.clone()
    expected, found = both(plain, subject, lambda m: torch.autograd.grad(m(X), list(m.parameters()), given))
    assert all(map(zoo.same_bits, expected, found))
    assert torch.equal(given, before)
    both(plain, subject, lambda m: m(X).sum().backward())
    check_grads(plain, subject)
    both(plain, subject, lambda m: m(X[:3]).sum().backward())
    check_grads(plain, subject)
    assert counters(subject).replays == 0


@pytest.mark.slow
def test_dropped_loss_frees_the_step(no_gc: None) -> None:
    """Without the cycle collector: a dropped loss ends the step, a backward ends it, the model goes when dropped."""
    model = zoo.TinyLM()
    keepless.fit(model, LM, budget="1GB", cache=False)
    out = model(IDS, labels=IDS)
    assert live_steps() == 1
    del out
    assert live_steps() == 0
    out = model(IDS, labels=IDS)
    out["loss"].backward()
    assert live_steps() == 0
    assert not [o for o in gc.get_objects() if type(o) is Step and o.rng is not None]  # `out` stands
    model(IDS[:1], labels=IDS[:1])["loss"].backward()
    gone = weakref.ref(model)
    del model
    assert gone() is None
    assert out["logits"] is not None


@pytest.mark.parametrize("position", [0, 2])
def test_parameter_changed_in_between(position: int) -> None:
    """A parameter changed between forward and backward is an error before a wrong gradient."""
    plain, subject = pair()

    def run(model: nn.Module) -> None:
        parameter = list(model.parameters())[2]
        loss = model(X)
        with torch.no_grad():
            parameter.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    both(plain, subject, run)
    assert issubclass(StaleTensorError, RuntimeError)
    both(plain, subject, lambda m: m(X).backward())
    check_grads(plain, subject)


def test_batch_changed_in_between() -> None:
    """A batch changed between forward and backward likewise."""
    x = X.clone()
    for model in pair(batch=x):
        loss = model(x)
        x.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_output_changed_in_between() -> None:
    """An output that the backward reads likewise."""
    plain = Saved()
    flat, binding = zoo.capture(plain, X)
    subject = copy.deepcopy(plain)
    zoo.install(subject, flat, binding, zoo.keep_all(binding.graph))
    for model in (plain, subject):
        loss, h = model(X)
        with torch.no_grad():
            h.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_hook_that_raises() -> None:
    """After an exception in a gradient hook the next step is exact."""
    plain, subject = pair()
    handle = list(subject.parameters())[2].register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        subject(X).backward()
    handle.remove()
    both(plain, subject, lambda m: m(X).backward())
    check_grads(plain, subject)


@pytest.mark.slow
def test_every_op_may_raise(no_gc: None) -> None:
    """An exception in any op of the step, replays included: generator, memory and the next step are as if not run."""
    plain, subject = pair()
    table = subject.__dict__["forward"].entries[0].compiled.function.__globals__
    runs, limit = [0], [10**9]

    def failing(call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            runs[0] += 1
            if runs[0] == limit[0]:
                raise MemoryError("injected")
            return call(*args, **kwargs)

        return run

    for name in [name for name in table if name.startswith("f")]:
        table[name] = failing(table[name])
    both(plain, subject, lambda m: m(X).backward())
    alive: list[int] = []
    for number in range(1, runs[0] + 1):
        runs[0], limit[0] = 0, number
        subject.zero_grad()
        state = None
        try:
            loss = subject(X)
            state = torch.get_rng_state()
            loss.backward()
        except MemoryError:
            alive.append(live_steps())
        loss = None
        assert alive.pop() == 0
        assert state is None or torch.equal(state, torch.get_rng_state())
        limit[0] = 10**9
        if number % 8 == 0:
            both(plain, subject, lambda m: m(X).backward())
            check_grads(plain, subject)


def test_threads() -> None:
    """Two threads, each with a model of its own, and two threads with one model."""
    plain = zoo.mlp(p=0.0)
    subjects = [zoo.planned(copy.deepcopy(plain), X, seed) for seed in range(2)]
    failures: list[BaseException] = []
    expected = torch.autograd.grad(plain(X), list(plain.parameters()))

    def work(model: nn.Module) -> None:
        try:
            for _ in range(10):
                found = torch.autograd.grad(model(X), list(model.parameters()))
                assert all(map(zoo.same_bits, found, expected))
        except BaseException as error:
            failures.append(error)

    for models in (subjects, [subjects[0], subjects[0]]):
        threads = [threading.Thread(target=work, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transforms_run_the_models_own_forward() -> None:
    """torch.func.grad and vmap, and forward-mode AD, fall back; functional_call with other tensors is planned."""
    plain, subject = pair(lambda: zoo.mlp(p=0.0))
    named = {name: p.detach() for name, p in subject.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(subject, p, (X,)))(named)
    plain(X).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])
    assert torch.func.vmap(lambda row: torch.func.functional_call(subject, named, (row[None],)))(X).shape == (6,)
    with fwAD.dual_level():
        assert fwAD.unpack_dual(subject(fwAD.make_dual(X, torch.ones_like(X)))).tangent is not None
    assert counters(subject).steps == 0
    others = {name: (p * 2).requires_grad_() for name, p in named.items()}
    expected, found = (
        torch.autograd.grad(torch.func.functional_call(m, others, (X,)), list(others.values()))
        for m in (plain, subject)
    )
    assert all(map(zoo.same_bits, expected, found))
    assert counters(subject).steps == 1


def test_anomaly_mode_and_saved_tensor_hooks() -> None:
    """Both leave a planned step as it is."""
    plain, subject = pair()

    def anomaly(model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autograd.detect_anomaly():
                model(X).backward()

    def hooks(model: nn.Module) -> None:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
            loss = model(X)
        loss.backward()

    for run in (anomaly, hooks):
        both(plain, subject, run)
        check_grads(plain, subject)


def test_replay_restores_modes() -> None:
    """A second backward after model.eval() differentiates the training forward, and leaves the modes alone."""
    plain, subject = pair()

    def run(model: nn.Module) -> None:
        model.train()
        loss = model(X)
        loss.backward(retain_graph=True)
        model.eval()
        loss.backward()

    both(plain, subject, run)
    check_grads(plain, subject)
    assert not any(module.training for module in subject.modules())


def test_replay_of_another_model_is_refused() -> None:
    """A second backward after a parameter was replaced cannot be replayed, and says so."""
    _, subject = pair()
    loss = subject(X)
    loss.backward(retain_graph=True)
    layer: Any = subject.get_submodule("module.0")
    layer.weight = nn.Parameter(torch.randn(16, 8))
    with pytest.raises(ReplayError, match=r"module\.0\.weight has been replaced"):
        loss.backward()


def test_replay_of_what_cannot_run_twice_is_refused() -> None:
    """A forward that reads a buffer and then changes it has one backward."""
    model = zoo.planned(zoo.Ema(), torch.randn(3, 4), 1)
    loss = model(torch.randn(3, 4))
    loss.backward(retain_graph=True)
    with pytest.raises(ReplayError, match="ema"):
        loss.backward()


def test_optimizer_in_the_backward() -> None:
    """Optimizers that step in post-accumulate hooks, and free the gradient, train the same parameters."""
    plain, subject = pair()
    for model in (plain, subject):
        for p in model.parameters():
            optimizer = torch.optim.AdamW([p], lr=0.1)

            def step(parameter: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                parameter.grad = None

            p.register_post_accumulate_grad_hook(step)
    both(plain, subject, lambda m: [m(X).backward() for _ in range(3)])
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), subject.parameters(), strict=True))


def test_existing_gradients_accumulate() -> None:
    """Gradients are added to those that are there, into the same tensors."""
    plain, subject = pair()
    for model in (plain, subject):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    before = [p.grad for p in subject.parameters()]
    for model in (plain, subject):
        torch.manual_seed(1)
        model(X).backward()
    check_grads(plain, subject)
    assert all(p.grad is old for p, old in zip(subject.parameters(), before, strict=True))
