"""Views that are one and the same in a generated step are made once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import keepless
from keepless.binding import Binding, map_refs
from keepless.execute.codegen import compile_step
from keepless.execute.looks import Looks


class Attention(nn.Module):
    """Turns its tensors around as attention does; chunks, expanded keys, complex numbers, a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(x).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        k = k[:, :1].expand(2, 2, 6, 4)
        scores = torch.softmax(q @ k.transpose(-1, -2), -1)
        y = (scores @ v).transpose(1, 2).reshape(2, 6, 8)
        a, b = y.squeeze(0).chunk(2, -1)
        y = torch.cat([b, a.unsqueeze(0).squeeze(0)], -1)
        z = torch.view_as_real(torch.view_as_complex(y.view(2, 6, 4, 2))).flatten(2)
        return self.out(z) @ self.mix.weight[:8].t()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Attention()


@pytest.fixture(scope="module")
def captured(model: nn.Module) -> Any:
    planned = keepless.fit(model, torch.randn(2, 6, 8, requires_grad=True), "1GiB", engine="graph", loss_fn=_loss)
    return planned.__dict__["forward"].entries[0]


def _loss(output: torch.Tensor, _: Any = None) -> torch.Tensor:
    return F.mse_loss(output, torch.ones_like(output))


def _real(binding: Binding) -> dict[int, torch.Tensor]:
    """All slots, made of tensors with the examples' layouts."""
    found: dict[int, torch.Tensor] = {}

    def of(slot: int) -> torch.Tensor:
        if slot not in found:
            view = binding.views.get(slot)
            if view is None:
                like = binding.examples[slot]
                found[slot] = torch.zeros(
                    100 + like.untyped_storage().nbytes() // like.element_size(), dtype=like.dtype
                )
                found[slot] = found[slot].as_strided(like.shape, like.stride(), like.storage_offset())
            else:
                call = view.call
                made = call.target(*map_refs(call.args, of), **map_refs(dict(call.kwargs), of))
                found[slot] = made if view.item is None else made[view.item]
        return found[slot]

    for slot in binding.slot_value:
        of(slot)
    return found


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    place = tensor.untyped_storage().data_ptr()
    return place, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.is_conj()


def test_what_is_called_the_same_is_the_same(captured: Any) -> None:
    binding = captured.binding
    looks, real = Looks(binding), _real(binding)
    slots = sorted(binding.slot_value)
    pairs = [(a, b) for a in slots for b in slots if a < b and looks.same(a, b)]
    assert len(pairs) > 10
    for a, b in pairs:
        assert _facts(real[a]) == _facts(real[b])
        assert binding.slot_value[a] == binding.slot_value[b]


def test_no_view_is_made_twice_and_bits_stay(captured: Any, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    text = captured.compiled.text
    twins = [line for line in text.splitlines() if line.strip().startswith("t") and "(" not in line and " = t" in line]
    assert len(twins) > 5
    x = torch.randn(2, 6, 8, requires_grad=True)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        x.grad = None
        _loss(model(x)).backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    planned = step()
    assert model.__dict__["forward"].counters.steps > 0
    keepless.remove(model)
    assert all(torch.equal(a, b) for a, b in zip(planned, step(), strict=True))
    monkeypatch.setattr(Looks, "same", lambda *_: False)
    assert len(compile_step(captured.binding, captured.program).text) > len(text)
