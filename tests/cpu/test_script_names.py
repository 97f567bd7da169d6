"""What a script calls its modules, and what modules beside the planned one keep."""

from __future__ import annotations

import sys

import pytest
import torch

from keepless.scripts.naming import Called, called, name_of, stands_at
from keepless.scripts.others import Unforeseen, modules_beside, rest_of


class Trainer:
    def __init__(self) -> None:
        self.net = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2)})
        self.more = {"G": torch.nn.Linear(2, 2)}


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of a function that runs, of the main file, or a path; each names the module when it is given back."""
    local, hidden = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    trainer, pair = Trainer(), [torch.nn.Linear(2, 2)]
    main = torch.nn.Linear(2, 2)
    monkeypatch.setattr(sys.modules["__main__"], "its_model", main, raising=False)
    expected = {
        "local": local,
        "trainer.net.encoder": trainer.net["encoder"],
        "trainer.more['G']": trainer.more["G"],
        "pair[0]": pair[0],
        "its_model": main,
    }
    for name, module in expected.items():
        del module  # it is a variable of this function, too
        found = name_of(expected[name])
        assert found in (name, f"expected['{name}']")
        assert stands_at(name, expected[name])
        assert not stands_at(name, hidden)
    for path in ("", "local.", "nothing.there", "pair[7]", "pair['x']", "local; x"):
        assert not stands_at(path, local)


def test_a_call_names_its_line() -> None:
    """And without one says so."""
    net = torch.nn.Linear(2, 2)
    here = called(net)
    assert here.name == "net"
    assert here.place.endswith(f"test_script_names.py:{sys._getframe().f_lineno - 2}")
    assert str(here) == f"net (Linear, first called at {here.place})"
    assert str(called(net, now=False)) == "net (Linear, not called yet)"
    assert Called("", "Linear", "a.py:1").path == "Linear"


def test_looking_for_names_holds_nothing() -> None:
    """A frame keeps no second reference to its locals."""
    net, tensor = torch.nn.Linear(2, 2), torch.ones(2)
    before = sys.getrefcount(tensor)
    name_of(torch.nn.Linear(2, 2))
    assert stands_at("net", net)
    assert sys.getrefcount(tensor) == before


def test_modules_beside_a_model() -> None:
    """The outermost ones that optimizers step: not what holds the model too, nor lists, nor what no optimizer steps."""
    model, other, listed, idle = (torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(4))
    both = torch.nn.ModuleDict({"model": model, "other": other, "list": torch.nn.ModuleList([listed]), "idle": idle})
    params = [*model.parameters(), *other.parameters(), *listed.parameters(), torch.nn.Parameter(torch.ones(1))]
    found = modules_beside(model, [torch.optim.SGD(params, lr=1.0)])
    assert {id(module) for module in found} == {id(other), id(listed)}
    assert len(both) == 4


def test_what_an_optimizer_needs_for_parameters_of_others() -> None:
    """Their gradients and state, as far as they are not there, and the temporaries of their step."""
    model, other = torch.nn.Linear(16, 16), torch.nn.Linear(64, 64, bias=False)
    adam = torch.optim.Adam([*model.parameters(), *other.parameters()])
    nbytes = 4 * 64 * 64
    coming, scratch = rest_of(model, adam, torch.device("cpu"))
    assert 3 * nbytes <= coming <= 3 * nbytes + 64  # the gradient, two moments and the count of steps
    assert scratch > 0
    sum(layer(torch.ones(2, layer.in_features)).sum() for layer in (model, other)).backward()
    adam.step()
    assert rest_of(model, adam, torch.device("cpu"))[0] == 0
    assert rest_of(model, torch.optim.Adam(model.parameters()), torch.device("cpu")) == (0, 0)
    assert rest_of(model, None, torch.device("cpu")) == (0, 0)


def test_what_a_module_keeps_is_told_once_with_its_bytes() -> None:
    """Of the first call in training that records a graph: what ops save, each storage once, without parameters."""
    told: list[tuple[str, int]] = []
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4, bias=False))
    watch = Unforeseen([net], lambda module, name, nbytes: told.append((name.name, nbytes)))
    x = torch.randn(32, 8)
    with torch.no_grad():
        net(x)
    with pytest.raises(RuntimeError, match="shapes"):
        net(torch.ones(3, 3))
    net[0].register_forward_hook(lambda *_: None)
    out = net(x)
    expected = 4 * (x.numel() + 32 * 16)  # the first layer's input; tanh's output, which is the second layer's input
    assert told == [("net", expected)]
    out.sum().backward()
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    net(x).sum().backward()
    assert len(told) == 1
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), grads, strict=True))
    watch.end()
    assert not net._forward_pre_hooks
