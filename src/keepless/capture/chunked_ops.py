"""The loss over the logits in chunks of rows: forward and backward of `cross_entropy(x @ w + b, targets)`.

No more than a chunk's logits, their log-softmax and their gradient stand at once. Nothing is kept for the backward: it
makes each chunk's logits again, one more product with the weight. (Gradients made in the forward instead would cost
no product, and stand, as large as weight and hidden states, from the forward on.) Each chunk runs eager's own ops; sums
over chunks are made in another order than eager's, so that bits differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

aten = torch.ops.aten
_MEAN, _SUM = 1, 2
_LEAST_ROWS = 128
_SHARE = 8


def chunk_rows(num_rows: int, num_classes: int, width: int) -> int:
    """Rows of a chunk: its logits have an eighth of the elements of the weight, or of the hidden states if these have
    more, and 128 rows at least, so that products with the weight stay products of matrices."""
    rows = max(num_rows, num_classes) * width // (_SHARE * max(1, num_classes))
    return max(1, min(num_rows, max(_LEAST_ROWS, rows)))


def _spans(num_rows: int, rows: int) -> Iterator[tuple[int, int]]:
    """Chunks of about equal size, none above `rows`."""
    count = max(1, -(-num_rows // rows))
    for number in range(count):
        yield num_rows * number // count, num_rows * (number + 1) // count


def _scores(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    logits = torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)
    return aten._log_softmax.default(logits.to(dtype), 1, False)  # type: ignore[no-any-return]


def chunked_loss(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    class_weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and its total weight, as `aten.nll_loss_forward` gives them.

    Arguments:
        x: hidden states, (rows, width).
        w: (width, classes).
        bias: (classes,), or None.
        targets: classes, (rows,).
        reduction: 1 for the mean, 2 for the sum.
        dtype: of the log-softmax; logits are made in x's and cast.
    """
    loss = torch.zeros((), dtype=dtype, device=x.device)
    total = torch.zeros((), dtype=dtype, device=x.device)
    for begin, end in _spans(len(x), chunk_rows(len(x), w.shape[1], w.shape[0])):
        scores = _scores(x[begin:end], w, bias, dtype)
        part, weight = aten.nll_loss_forward.default(scores, targets[begin:end], class_weight, _SUM, ignore_index)
        loss.add_(part)
        total.add_(weight)
        del scores
    if reduction == _MEAN:
        loss.div_(total)
    return loss, total


def chunked_loss_backward(
    tangent: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    class_weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    dtype: torch.dtype,
    total: torch.Tensor,
    wanted: tuple[bool, bool, bool],
    by_class: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x, of w and of the bias (1, classes), None where not wanted.

    Sums over chunks are in float32 where the gradients are in a lower precision.

    Arguments:
        total: of `chunked_loss`.
        by_class: the gradient of w comes as (classes, width).
    """
    of_x = torch.empty_like(x) if wanted[0] else None
    high = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    shape = (w.shape[1], w.shape[0]) if by_class else (w.shape[0], w.shape[1])
    of_w = torch.zeros(shape, dtype=high, device=x.device) if wanted[1] else None
    of_bias = torch.zeros((1, w.shape[1]), dtype=high, device=x.device) if wanted[2] else None
    for begin, end in _spans(len(x), chunk_rows(len(x), w.shape[1], w.shape[0])):
        rows, labels = x[begin:end], targets[begin:end]
        scores = _scores(rows, w, bias, dtype)
        grad = aten.nll_loss_backward.default(tangent, scores, labels, class_weight, reduction, ignore_index, total)
        grad = aten._log_softmax_backward_data.default(grad, scores, 1, dtype)
        del scores
        grad = grad.to(x.dtype)
        if of_x is not None:
            torch.mm(grad, w.t(), out=of_x[begin:end])
        if of_w is not None:
            left, right = (grad.t(), rows) if by_class else (rows.t(), grad)
            if high is x.dtype:
                of_w.addmm_(left, right)
            else:
                of_w.add_(torch.mm(left, right))
            del left, right  # a view of the chunk's gradient
        if of_bias is not None:
            of_bias.add_(grad.sum(0, keepdim=True))
        del grad
    return (
        of_x,
        None if of_w is None else of_w.to(x.dtype),
        None if of_bias is None else of_bias.to(x.dtype),
    )


def chunked_work(
    num_rows: int, num_classes: int, width: int, itemsize: int, loss_itemsize: int, *, backward: bool
) -> tuple[float, int, int, int]:
    """Operations, bytes moved, bytes of scratch and kernels of one run, by counting them.

    Arguments:
        itemsize: bytes of an element of the hidden states.
        loss_itemsize: of the log-softmax.
    """
    rows = chunk_rows(num_rows, num_classes, width)
    chunks = -(-num_rows // rows)
    logits, weight = num_rows * num_classes, num_classes * width
    cast = loss_itemsize != itemsize
    products = 3 if backward else 1
    moved = products * (logits * itemsize + chunks * weight * itemsize)
    moved += logits * (itemsize + loss_itemsize) * 2 * cast + (9 if backward else 4) * logits * loss_itemsize
    chunk = -(-num_rows // chunks) * num_classes
    scratch = chunk * (3 * loss_itemsize if backward else 2 * loss_itemsize + itemsize * cast)
    if backward and itemsize == 2:  # a sum in float32, before there is an output, and what is added to it
        moved += 2 * chunks * weight * 4
        scratch = max(scratch, (chunk + weight) * itemsize) + weight * (4 - itemsize)
    return float(2 * products * logits * width + 8 * logits), moved, scratch, chunks * (9 if backward else 6)
