"""Softmax and its backward written over their first argument give the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keepless.capture.aten import in_place_forms

aten = torch.ops.aten
PAIRS = [
    (aten._softmax.default, aten._softmax_backward_data.default),
    (aten._log_softmax.default, aten._log_softmax_backward_data.default),
]


def _over(op: Any, args: tuple[Any, ...]) -> torch.Tensor:
    form = in_place_forms(op, args, args[0].dim(), "cpu")[0]
    written = args[0].clone()
    result: torch.Tensor = form(written, *args[1:])
    assert result.data_ptr() == written.data_ptr()
    return result


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (64, 257), (2, 4, 128, 128), (4, 50257), (300, 1), (5, 7, 1025)], ids=str)
def test_rowwise_forms_are_bitwise_equal(shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    """Values with infinities and wide ranges, both forms, forward and backward."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        x = (torch.randn(shape) * 30).to(dtype)
        if x.numel() > 10:
            x.view(-1)[3] = float("-inf")
        grad = torch.randn(shape).to(dtype)
        for forward, backward in PAIRS:
            out = forward(x, -1, False)
            assert torch.equal(_over(forward, (x, -1, False)).view(torch.uint8), out.view(torch.uint8))
            expected = backward(grad, out, len(shape) - 1, dtype)
            found = _over(backward, (grad, out, len(shape) - 1, dtype))
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    finally:
        torch.set_num_threads(before)


def test_rowwise_forms_need_the_last_dimension_on_the_cpu() -> None:
    """Over another dimension, or on another device, there is no such form."""
    x = torch.zeros(3, 4)
    assert not in_place_forms(aten._softmax.default, (x, 0, False), 2, "cpu")
    assert not in_place_forms(aten._softmax.default, (x, 1, False), 2, "cuda")
