"""Steps: timed, compared bit by bit, and as targets of the meter."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

import keepless
from benchmarks.peers import contenders, models
from benchmarks.peers.models import Subject
from benchmarks.peers.ours import Planned
from benchmarks.peers.ways import Way

RELATIVE = 1e-4
"""Gradient elements that differ by more than this are counted."""
MOST_NORM = 1e-2
"""Other orders of sums change gradients by 1e-6 to 1e-3 of their norm here; another dropout mask by 0.1 and more."""
SEED = 3


@dataclass(frozen=True)
class Result:
    """What a seeded step gave.

    Arguments:
        loss, grads, buffers: after it; clones.
        draws: whether it drew random numbers.
    """

    loss: torch.Tensor
    grads: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    draws: bool


@dataclass(frozen=True)
class Difference:
    """Of one result to another.

    Arguments:
        is_equal: loss, all gradients and buffers, bit for bit.
        near_buffers: buffers alone, within `MOST_NORM`.
        share: of gradient elements that are further off than `RELATIVE`, relative to the larger of the two.
        most: largest relative difference of an element, where the larger of the two is above a millionth of its
            gradient's largest.
        norm: of the difference of all gradients, over the norm of the reference's.
    """

    is_equal: bool
    near_buffers: bool
    share: float
    most: float
    norm: float

    @property
    def is_wrong(self) -> bool:
        """Beyond what another order of sums gives: in norm, in buffers, or no numbers at all."""
        return not self.norm <= MOST_NORM or not self.near_buffers

    @property
    def has_gradients(self) -> bool:
        """Whether no element of a gradient is off; buffers may be."""
        return self.norm == 0.0 and self.share == 0.0


def seeded(subject: Subject, way: Way, batch: Any) -> Result:
    """The result of a contender's step; it stands in the model, and no gradients do."""
    torch.manual_seed(SEED)
    state = torch.get_rng_state()
    loss = way.forward_backward(batch)
    draws = not torch.equal(state, torch.get_rng_state())
    grads = {name: p.grad for name, p in subject.model.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in subject.model.named_buffers()}
    return Result(loss.clone(), grads, buffers, draws)


class Stand:
    """One subject in this process, with its optimizer, and the contenders that take turns on it."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.optimizer = subject.optimizer()
        self.batches = [subject.workload.batch(number) for number in range(2)]
        self.first_buffers = {name: buffer.clone() for name, buffer in subject.model.named_buffers()}
        self.first_params = [p.detach().clone() for p in subject.params]

    def reset(self) -> None:
        """Parameters and buffers are as they were made; gradients are gone."""
        with torch.no_grad():
            for name, buffer in self.subject.model.named_buffers():
                buffer.copy_(self.first_buffers[name])
            for param, first in zip(self.subject.params, self.first_params, strict=True):
                param.copy_(first)
        self.optimizer.zero_grad()

    def result(self, way: Way) -> Result:
        """A seeded step from the first parameters and buffers, without the optimizer's part."""
        self.reset()
        way.put_in()
        try:
            found = seeded(self.subject, way, self.batches[0])
        finally:
            way.take_out()
        self.optimizer.zero_grad()
        return found

    def timed(self, way: Way, number: int) -> tuple[float, float]:
        """Seconds of a forward and backward, and of the whole step."""
        batch = self.batches[number % len(self.batches)]
        way.put_in()
        try:
            self.optimizer.zero_grad()
            start = time.perf_counter()
            way.forward_backward(batch)
            middle = time.perf_counter()
            self.optimizer.step()
            end = time.perf_counter()
        finally:
            way.take_out()
        return middle - start, end - start


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _near(one: torch.Tensor, wanted: torch.Tensor) -> bool:
    if not wanted.numel():
        return True
    one, wanted = one.double(), wanted.double()
    return torch.allclose(one, wanted, rtol=MOST_NORM, atol=MOST_NORM * float(wanted.abs().max()))


def compare(found: Result, reference: Result) -> Difference:
    """Bits, and how far gradients are from the reference's."""
    off = total = 0
    most = squares = whole = 0.0
    equal_grads = found.grads.keys() == reference.grads.keys()
    for name, wanted in reference.grads.items():
        total += wanted.numel()
        whole += float(wanted.double().square().sum())
        grad = found.grads.get(name, torch.zeros_like(wanted))
        if _same(grad, wanted):
            continue
        equal_grads = False
        squares += float((grad - wanted).double().square().sum())
        scale = torch.maximum(grad.abs(), wanted.abs())
        relative = (grad - wanted).abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        counts = ~(scale <= 1e-6 * scale.max())
        off += int((~(relative <= RELATIVE) & counts).sum())  # NaN is off
        if bool(counts.any()):
            worst = float(relative[counts].max())
            most = max(most, worst if worst == worst else float("inf"))
    buffers = [(found.buffers[name], wanted) for name, wanted in reference.buffers.items()]
    equal_buffers = all(_same(one, wanted) for one, wanted in buffers)
    near_buffers = all(_near(one, wanted) for one, wanted in buffers)
    is_equal = equal_grads and equal_buffers and _same(found.loss, reference.loss)
    norm = math.sqrt(squares / whole) if whole else 0.0
    return Difference(is_equal, near_buffers, off / max(total, 1), most, norm)


def save(result: Result, path: str) -> None:
    """Writes a result for processes that compare theirs with it."""
    torch.save(vars(result), path)


def load(path: str) -> Result:
    """A result that was written; gradients stay in the file until they are looked at."""
    return Result(**torch.load(path, weights_only=True, mmap=True))


METERED = 2
"""Metered steps of `target`: the first, and one in which the optimizer's state is there from the start."""


def target(
    model: str,
    size: str,
    contender: str,
    plan_path: str = "",
    reference: str = "",
    keep: str = "",
    seed: int = 0,
) -> Any:
    """A target of the meter: whole steps of one contender. The step after the `METERED` ones is a seeded one from the
    first weights, whose result is compared; its peak means nothing.

    Arguments:
        plan_path: of one of ours.
        reference: a file of `save`: what the result is compared with.
        keep: where to write the result.
        seed: of the weights.
    """
    subject = models.build(model, size, seed)
    optimizer = subject.optimizer()
    way = Planned(subject, keepless.load(plan_path)) if plan_path else contenders.find(contender).make(subject)
    way.put_in()
    torch.manual_seed(SEED)
    batch = subject.workload.batch(0)  # one: what else a loop holds is not of the step
    count = iter(range(1 << 30))

    def step() -> dict[str, Any]:
        number = next(count)
        optimizer.zero_grad()
        if number < METERED:
            loss = way.forward_backward(batch)
            optimizer.step()
            return {"loss": float(loss), "static": subject.static_nbytes}
        fresh = models.build(model, size, seed)
        with torch.no_grad():
            for mine, first in zip(subject.model.parameters(), fresh.model.parameters(), strict=True):
                mine.copy_(first)
            for mine, first in zip(subject.model.buffers(), fresh.model.buffers(), strict=True):
                mine.copy_(first)
        result = seeded(subject, way, batch)
        if keep:
            save(result, keep)
        found: dict[str, Any] = {"draws": result.draws}
        return found | {"difference": vars(compare(result, load(reference)))} if reference else found

    return step
