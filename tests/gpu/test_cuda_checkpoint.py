"""`keepless.checkpoint` on devices with random streams of their own: rows 2 and 6."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.gpu

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TWO_CUDA = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
MPS = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an MPS device")


def plain(function: Callable[..., Any], *args: Any, use_reentrant: bool = False) -> Any:
    return function(*args)


def dropout_steps(checkpoint: Callable[..., Any], device: str, inside: str, outside: str) -> list[torch.Tensor]:
    """Two steps of a region that draws on `inside`, its input on `outside`; losses, gradients, the next draws."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64).to(inside)

    def region(x: torch.Tensor) -> torch.Tensor:
        x = layer(torch.nn.functional.dropout(x, 0.3).to(inside)).tanh()
        return torch.nn.functional.dropout(x, 0.3).sin()

    found = []
    for _ in range(2):
        layer.zero_grad()
        loss = checkpoint(region, torch.ones(32, 64, device=outside), use_reentrant=False).sum()
        loss.backward()
        assert layer.weight.grad is not None
        found += [loss.detach().cpu(), layer.weight.grad.cpu().clone()]
    return [*found, *(torch.rand(4, device=place).cpu() for place in dict.fromkeys((device, inside, outside, "cpu")))]


@pytest.mark.parametrize(
    ("device", "inside", "outside"),
    [
        pytest.param("cuda", "cuda", "cuda", marks=CUDA, id="row2-one-device"),
        pytest.param("cuda", "cuda", "cpu", marks=CUDA, id="row2-device-first-used-inside"),
        pytest.param("cuda:0", "cuda:1", "cuda:0", marks=TWO_CUDA, id="row2-second-device-first-used-inside"),
        pytest.param("mps", "mps", "mps", marks=MPS, id="row6-other-device"),
        pytest.param("mps", "mps", "cpu", marks=MPS, id="row6-other-device-first-used-inside"),
    ],
)
def test_streams_of_every_device_are_replayed(device: str, inside: str, outside: str) -> None:
    import keepless

    expected = dropout_steps(plain, device, inside, outside)
    again = dropout_steps(plain, device, inside, outside)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    got = dropout_steps(keepless.checkpoint, device, inside, outside)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@CUDA
def test_generator_of_a_device_is_replayed() -> None:
    """Row 3 on a device: the user's own generator there."""
    import keepless

    def run(checkpoint: Callable[..., Any]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        noise = torch.Generator("cuda").manual_seed(3)
        x = torch.ones(64, device="cuda", requires_grad=True)
        for _ in range(2):
            checkpoint(
                lambda t: torch.exp(t * torch.rand(64, device="cuda", generator=noise)).sin(), x, use_reentrant=False
            ).sum().backward()
        assert x.grad is not None
        return [x.grad.cpu(), torch.rand(4, device="cuda", generator=noise).cpu()]

    assert all(torch.equal(a, b) for a, b in zip(run(plain), run(keepless.checkpoint), strict=True))
