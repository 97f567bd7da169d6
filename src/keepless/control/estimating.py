"""What a step would need, before any step is run: captured on fake tensors, with the scratch of single ops.

No op is timed and no budget is needed. Two programs are accounted for: the plain one, which keeps everything, and the
one of the smallest peak that the planner finds. A model that is planned for a device that is not here (`on=`) has the
analytic costs of that device, and a wider margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from keepless.capture import Inputs, flatten_inputs
from keepless.control.allocating import allocation_of
from keepless.control.captured import Measured, Settings
from keepless.control.checks import check_module
from keepless.control.loss_state import loss_untouched
from keepless.control.options import Progress, StepOptions
from keepless.control.planning import capture_call, measure_step, measuring, plan_of, read_settings
from keepless.control.positions import check_positions
from keepless.control.reserve import with_reserve
from keepless.control.room import room_for_trials, split_by_room
from keepless.control.signature import batch_signature, model_signature
from keepless.control.takeover import note, turned_off
from keepless.control.trials import cost_model, loss_trial, op_trials, untouched
from keepless.cost import CostModel
from keepless.ir import Budget, Certificate, Graph, Kind, Phase, Status, format_bytes
from keepless.machine import Allocation, Plan, describe_rewrites
from keepless.machine.elsewhere import describe_elsewhere, device_of, margin_of
from keepless.measure import OpCost, measure_scratch
from keepless.reporting.account import peak_account
from keepless.reporting.steps import StepPrediction, predicted_steps
from keepless.reporting.tables import estimate_text
from keepless.solve import Solution, smallest
from keepless.solve.solution import solution

_BYTES_PER_S = 1e10
"""The planner weighs ops by seconds; where none are measured they are those of passes over an op's values."""
MOST_OPS = 8


@dataclass(frozen=True)
class LargeOp:
    """An op of the plain step that needs much at once.

    Arguments:
        where: its name, module and source line.
        phase: of the step.
        nbytes: its inputs and outputs that do not stand for the whole step, and its scratch.
        scratch: the last of these alone.
    """

    where: str
    phase: str
    nbytes: int
    scratch: int

    def __str__(self) -> str:
        scratch = f" (scratch {format_bytes(self.scratch)})" if self.scratch else ""
        return f"{format_bytes(self.nbytes):>11} {self.where}, {self.phase}{scratch}"


@dataclass(frozen=True)
class Estimate:
    """What a training step would need; `print` shows it.

    Arguments:
        plain: the step with everything kept, as a plan of which only the bytes count.
        smallest: the step of the smallest peak that was found.
        bound: bytes that every plan needs at least (proven).
        margin: bytes by which the peaks may be off: what autograd and the allocator add beside tensors, and for a
            device that is not here what its scratch is estimated to be.
        allocations: of plain and smallest, what CUDA's allocator holds for them, by its model; empty on the CPU.
        largest: ops that need most at once, largest first.
        num_unrun: distinct ops that were not run, as the device has no room: their scratch bytes are left out.
    """

    plain: Plan
    smallest: Plan
    bound: int
    margin: int
    allocations: tuple[Allocation, ...] = ()
    largest: tuple[LargeOp, ...] = field(default=(), repr=False)
    num_unrun: int = 0

    @property
    def device(self) -> str:
        """The device that is not here for which it was estimated; empty where that is the model's own."""
        return device_of(self.plain.signature)

    @property
    def plain_budget(self) -> int:
        """Bytes of a budget in which everything can be kept, reserve and margin included."""
        return self._budget(self.plain, 0)

    @property
    def smallest_budget(self) -> int:
        """Bytes of the smallest budget that would do, reserve and margin included."""
        return self._budget(self.smallest, 1)

    @property
    def steps(self) -> dict[str, StepPrediction]:
        """The first, the steady and the accumulating step of the plain program."""
        return predicted_steps(self.plain)

    def _budget(self, plan: Plan, number: int) -> int:
        peak = self.allocations[number].reserved if self.allocations else plan.predicted_peak
        return with_reserve(peak) + (self.margin if self.device else 0)

    def as_dict(self) -> dict[str, object]:
        """Everything, as JSON values."""

        def side(plan: Plan, budget: int) -> dict[str, object]:
            return {
                "peak": plan.predicted_peak,
                "budget": budget,
                "account": peak_account(plan).as_dict(),
                "steps": {kind: step.as_dict() for kind, step in predicted_steps(plan).items()},
                "num_replays": plan.num_replays,
            }

        return {
            "plain": side(self.plain, self.plain_budget),
            "smallest": side(self.smallest, self.smallest_budget),
            "bound": self.bound,
            "margin": self.margin,
            "device": self.device,
            "rewrites": list(self.plain.rewrites),
            "num_unrun": self.num_unrun,
            "allocations": [one.as_dict() for one in self.allocations],
            "largest_ops": [
                {"where": op.where, "phase": op.phase, "nbytes": op.nbytes, "scratch": op.scratch}
                for op in self.largest
            ],
        }

    def __str__(self) -> str:
        margin = format_bytes(self.margin)
        off = f"{margin} in the budgets for estimated scratch" if self.device else f"peaks may be off by {margin}"
        lines = [
            estimate_text(self.plain, "plain step, everything kept", self.plain_budget),
            estimate_text(self.smallest, "smallest plan found", self.smallest_budget),
            f"no plan needs less than {format_bytes(self.bound)}; {off}",
            *(f"allocator, {name}: {one}" for name, one in zip(("plain", "smallest"), self.allocations, strict=False)),
            *describe_rewrites(self.plain.rewrites),
            *describe_elsewhere(self.plain.signature, self.plain.cost.spread),
            *(
                [f"{self.num_unrun} ops need more than the device has: their scratch bytes are left out"]
                * bool(self.num_unrun)
            ),
            "ops that need most at once:",
            *(f"  {op}" for op in self.largest),
        ]
        return "\n".join(lines)


def make_estimate(
    model: torch.nn.Module,
    batch: Any,
    optimizer: torch.optim.Optimizer | None,
    options: StepOptions,
    *,
    progress: Progress | None,
) -> Estimate:
    """See `keepless.estimate`."""
    check_module(model)
    settings = read_settings(model, 0, optimizer, replace(options, cache=False))
    tell = progress or _silent
    with turned_off(model, options.takeover), loss_untouched(options.loss_fn, model):
        look = measure_step if settings.on is not None else _scratched
        measured = look(model, batch, settings, tell)
    note(measured.signature, options.takeover)
    tell("solve", 0, 1)
    graph, cost = measured.graph, measured.cost
    claim = Certificate("keep_all", Status.FEASIBLE)
    low = smallest(graph, cost)
    kept = solution(graph, cost, list(range(len(graph.ops))), claim).stating(low.peak, low.smallest_bound)
    plain, least = (plan_of(measured, found, _budget_of(found)) for found in (kept, low))
    tell("solve", 1, 1)
    card = settings.card
    allocations = () if card is None else tuple(allocation_of(graph, p.program, cost, card) for p in (plain, least))
    margin = margin_of(plain.signature)
    if margin is None:
        margin = with_reserve(plain.predicted_peak) - plain.predicted_peak
    largest = tuple(largest_ops(graph, cost))
    return Estimate(plain, least, low.smallest_bound, margin, allocations, largest, measured.num_unrun)


def _budget_of(found: Solution) -> Budget:
    return Budget({"device": with_reserve(found.peak)}, reserve=with_reserve(found.peak) - found.peak)


def _scratched(model: torch.nn.Module, batch: Any, settings: Settings, tell: Progress) -> Measured:
    """The captured step with the scratch of its ops, each run once; their seconds are nominal."""
    flat = flatten_inputs(Inputs.of(batch))
    with untouched(model):
        tell("capture", 0, 1)
        capture, given = capture_call(model, flat, batch, settings, None)
        tell("capture", 1, 1)
        binding = capture.binding
        check_positions(binding)
        trials = op_trials(binding, model)
        if settings.loss_fn is not None:
            trials.append(loss_trial(binding, settings.loss_fn, batch))
        tell("measure", 0, 1)
        fitting, others = split_by_room(trials, room_for_trials(model, flat.tensors, 0, binding.device))
        with measuring():
            scratch = dict.fromkeys((trial.key for trial in others), 0)
            scratch |= measure_scratch(fitting, device=binding.device)
        tell("measure", 1, 1)
    loss = _untimed(scratch.pop(trials[-1].key)) if settings.loss_fn is not None else None
    costs = {key: _untimed(nbytes) for key, nbytes in scratch.items()}
    cost = cost_model(binding, costs, optimizer=settings.optimizer, loss=loss, accumulate=settings.accumulate)
    seconds = tuple(_moved(binding.graph, op.inputs, op.outputs) / _BYTES_PER_S for op in binding.graph.ops)
    nominal = CostModel(seconds, cost.scratch)
    signature = {**model_signature(model), **batch_signature(flat), **given}
    return Measured(capture, nominal, signature, num_unrun=len(others))


def _untimed(scratch: int) -> OpCost:
    return OpCost(0.0, scratch, 0.0, 0)


def _moved(graph: Graph, inputs: Sequence[int], outputs: Sequence[int]) -> int:
    return sum(graph.values[v].nbytes for v in (*inputs, *outputs))


def largest_ops(graph: Graph, cost: CostModel, most: int = MOST_OPS) -> list[LargeOp]:
    """Ops that need most at once beside what stands for the whole step; of ops that cost the same, one."""
    static = graph.inputs & graph.pinned
    found: dict[str, LargeOp] = {}
    for op in graph.ops:
        if op.phase is Phase.LOSS and not op.outputs:
            continue
        moving = (set(op.inputs) | set(op.outputs)) - static
        if op.phase is Phase.OPTIMIZER:
            moving = {v for v in moving if graph.values[v].kind is not Kind.GRAD}
        nbytes = sum(graph.values[v].nbytes for v in moving) + cost.scratch[op.id]
        key = op.key or str(op.id)
        if key not in found or nbytes > found[key].nbytes:
            found[key] = LargeOp(graph.where(op), op.phase.value, nbytes, cost.scratch[op.id])
    return sorted(found.values(), key=lambda one: (-one.nbytes, one.where))[:most]


def _silent(stage: str, done: int, total: int) -> None:
    pass
