"""Tensors that the forward reads beside its parameters, buffers and arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import keepless
from keepless import _compat
from keepless.binding import Binding, slots_of
from keepless.capture import Inputs, StepShape, flatten_inputs, lower, trace_step
from keepless.control.trials import _real, host_values
from keepless.errors import CaptureError

GLOBAL = torch.linspace(0, 1, 8)


class Reader(torch.nn.Module):
    """Adds a plain tensor attribute, a tensor in a list, and a global."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.plain = torch.ones(8)
        self.listed = [torch.full((8,), 2.0)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * self.plain + self.listed[0] + GLOBAL + torch.tensor([0.5] * 8)).pow(2).mean()


def _grads(model: torch.nn.Module, *args: Any) -> list[torch.Tensor]:
    model.zero_grad()
    model(*args).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_replaced_attribute_is_seen() -> None:
    """A plain tensor attribute that is replaced after planning is used in the next step."""
    torch.manual_seed(0)
    model, x = Reader(), torch.randn(4, 8)
    keepless.fit(model, x, "1GiB")
    first = _grads(model, x)
    model.plain = torch.full((8,), 3.0)
    model.listed[0] = torch.zeros(8)
    second = _grads(model, x)
    keepless.remove(model)
    expected = _grads(model, x)
    assert all(torch.equal(a, b) for a, b in zip(second, expected, strict=True))
    assert not torch.equal(first[0], second[0])


def test_rebound_closure_is_seen() -> None:
    """A loss that closes over a target which the loop rebinds never trains on the old one."""
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    target = torch.tensor([0, 1, 2, 0])
    model = keepless.with_loss(
        torch.nn.Linear(8, 3), lambda output, batch: torch.nn.functional.cross_entropy(output, target)
    )
    keepless.fit(model, x, "1GiB")
    _grads(model, x)
    target = torch.tensor([2, 2, 1, 1])
    found = _grads(model, x)
    keepless.remove(model)
    assert all(torch.equal(a, b) for a, b in zip(found, _grads(model, x), strict=True))


def test_homeless_tensor_is_refused() -> None:
    """A tensor that only a helper object holds could change unseen."""

    class Holder:
        def __init__(self) -> None:
            self.inner = {"deep": {"er": torch.ones(8)}}

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)
            self.holder = Holder()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.linear(x) * self.holder.inner["deep"]["er"]).mean()

    with pytest.raises(CaptureError, match=r"buffer.*batch"):
        keepless.plan(Model(), torch.randn(4, 8), "1GiB", engine="graph")


class Mixed(nn.Module):
    """Numbers on the host beside the model's tensors, made in the forward and held as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.number, self.row = nn.Linear(4, 4), torch.tensor(2.0), torch.ones(4)

    def forward(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        y = self.linear(x).tanh() * torch.tensor(3.0)
        if kind == "row":
            y = y + self.row
        if kind == "draw":
            y = y + torch.rand(())
        y = torch.where(y > 0, y, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        return (torch.tensor(0.5) * (y * self.number).sum()).exp()


HOST = ("lift_fresh_copy", "_tensor_constant", "rand", "number", "row")


def on_a_card(model: nn.Module, kind: str, monkeypatch: pytest.MonkeyPatch) -> Binding:
    """The step as it is captured on a card: all fakes say that they are there, but for what the host makes."""
    card = torch.device("cuda:0")
    flat = flatten_inputs(Inputs(torch.randn(3, 4), kind))
    traced = trace_step(model, flat, batch=None, loss_fn=None, grad_outputs=None)
    for node in traced.module.graph.nodes:
        found = node.meta.get("val")
        for fake in found if isinstance(found, tuple | list) else [found]:
            if isinstance(fake, _compat.FakeTensor) and not node.name.startswith(HOST) and node.op != "get_attr":
                fake.fake_device = card
    for module in ("drafting", "assembly"):
        monkeypatch.setattr(f"keepless.capture.{module}.planned_device", lambda model: card)
    return lower(traced, flat, model, StepShape())


def test_numbers_on_the_host_are_constants_of_a_step_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """They count nothing there, are given to ops where they are, and nothing takes over their storage."""
    model = Mixed()
    binding = on_a_card(model, "", monkeypatch)
    graph, slot_value = binding.graph, binding.slot_value
    assert binding.device.type == "cuda"
    assert sorted({tuple(tensor.shape) for tensor in binding.constants.values()}) == [(), (4,)]
    assert any(tensor is model.number for tensor in binding.constants.values())
    assert {name for name, _ in binding.constant_homes.values()} == {"number"}
    assert all(graph.values[slot_value[slot]].nbytes == 0 for slot in binding.constants)
    fresh = [op for op in graph.ops if "lift_fresh" in op.name]
    assert len(fresh) == 3
    assert all(graph.values[value].nbytes == 0 for op in fresh for value in op.outputs)
    host = host_values(binding)
    assert {value for op in fresh for value in op.outputs} <= host
    assert all(graph.values[value].nbytes == 0 for value in host)
    halved = [op for op in graph.ops if fresh[2].outputs[0] in op.inputs]
    assert len(halved) == 2, "forward and backward multiply a single number of the host by one of the card"
    assert all(op.reuses for op in halved)
    taken = {source for op in graph.ops for _, source in op.reuses}
    assert taken, "what is on the card is taken over"
    assert not taken & host


def test_what_is_not_a_number_stays_an_error_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CaptureError, match=r"shape \(4,\) on cpu; the model is planned for cuda:0, where only single"):
        on_a_card(Mixed(), "row", monkeypatch)
    with pytest.raises(CaptureError, match="draws random numbers on the cpu"):
        on_a_card(Mixed(), "draw", monkeypatch)


def test_trials_make_values_of_the_host_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of what an op is tried with is that of its argument; "meta" stands for the card."""
    binding = replace(on_a_card(Mixed(), "", monkeypatch), device=torch.device("meta"))
    fresh = next(op for op in binding.graph.ops if "lift_fresh" in op.name)
    (made,) = fresh.outputs
    user = next(op for op in binding.graph.ops if made in op.inputs)
    code = binding.ops[user.id]
    assert code is not None
    devices = {}
    for slot in slots_of(code.call):
        tensor = _real(binding, slot, {}, {}, host_values(binding))
        devices[binding.slot_value[slot] == made] = tensor.device.type
    assert devices == {True: "cpu", False: "meta"}
