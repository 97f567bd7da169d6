"""One forward and backward of a model, run to see what comes of it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from keepless._compat import after_gradient
from keepless.capture import Inputs
from keepless.control.captured import Settings
from keepless.errors import LossError
from keepless.ir import Phase
from keepless.machine import OPTIMIZER_IN_BACKWARD, Plan
from keepless.measure.steps import increments
from keepless.modules.untouched import Before


@dataclass
class Outcome:
    """What a step leaves: all that must be equal, and how long it took."""

    loss: torch.Tensor
    grads: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    rng: torch.Tensor
    seconds: float


class Runner:
    """Runs one forward and backward of whatever forward stands in the model.

    Arguments:
        loss_fn: loss of (output, batch); None where the output holds it.
        before: what each step starts from.

    Attributes:
        steps_before: what so many steps of a loop leave stands beside the next one (`modules.leftovers`).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: Inputs,
        batch: Any,
        loss_fn: Any,
        settings: Settings,
        device: torch.device,
        before: Before,
    ) -> None:
        self.before = before
        self.model = model
        self.inputs = inputs
        self.batch = batch
        self.loss_fn = loss_fn
        self.settings = settings
        self.device = device
        self.steps_before = 0
        self._losses: list[torch.Tensor] = []

    def note_loss(self, loss: torch.Tensor) -> None:
        """The loss of a step that ran by the model's own code."""
        self._losses = [*self._losses[-1:], loss.detach().clone()]

    def own_loss_beside(self, loss: torch.Tensor) -> float | None:
        """The loss of the model's own code, where that repeats itself, and this one is another; else None."""
        if len(self._losses) < 2 or any(not _same_bits(self._losses[-1], one) for one in self._losses):
            return None
        return None if _same_bits(self._losses[-1], loss.detach()) else float(self._losses[-1])

    def loss_of(self, output: Any) -> torch.Tensor:
        """The loss of an output."""
        if self.loss_fn is not None:
            loss: torch.Tensor = self.loss_fn(output, self.batch)
            return loss
        if isinstance(output, torch.Tensor):
            return output
        found: torch.Tensor | None = getattr(output, "loss", None)
        if found is None:
            try:
                found = output["loss"] if isinstance(output, Mapping) else output[0]
            except (KeyError, IndexError, TypeError):
                found = None
        if found is None:
            names = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
            raise LossError(
                f"The model's output is a {type(output).__name__}{names}, in which no loss is found: neither under "
                '"loss" nor in the first place. Give loss_fn=.'
            )
        return found

    def prepare(self) -> None:
        """Makes the state that of the first step's start.

        A loop enters autocast anew for each step: weights that were cast in the last one are not there any more.
        """
        torch.clear_autocast_cache()
        self.before.without_gradients()
        if self.settings.accumulate:
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.before.again()

    def forward_backward(self, mark: Callable[[str], None] | None = None) -> torch.Tensor:
        """The measured part of a step; gives the loss. As in a loop, autocast ends before the backward.

        Arguments:
            mark: called with each phase's name where it has ended, while outputs that the caller holds stand.
        """
        output = self.model(*self.inputs.args, **self.inputs.kwargs)
        if mark is not None:
            mark(Phase.FORWARD.value)
        loss = self.loss_of(output)
        if self.settings.release_outputs:
            del output
        if mark is not None:
            mark(Phase.LOSS.value)
        with autocast_over(self.device):
            loss.backward()  # type: ignore[no-untyped-call]
        if mark is not None:
            mark(Phase.BACKWARD.value)
        return loss.detach()

    def step(self) -> Outcome:
        """One step from the same start."""
        self.prepare()
        start = time.perf_counter()
        loss = self.forward_backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        return Outcome(loss.clone(), grads, buffers, _get_rng(self.device), seconds)

    def measure(self) -> int:
        """Highest bytes above the level at a first step's start, of a step of a loop."""
        self.prepare()
        if not self.steps_before:
            return increments(self.forward_backward, self.device)
        try:
            return increments(self._behind_others, self.device)
        except Exception:  # between two steps, the training loop may detach a state that the model keeps
            self.steps_before = 0
            return self.measure()

    def _behind_others(self) -> None:
        self.lead_in()
        self.forward_backward()

    def lead_in(self) -> None:
        """The steps before: gradients go behind each, and nothing is put back."""
        for _ in range(self.steps_before):
            self.forward_backward()
            torch.clear_autocast_cache()
            if not self.settings.accumulate:
                self.before.without_gradients()


@contextlib.contextmanager
def autocast_over(device: torch.device) -> Iterator[None]:
    """As behind the end of the caller's autocast: it is off, and what it cast for several uses is let go."""
    torch.clear_autocast_cache()
    with torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def dropping(model: torch.nn.Module, plan: Plan) -> Iterator[None]:
    """Gradients go as soon as they are there, where the plan's optimizer steps then; it is not stepped here."""

    def drop(param: torch.Tensor) -> None:
        param.grad = None

    drops = OPTIMIZER_IN_BACKWARD in plan.rewrites
    handles: list[Any] = []
    try:
        handles.extend(after_gradient(p, drop) for p in model.parameters() if drops and p.requires_grad)
        yield
    finally:
        for handle in handles:
            handle.remove()


def noise_of(run: Runner, reference: Outcome) -> float:
    """How far plain eager is from itself; where it cannot run, not known and given as 0."""
    again = run.step()
    once = run.step() if differing(reference, again) else reference
    pairs = [(once.loss, again.loss), *((once.grads[n], again.grads[n]) for n in once.grads)]
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs)


def deviation_of(a: Outcome, b: Outcome) -> tuple[float, str]:
    """The largest difference in a tensor, as a share of the largest number in b's, and whose; infinite where one is
    missing, or one generator was drawn from otherwise."""
    if not torch.equal(a.rng, b.rng):
        return math.inf, "generator state"
    pairs = {"loss": (a.loss, b.loss)}
    for what, left, right in (("gradient of", a.grads, b.grads), ("buffer", a.buffers, b.buffers)):
        for name in sorted(left.keys() | right.keys()):
            if name not in left or name not in right:
                return math.inf, f"{what} {name}"
            pairs[f"{what} {name}"] = left[name], right[name]
    worst, where = 0.0, ""
    for name, (now, then) in pairs.items():
        if now.numel() == 0 or _same_bits(now, then):
            continue
        scale = float(then.abs().max())
        share = float((now - then).abs().max()) / scale if scale else math.inf
        if not share <= worst:  # NaN counts as the worst, too
            worst, where = share if share == share else math.inf, name
    return worst, where


def differing(a: Outcome, b: Outcome) -> list[str]:
    """Names of what is not bitwise equal in two outcomes."""
    found = [] if torch.equal(a.loss, b.loss) else ["loss"]
    for what, left, right in (("gradient of", a.grads, b.grads), ("buffer", a.buffers, b.buffers)):
        for name in sorted(set(left) | set(right)):
            if name not in left or name not in right or not _same_bits(left[name], right[name]):
                found.append(f"{what} {name}")
    if not torch.equal(a.rng, b.rng):
        found.append("generator state")
    return found


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise, so that NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b)) or bool(
        torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


def _get_rng(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
