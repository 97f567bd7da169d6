"""What planning is asked for, and a captured and measured step."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from keepless.binding import Binding
from keepless.capture import FlatInputs, StepShape
from keepless.control.elsewhere import Elsewhere
from keepless.control.plan_book.templates import Templates
from keepless.cost import CostModel, DeviceSpec
from keepless.ir import Effect, Graph, Kind, Phase
from keepless.machine import Plan
from keepless.measure import CostCache, OptimizerFootprint, Update
from keepless.measure.card import CardAllocator
from keepless.solve import SOLVERS, Solver


@dataclass(frozen=True)
class Settings:
    """What `plan` was asked for beside model and batch; enough to plan again for another batch."""

    budget: int
    optimizer: OptimizerFootprint | None
    loss_fn: Any
    accumulate: bool
    release_outputs: bool
    outside: int
    solver: str | Solver
    seed: int
    cache: CostCache | None
    own_loss: bool = True
    """Whether the model's output holds its loss."""
    card: CardAllocator | None = None
    """The allocator whose reserved bytes the budget bounds; None on the CPU."""
    over: int = 0
    """Bytes of the budget, beside the default reserve, that this allocator was found to need beyond tensors."""
    rewrites: tuple[str, ...] = ()
    optimizer_kind: str = ""
    on: DeviceSpec | None = None
    """A device that is not here, for which it is planned; None to plan for the one that the model is on."""
    eager_ops: bool = False
    """Whether code that looks at data is refused, rather than captured as it would be compiled."""

    @property
    def shape(self) -> StepShape:
        """What the step is beside forward and backward."""
        return StepShape(
            self.accumulate,
            self.release_outputs,
            self.optimizer is not None,
            self.optimizer.state_nbytes if self.optimizer else 0,
            self.outside,
            self.rewrites,
        )


@dataclass(frozen=True)
class Capture:
    """The torch side of a plan: kept with it while the process lives, never saved."""

    binding: Binding
    flat: FlatInputs
    settings: Settings
    as_compiled: bool
    model: weakref.ref[torch.nn.Module] | None = None
    modules: tuple[weakref.ref[torch.nn.Module], ...] = ()

    def is_of(self, model: torch.nn.Module) -> bool:
        """Whether this model was captured, with the submodules that it has now."""
        now = list(model.modules())
        return (
            self.model is not None
            and self.model() is model
            and len(now) == len(self.modules)
            and all(ref() is module for ref, module in zip(self.modules, now, strict=True))
        )


class Captures:
    """A plan's captures, one for each model that it was used with. Those of models that are gone are forgotten."""

    def __init__(self, first: Capture) -> None:
        self.settings = first.settings
        self.grad_outputs = first.binding.grad_outputs
        self.orders = first.binding.orders
        self._captures = [first]
        self._templates: list[Templates] = []

    def of(self, model: torch.nn.Module) -> Capture | None:
        """The capture of this model, if there is one."""
        return next((capture for capture in self._captures if capture.is_of(model)), None)

    def templates(self, model: torch.nn.Module) -> Templates | None:
        """What was learned of this model's steps for other shapes, if it was captured."""
        capture = self.of(model)
        if capture is None:
            return None
        found = next((one for one in self._templates if one.is_of(model)), None)
        if found is None:
            found = Templates(model, capture.flat)
            self._templates = [one for one in self._templates if one.is_alive] + [found]
        return found

    def add(self, capture: Capture) -> None:
        """Keeps a capture in the place of an older one of the same model."""
        model = capture.model() if capture.model is not None else None
        others = [(one, one.model() if one.model is not None else None) for one in self._captures]
        self._captures = [one for one, other in others if other is not None and other is not model] + [capture]


@dataclass(frozen=True)
class Measured:
    """A captured step with its measured costs, before any budget.

    Arguments:
        signature: what it was captured from, as JSON values.
        elsewhere: the step on a device that is not here, where it was captured for one.
        num_unrun: ops for which the budget had no room: their scratch bytes are left out (`control.room`).
    """

    capture: Capture
    cost: CostModel
    signature: dict[str, object]
    elsewhere: Elsewhere | None = None
    num_unrun: int = 0

    @property
    def graph(self) -> Graph:
        """The step."""
        return self.capture.binding.graph if self.elsewhere is None else self.elsewhere.graph

    @property
    def is_here(self) -> bool:
        """Whether it was captured and measured for the device that the model is on, and can run there."""
        return self.elsewhere is None


def shape_from(plan: Plan) -> StepShape:
    """What the step of a plan is beside forward and backward, from its signature."""
    signature = plan.signature
    return StepShape(
        bool(signature.get("accumulate")),
        bool(signature.get("release_outputs")),
        bool(signature.get("has_optimizer")),
        whole(signature.get("state_nbytes")),
        whole(signature.get("outside_nbytes")),
        plan.rewrites,
    )


def beyond_peak(plan: Plan) -> int:
    """Bytes that a card's allocator holds for a plan beyond the peak of its program; 0 on the CPU."""
    found = plan.allocation
    return 0 if found is None else max(0, found.reserved - plan.predicted_peak)


def settings_from(plan: Plan, *, own_loss: bool) -> Settings:
    """What a plan from a file was asked for, as far as it says."""
    shape = shape_from(plan)
    nbytes = plan.budget.limits["device"]
    step = next((op.id for op in plan.graph.ops if op.phase is Phase.OPTIMIZER), None)
    footprint = None
    if step is not None:
        footprint = OptimizerFootprint(shape.state_nbytes, plan.cost.scratch[step], plan.cost.seconds[step])
    elif shape.has_optimizer:
        footprint = _footprint_of_updates(plan, shape.state_nbytes)
    return Settings(
        nbytes,
        footprint,
        None,
        shape.accumulate,
        shape.release_outputs,
        shape.outside_nbytes,
        plan.certificate.solver if plan.certificate.solver in SOLVERS else "keepless",
        plan.certificate.seed,
        CostCache(),
        own_loss=own_loss,
        over=beyond_peak(plan),
        rewrites=plan.rewrites,
        optimizer_kind=str(plan.signature.get("optimizer", "")),
    )


def _footprint_of_updates(plan: Plan, state_nbytes: int) -> OptimizerFootprint:
    """The same of a plan whose optimizer steps in the backward."""
    graph, cost = plan.graph, plan.cost
    updates = {
        graph.values[value].name: Update(cost.scratch[op.id], cost.seconds[op.id])
        for op in graph.ops
        if Effect.UPDATE in op.effects
        for value in op.inputs
        if graph.values[value].kind is Kind.PARAM
    }
    seconds = sum(update.seconds for update in updates.values())
    return OptimizerFootprint(
        state_nbytes, max((u.scratch_nbytes for u in updates.values()), default=0), seconds, updates=updates
    )


def whole(item: object) -> int:
    """A number of a signature that counts something; 0 for anything else."""
    return item if isinstance(item, int) and not isinstance(item, bool) and item >= 0 else 0
