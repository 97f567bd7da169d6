"""Verifying a plan on the user's own model and batch: same bits, and how high memory really rose.

Everything that the runs touch (gradients, buffers, generator states, the applied plan) is put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from keepless.control.applying import apply
from keepless.control.captured import Capture
from keepless.control.checks import check_module, check_plan
from keepless.control.parts.module_plans import apply as apply_modules
from keepless.control.parts.module_plans import is_by_modules
from keepless.control.runner import Outcome, Runner, deviation_of, differing, dropping, noise_of
from keepless.control.undone import captured_run, modules_run, with_program
from keepless.ir import Effect, Phase, Run, format_bytes
from keepless.machine import REWRITES, Plan
from keepless.measure import device_nbytes
from keepless.passes import from_order, reuse_storage

PLAIN = "plain eager"
SAME_ENGINE = "the same engine with everything kept"
SAME_PLAN = "another run of itself"
SMALLEST = "the same engine's smallest-peak program"
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.03, "float16": 0.004}
"""By the lowest precision in a rewritten step, as a share of a tensor's largest number: some rounding errors of it.

Seen with `chunked_loss`: 4e-7 on GPT-2 and Llama of the tests in float32, 0.004 on Llama under bfloat16 autocast.
"""


@dataclass(frozen=True)
class Verification:
    """What `verify` saw.

    Arguments:
        equal: loss, gradients, buffers and generator state are bitwise those of the reference; with a rewrite that is
            not bitwise the reference is rewritten, too, and plain eager's are within `tolerance`.
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
        tolerance: of a plan with a rewrite that is not bitwise: how far from plain eager it may be, as a share of the
            largest number in a tensor. 0.0 without one, where bits count.
        deviation: how far it is; None where plain eager was not run, or bits count.
        deviating: the tensor that is furthest.
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
    tolerance: float = 0.0
    deviation: float | None = None
    deviating: str = ""

    def __str__(self) -> str:
        verdict = "equal, bit for bit, to" if self.equal else "NOT EQUAL to"
        within = "within" if self.measured_peak <= self.budget else "ABOVE"
        lines = [
            f"{verdict} {self.reference} (noise {self.noise:g})",
            f"measured peak {format_bytes(self.measured_peak)}, {within} the budget {format_bytes(self.budget)}; "
            f"predicted {format_bytes(self.predicted_peak)} ({self.prediction_error:+.2%})",
            f"step {self.seconds:.3f} s against {self.reference_seconds:.3f} s; {self.num_replays} replays",
        ]
        if self.deviation is not None:
            verdict = "within" if self.deviation <= self.tolerance else "NOT WITHIN"
            lines.append(
                f"not bitwise: {verdict} {self.tolerance:g} of {PLAIN}; the largest difference is "
                f"{self.deviation:.2g}, {self.deviating or 'nowhere'}"
            )
        if self.differences:
            lines.append("differs: " + ", ".join(self.differences[:8]))
        return "\n".join(lines)

    @property
    def prediction_error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_peak / self.measured_peak - 1 if self.measured_peak else 0.0


def verify(model: torch.nn.Module, batch: Any, plan: Plan, *, loss_fn: Any, repeats: int) -> Verification:
    """See `keepless.verify`."""
    check_module(model)
    check_plan(plan)
    if is_by_modules(plan):
        return _verify_modules(model, batch, plan, loss_fn, repeats)
    with captured_run(model, batch, plan, loss_fn, "verify") as (run, capture):
        reference, name, plain = _reference(run, plan, capture)
        noise = noise_of(run, reference)
        apply(model, plan, updates=False)
        outcome = run.step()
        with dropping(model, plan):
            measured = run.measure()
        timed = sorted(run.step().seconds for _ in range(repeats))
    different = differing(reference, outcome)
    plan.measured_peak = max(plan.graph.start_nbytes + measured, _optimizer_peak(plan))
    tolerance = tolerance_of(plan)
    deviation, where = (None, "") if plain is None or not tolerance else deviation_of(outcome, plain)
    return Verification(
        equal=not different and (deviation or 0.0) <= tolerance,
        reference=name,
        equal_to_plain=None if plain is None else not differing(plain, outcome),
        noise=noise,
        differences=tuple(different),
        measured_peak=plan.measured_peak,
        predicted_peak=plan.predicted_peak,
        budget=plan.budget.limits["device"],
        seconds=timed[len(timed) // 2],
        reference_seconds=reference.seconds,
        num_replays=plan.num_replays,
        tolerance=tolerance,
        deviation=deviation,
        deviating=where,
    )


def tolerance_of(plan: Plan) -> float:
    """How far a plan's step may be from plain eager's; 0.0 where bits count."""
    if all(REWRITES[name].is_exact for name in plan.rewrites):
        return 0.0
    return max((TOLERANCES.get(value.dtype, 0.0) for value in plan.graph.values), default=0.0)


def _verify_modules(model: torch.nn.Module, batch: Any, plan: Plan, loss_fn: Any, repeats: int) -> Verification:
    """The same for a plan of module calls: always against the model's own code."""
    with modules_run(model, batch, plan, loss_fn, "verify") as run:
        fits = plan.baseline_peak <= device_nbytes(run.device)
        planned = apply_modules(run.model, plan)
        try:
            if not fits:
                outcome = reference = run.step()
            else:
                planned.take_out()
                reference = run.step()
                planned.put_in()
                outcome = run.step()
            noise = noise_of(run, outcome)
            measured = run.measure()
            timed = sorted(run.step().seconds for _ in range(repeats))
        finally:
            planned.take_out()
    different = differing(reference, outcome)
    plan.measured_peak = max(plan.graph.start_nbytes + measured, _optimizer_peak(plan))
    return Verification(
        equal=not different,
        reference=PLAIN if fits else SAME_PLAN,
        equal_to_plain=not different if fits else None,
        noise=noise,
        differences=tuple(different),
        measured_peak=plan.measured_peak,
        predicted_peak=plan.predicted_peak,
        budget=plan.budget.limits["device"],
        seconds=timed[len(timed) // 2],
        reference_seconds=reference.seconds,
        num_replays=plan.num_replays,
    )


def _reference(run: Runner, plan: Plan, capture: Capture) -> tuple[Outcome, str, Outcome | None]:
    """The outcome to compare with, its name, and plain eager's where it was run."""
    model = run.model
    fits = plan.baseline_peak <= device_nbytes(run.device)
    graph = plan.graph
    if fits:
        plain = run.step()
        program = reuse_storage(graph, from_order(graph, range(len(graph.ops))))
        with with_program(model, capture, program):
            kept = run.step()
        if not differing(plain, kept):
            return plain, PLAIN, plain
        return kept, SAME_ENGINE, plain
    from keepless.solve import smallest

    with with_program(model, capture, smallest(graph, plan.cost).program):
        return run.step(), SMALLEST, None


def _optimizer_peak(plan: Plan) -> int:
    """The predicted peak of the optimizer's step: verifying never steps the user's optimizer."""
    ops = plan.graph.ops
    indices = {
        index
        for index, instr in enumerate(plan.program)
        if isinstance(instr, Run) and (ops[instr.op].phase is Phase.OPTIMIZER or Effect.UPDATE in ops[instr.op].effects)
    }
    return max((event.peak for event in plan.predicted.events if event.index in indices), default=0)
