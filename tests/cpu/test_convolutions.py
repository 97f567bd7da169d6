"""A convolution's backward in two parts: bits, bytes, and where it is left whole."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from models import capture
from torch import nn

import keepless
from keepless.capture import Inputs, convolutions
from keepless.capture.convolutions import CONVOLUTION_BACKWARD, convolution_input_gradient, hollow
from keepless.ir import Phase

PARTS = "keepless.convolution_input_gradient"
WHOLE = "aten.convolution_backward.default"


def call(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    transposed: bool = False,
    groups: int = 1,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Any, ...]:
    """Arguments of `aten.convolution_backward`."""
    many = x.dim() - 2
    how = ([stride] * many, [padding] * many, [dilation] * many, transposed, [0] * many, groups)
    out = torch.ops.aten.convolution.default(x, weight, None, *how)
    return (torch.randn_like(out), x, weight, [out.shape[1]], *how, list(wanted))


def normal(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype)


CALLS = {
    "2d": lambda: call(normal(2, 32, 28, 28), normal(48, 32, 3, 3), padding=1),
    "no bias": lambda: call(normal(2, 32, 28, 28), normal(48, 32, 3, 3), padding=1, wanted=(True, True, False)),
    "frozen weight": lambda: call(normal(2, 32, 28, 28), normal(48, 32, 3, 3), wanted=(True, False, False)),
    "frozen weight, bias": lambda: call(normal(2, 32, 28, 28), normal(48, 32, 3, 3), wanted=(True, False, True)),
    "strided": lambda: call(normal(2, 32, 29, 29), normal(48, 32, 3, 3), stride=2, padding=1),
    "dilated": lambda: call(normal(2, 32, 29, 29), normal(48, 32, 3, 3), dilation=2),
    "1 x 1": lambda: call(normal(2, 64, 28, 28), normal(32, 64, 1, 1)),
    "channels last": lambda: call(
        normal(2, 32, 28, 28).to(memory_format=torch.channels_last), normal(48, 32, 3, 3), padding=1
    ),
    "depthwise": lambda: call(normal(2, 48, 28, 28), normal(48, 1, 7, 7), padding=3, groups=48),
    "grouped": lambda: call(normal(2, 48, 28, 28), normal(48, 12, 3, 3), groups=4),
    "1d": lambda: call(normal(4, 64, 400), normal(64, 64, 5), padding=2),
    "3d": lambda: call(normal(1, 24, 32, 32, 32), normal(12, 24, 3, 3, 3), padding=1),
    "transposed 2d": lambda: call(normal(2, 32, 28, 28), normal(32, 16, 2, 2), stride=2, transposed=True),
    "transposed 3d": lambda: call(normal(2, 24, 12, 12, 12), normal(24, 12, 2, 2, 2), stride=2, transposed=True),
    "torch's own 2d": lambda: call(
        normal(2, 8, 14, 14, dtype=torch.float64), normal(8, 8, 3, 3, dtype=torch.float64), padding=1
    ),
    "torch's own 3d": lambda: call(
        normal(1, 8, 14, 14, 14, dtype=torch.float64), normal(4, 8, 3, 3, 3, dtype=torch.float64), padding=1
    ),
    "bfloat16": lambda: call(
        normal(2, 32, 28, 28, dtype=torch.bfloat16), normal(48, 32, 3, 3, dtype=torch.bfloat16), padding=1
    ),
}

NEVER_WHOLE = ("2d", "3d", "torch's own 2d", "torch's own 3d")


@pytest.mark.parametrize("name", CALLS)
def test_the_parts_have_the_whole_ones_bits(name: str) -> None:
    args = CALLS[name]()
    if not convolutions.is_in_parts(args):
        assert name not in NEVER_WHOLE
        pytest.skip("torch takes another kernel here: that depends on sizes, threads and processor")
    whole = CONVOLUTION_BACKWARD(*args)
    of_input = convolution_input_gradient(*convolutions.of_input(args, args[1]))
    assert torch.equal(of_input, whole[0])
    assert of_input.stride() == whole[0].stride()
    if any(args[-1][1:]):
        parts = CONVOLUTION_BACKWARD(*convolutions.of_weight(args))
        assert parts[0] is None
        for part, found in zip(parts[1:], whole[1:], strict=True):
            assert (part is None) == (found is None)
            assert part is None or torch.equal(part, found)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="the kernel does not tell")
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read_of_the_input_for_its_gradient(name: str) -> None:
    """Pages that were touched would be there."""
    args = CALLS[name]()
    if not convolutions.is_in_parts(args):
        assert name not in NEVER_WHOLE
        pytest.skip("torch takes another kernel here: that depends on sizes, threads and processor")
    x = hollow(tuple(args[1].shape), tuple(args[1].stride()), args[1].dtype)
    CONVOLUTION_BACKWARD(args[0], x, *args[2:-1], [True, False, False])
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(x.data_ptr() // mmap.PAGESIZE * 8)
        pages = -(-x.nbytes // mmap.PAGESIZE)
        entries = struct.unpack(f"{pages}Q", file.read(8 * pages))
    assert not any(entry >> 63 for entry in entries)


def test_what_torch_makes_by_other_kernels_is_left_whole() -> None:
    """Of float64 with holes between a kernel's numbers, torch makes both at once."""
    args = call(normal(2, 8, 14, 14, dtype=torch.float64), normal(8, 8, 3, 3, dtype=torch.float64), dilation=2)
    assert not convolutions.is_in_parts(args)


def test_without_a_gradient_of_the_input_it_is_left_whole() -> None:
    args = call(normal(2, 32, 28, 28), normal(48, 32, 3, 3), wanted=(False, True, True))
    assert not convolutions.is_in_parts(args)


def test_tensors_with_holes_are_left_whole() -> None:
    args = call(normal(2, 32, 28, 56)[..., ::2], normal(48, 32, 3, 3), padding=1)
    assert not convolutions.is_in_parts(args)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the kernel does not tell")
def test_what_stands_for_the_input_takes_no_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = resident()
    held = [hollow((1, 64, 64, 64, 64), (64**4, 1, 64**3, 64**2, 64), torch.float32) for _ in range(8)]
    assert held[0].shape == (1, 64, 64, 64, 64)
    assert held[0].stride() == (64**4, 1, 64**3, 64**2, 64)
    assert resident() - before < 256, "pages"  # of 131,072


class Net(nn.Module):
    """Convolutions with what is left of a tensor between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.first(x)).relu()
        return self.last(self.second(y).tanh()).square().mean()


def test_the_input_goes_before_its_gradient_comes() -> None:
    """A planned step is lower than the plain one with everything kept, has its bits, and its predicted peak."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3, 48, 48)
    plan = keepless.plan(model, x, "4GiB", engine="graph")
    names = [op.name for op in plan.graph.ops]
    assert names.count(PARTS) == 2  # x needs no gradient
    assert names.count(WHOLE) == 3
    for op in plan.graph.ops:
        if op.name == PARTS:
            before = plan.graph.ops[op.id - 1]
            assert before.name == WHOLE
            assert len(set(before.inputs) - set(op.inputs)) == 1  # the input, which this one does not read
            assert op.phase is Phase.BACKWARD
            assert op.module == before.module
    found = keepless.verify(model, x, plan)
    assert found.equal, found
    assert abs(found.measured_peak - plan.predicted_peak) <= 64  # the loss's own gradient


def test_a_frozen_convolution_keeps_no_input() -> None:
    """Its input is read by nothing in the backward: what made it is dropped in the forward."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.Sigmoid(), nn.Conv2d(32, 32, 3, padding=1), nn.Flatten(), nn.LazyLinear(1)
    )
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    model(x)
    model[2].requires_grad_(requires_grad=False)
    _, binding = capture(nn.Sequential(model, Mean()), Inputs(x))
    graph = binding.graph
    parts = [op for op in graph.ops if op.name == PARTS]
    frozen = next(op for op in parts if op.module == "0.2")
    values = {graph.values[v].name for v in frozen.inputs}
    assert not any("sigmoid" in name for name in values), values
    assert not any(op.name == WHOLE and op.module == "0.2" for op in graph.ops)


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean()


def test_for_a_card_it_is_left_whole() -> None:
    torch.manual_seed(0)
    plan = keepless.plan(Net(), torch.randn(2, 3, 48, 48), "4GiB", on="rtx4090")
    names = [op.name for op in plan.graph.ops]
    assert PARTS not in names
    assert names.count(WHOLE) == 3
