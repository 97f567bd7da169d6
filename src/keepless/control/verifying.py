"""Verifying a plan on the user's own model and batch: same bits, and how high memory really rose.

Everything that the runs touch (gradients, buffers, generator states, the applied plan) is put back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from keepless._compat import ambient_state
from keepless.capture import Inputs, flatten_inputs
from keepless.control.applying import apply, bind, capture_of, planned_forward, remove
from keepless.control.captured import Capture
from keepless.control.checks import check_module, check_plan
from keepless.errors import PlanError
from keepless.execute import PlannedForward, make_entry
from keepless.ir import Phase, Run, format_bytes
from keepless.machine import Plan
from keepless.measure import device_nbytes
from keepless.measure.steps import increments
from keepless.passes import from_order, reuse_storage

PLAIN = "plain eager"
SAME_ENGINE = "the same engine with everything kept"
SMALLEST = "the same engine's smallest-peak program"


@dataclass(frozen=True)
class Verification:
    """What `verify` saw.

    Arguments:
        equal: loss, gradients, buffers and generator state are bitwise those of the reference.
        reference: what the plan was compared with.
        equal_to_plain: the same against plain eager; None where plain eager was not run.
        noise: largest absolute difference between two runs of the reference (0.0: it repeats itself bit for bit).
        differences: names of what differs from the reference.
        measured_peak: highest bytes of the planned step, everything resident included (forward to backward; the
            optimizer's step is predicted).
        predicted_peak: of the same part of the step.
        budget: in bytes.
        seconds: of the planned step, forward and backward.
        reference_seconds: of the reference's.
        num_replays: runs of ops beyond the first.
    """

    equal: bool
    reference: str
    equal_to_plain: bool | None
    noise: float
    differences: tuple[str, ...]
    measured_peak: int
    predicted_peak: int
    budget: int
    seconds: float
    reference_seconds: float
    num_replays: int

    def __str__(self) -> str:
        verdict = "equal, bit for bit, to" if self.equal else "NOT EQUAL to"
        within = "within" if self.measured_peak <= self.budget else "ABOVE"
        lines = [
            f"{verdict} {self.reference} (noise {self.noise:g})",
            f"measured peak {format_bytes(self.measured_peak)}, {within} the budget {format_bytes(self.budget)}; "
            f"predicted {format_bytes(self.predicted_peak)} ({self.prediction_error:+.2%})",
            f"step {self.seconds:.3f} s against {self.reference_seconds:.3f} s; {self.num_replays} replays",
        ]
        if self.differences:
            lines.append("differs: " + ", ".join(self.differences[:8]))
        return "\n".join(lines)

    @property
    def prediction_error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_peak / self.measured_peak - 1 if self.measured_peak else 0.0


@dataclass
class _Outcome:
    loss: torch.Tensor
    grads: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    rng: torch.Tensor
    seconds: float


def verify(model: torch.nn.Module, batch: Any, plan: Plan, *, loss_fn: Any, repeats: int) -> Verification:
    """See `keepless.verify`."""
    check_module(model)
    check_plan(plan)
    inputs = Inputs.of(batch)
    flat = flatten_inputs(inputs)
    before = planned_forward(model)
    with restored(model):
        remove(model)
        try:
            capture = capture_of(plan, model) or bind(model, plan, flat)
            check_ambient(capture, "verify")
            loss_fn = loss_fn or capture.settings.loss_fn
            run = Runner(model, inputs, batch, loss_fn, capture)
            reference, name, plain = _reference(run, plan, capture)
            noise = _noise(run, reference)
            apply(model, plan)
            outcome = run.step()
            measured = run.measure()
            timed = sorted(run.step().seconds for _ in range(repeats))
        finally:
            remove(model)
            if before is not None:
                model.__dict__["forward"] = before
    differences = _differences(reference, outcome)
    static = _resident(plan)
    plan.measured_peak = max(static + measured, _optimizer_peak(plan))
    return Verification(
        equal=not differences,
        reference=name,
        equal_to_plain=None if plain is None else not _differences(plain, outcome),
        noise=noise,
        differences=tuple(differences),
        measured_peak=plan.measured_peak,
        predicted_peak=plan.predicted_peak,
        budget=plan.budget.limits["device"],
        seconds=timed[len(timed) // 2],
        reference_seconds=reference.seconds,
        num_replays=plan.program.num_replays,
    )


def check_ambient(capture: Capture, caller: str) -> None:
    """Refuses to run a step under another autocast and the like than it was captured under.

    Raises:
        PlanError: they differ.
    """
    if ambient_state(capture.binding.device.type) != capture.binding.ambient:
        raise PlanError(
            "The plan was made under another autocast, default dtype or choice of kernels than stands around "
            f"{caller}: call it under the same."
        )


class Runner:
    """Runs one forward and backward of whatever forward stands in the model."""

    def __init__(self, model: torch.nn.Module, inputs: Inputs, batch: Any, loss_fn: Any, capture: Capture) -> None:
        self.model = model
        self.inputs = inputs
        self.batch = batch
        self.loss_fn = loss_fn
        self.capture = capture
        self.device = capture.binding.device
        self.rng = _get_rng(self.device)
        self.buffers = {name: b.clone() for name, b in model.named_buffers()}

    def loss_of(self, output: Any) -> torch.Tensor:
        if self.loss_fn is not None:
            loss: torch.Tensor = self.loss_fn(output, self.batch)
            return loss
        if isinstance(output, torch.Tensor):
            return output
        found: torch.Tensor | None = getattr(output, "loss", None)
        if found is None:
            found = output["loss"] if isinstance(output, dict) else output[0]
        assert found is not None
        return found

    def prepare(self) -> None:
        accumulate = self.capture.settings.accumulate
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p) if accumulate and p.requires_grad else None
        for name, buffer in self.model.named_buffers():
            buffer.data.copy_(self.buffers[name])
        _set_rng(self.device, self.rng)

    def forward_backward(self) -> torch.Tensor:
        output = self.model(*self.inputs.args, **self.inputs.kwargs)
        loss = self.loss_of(output)
        if self.capture.settings.release_outputs:
            del output
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self) -> _Outcome:
        self.prepare()
        start = time.perf_counter()
        loss = self.forward_backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        return _Outcome(loss.clone(), grads, buffers, _get_rng(self.device), seconds)

    def measure(self) -> int:
        """Highest bytes above the level at the step's start."""
        self.prepare()
        return increments(self.forward_backward, self.device)


def _reference(run: Runner, plan: Plan, capture: Capture) -> tuple[_Outcome, str, _Outcome | None]:
    """The outcome to compare with, its name, and plain eager's where it was run."""
    model = run.model
    fits = plan.baseline_peak <= device_nbytes(run.device)
    graph = plan.graph
    if fits:
        plain = run.step()
        program = reuse_storage(graph, from_order(graph, range(len(graph.ops))))
        with with_program(model, capture, program):
            kept = run.step()
        if not _differences(plain, kept):
            return plain, PLAIN, plain
        return kept, SAME_ENGINE, plain
    from keepless.solve import smallest

    with with_program(model, capture, smallest(graph, plan.cost).program):
        return run.step(), SMALLEST, None


@contextlib.contextmanager
def with_program(
    model: torch.nn.Module, capture: Capture, program: Any, mark: Callable[[int], None] | None = None
) -> Iterator[None]:
    """The model trains by a program; calls that mean another step are refused. `mark` as in `make_entry`."""
    entry = make_entry(model, capture.flat, capture.binding, program, mark)
    model.__dict__["forward"] = PlannedForward(model, [entry], _refuse)
    try:
        yield
    finally:
        remove(model)


def _refuse(
    planned: PlannedForward, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
) -> None:
    raise PlanError(
        f"The plan was made for another step than this one: {reason}. Give the model and a batch as they were "
        "planned for, or plan for these."
    )


def _noise(run: Runner, reference: _Outcome) -> float:
    """How far plain eager is from itself; where it cannot run, not known and given as 0."""
    again = run.step()
    once = run.step() if _differences(reference, again) else reference
    pairs = [(once.loss, again.loss), *((once.grads[n], again.grads[n]) for n in once.grads)]
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs)


def _differences(a: _Outcome, b: _Outcome) -> list[str]:
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


def _resident(plan: Plan) -> int:
    """Bytes on the device before the step."""
    return sum(plan.graph.values[v].nbytes for v in plan.graph.inputs)


def _optimizer_peak(plan: Plan) -> int:
    """The predicted peak of the optimizer's step: verifying never steps the user's optimizer."""
    ops = plan.graph.ops
    indices = {
        index
        for index, instr in enumerate(plan.program)
        if isinstance(instr, Run) and ops[instr.op].phase is Phase.OPTIMIZER
    }
    return max((event.peak for event in plan.predicted.events if event.index in indices), default=0)


def _get_rng(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextlib.contextmanager
def restored(model: torch.nn.Module) -> Iterator[None]:
    """Gradients, buffers and generator states as they were, whatever happens."""
    device = next(model.parameters()).device
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    state = _get_rng(device)
    for p, _ in grads:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        _set_rng(device, state)
