"""What rewrites would gain where a budget is too small: smallest budgets of the rewritten steps, really planned.

Only an infeasible budget asks for this. The step is traced once more and lowered for each rewrite; scratch bytes of ops
that are new are measured, by one run each, and the smallest peak is found by the default planner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from keepless.binding import Binding
from keepless.capture import FlatInputs, lower, trace_step
from keepless.capture.target import Target
from keepless.control.allocating import allocation_of
from keepless.control.captured import Measured, Settings
from keepless.control.elsewhere import faking_for, loss_work, step_elsewhere, target_of
from keepless.control.reserve import with_reserve
from keepless.control.room import room_for_trials, split_by_room
from keepless.control.trials import cost_model, held_nbytes, op_trials, untouched
from keepless.control.works import works_of
from keepless.cost import CostModel
from keepless.errors import InfeasibleBudget, KeeplessError
from keepless.ir import Graph, format_bytes
from keepless.machine import OPTIMIZER_IN_BACKWARD, REWRITES
from keepless.measure import OpCost, measure_scratch, optimizer_updates
from keepless.measure.card import CardAllocator
from keepless.solve import SOLVERS, named_solver, smallest

_LEAST_GAIN = 0.005
"""Of the smallest budget: less is not worth a rewrite."""
_HELP = "What would help: "


@dataclass(frozen=True)
class Offer:
    """Rewrites that would lower the smallest budget.

    Arguments:
        rewrites: their names, those that are asked for already among them.
        smallest_budget: with them, in bytes.
        gain: bytes below the smallest budget without.
    """

    rewrites: tuple[str, ...]
    smallest_budget: int
    gain: int

    @property
    def is_exact(self) -> bool:
        """Whether the step gives the same bits."""
        return all(REWRITES[name].is_exact for name in self.rewrites)

    def __str__(self) -> str:
        return (
            f"rewrites={self.rewrites} lowers the smallest budget by {format_bytes(self.gain)} to "
            f"{format_bytes(self.smallest_budget)} ({'same bits' if self.is_exact else 'not bitwise'})"
        )


def with_offers(
    error: InfeasibleBudget,
    model: torch.nn.Module,
    flat: FlatInputs,
    batch: Any,
    measured: Measured,
    settings: Settings,
    optimizer: torch.optim.Optimizer | None,
) -> InfeasibleBudget:
    """The error with what rewrites would gain, first among what would help."""
    base = error.smallest_budget
    if measured.num_unrun or named_solver(settings.solver) is not SOLVERS["keepless"]:  # other bytes are in the error's
        base = _budget_of(measured.graph, measured.cost, settings.card)
    offers = find_offers(model, flat, batch, measured, settings, optimizer, base)
    offers = [offer for offer in offers if offer.smallest_budget < error.smallest_budget]
    if not offers:
        return error
    before, found, after = str(error).partition(_HELP)
    shown = "; ".join(map(str, offers))
    text = f"{before}{_HELP}{shown}; {after}" if found else f"{before} {_HELP}{shown}."
    return InfeasibleBudget(
        text,
        smallest_budget=error.smallest_budget,
        bound=error.bound,
        blocking=error.blocking,
        rewrites={offer.rewrites: offer.smallest_budget for offer in offers},
    )


def find_offers(
    model: torch.nn.Module,
    flat: FlatInputs,
    batch: Any,
    measured: Measured,
    settings: Settings,
    optimizer: torch.optim.Optimizer | None,
    base: int,
) -> list[Offer]:
    """Rewrites that lower the smallest budget, each alone and all that do together.

    Arguments:
        base: the smallest budget without them, in bytes.
    """
    absent = [name for name in REWRITES if name not in settings.rewrites]
    if optimizer is None or settings.accumulate:
        absent = [name for name in absent if name != OPTIMIZER_IN_BACKWARD]
    if not absent:
        return []
    target = None if settings.on is None else target_of(model, settings.on)
    faking = None if target is None else faking_for(target)
    try:
        with untouched(model):
            traced = trace_step(model, flat, batch=batch, loss_fn=settings.loss_fn, grad_outputs=None, faking=faking)
    except KeeplessError:
        return []
    offers: list[Offer] = []
    room = room_for_trials(model, flat.tensors, settings.budget, measured.capture.binding.device)

    def consider(names: tuple[str, ...]) -> None:
        chosen = tuple(name for name in REWRITES if name in names or name in settings.rewrites)
        own = replace(settings, rewrites=chosen)
        try:
            if OPTIMIZER_IN_BACKWARD in names and optimizer is not None and settings.optimizer is not None:
                trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
                updates = optimizer_updates(optimizer, trained, settings.optimizer)
                own = replace(own, optimizer=replace(settings.optimizer, updates=updates))
            with untouched(model):
                binding = lower(traced, flat, model, own.shape)
                if target is None:
                    needed = _smallest_budget(binding, measured, own, model, room)
                else:
                    needed = _budget_elsewhere(binding, own, model, target, batch)
        except KeeplessError:  # it does not apply to this step
            return
        if needed is not None and base - needed > _LEAST_GAIN * base:
            offers.append(Offer(chosen, needed, base - needed))

    for name in absent:
        consider((name,))
    if len(offers) > 1:
        consider(tuple(absent))
    return offers


def _smallest_budget(
    binding: Binding, measured: Measured, settings: Settings, model: torch.nn.Module, room: int
) -> int | None:
    """The smallest budget of a rewritten step, its ops measured as far as the plain step has not the same.

    Arguments:
        room: see `control.room`; None is returned where it does not do.
    """
    graph, cost = measured.graph, measured.cost
    held = held_nbytes(measured.capture.binding.graph, measured.capture.binding.device)
    known = {op.key: OpCost(cost.seconds[op.id], max(0, cost.scratch[op.id] - held), 0.0, 0) for op in graph.ops}
    trials, others = split_by_room([one for one in op_trials(binding, model) if one.key not in known], room)
    if others:
        return None
    scratch = measure_scratch(trials, device=binding.device)
    typical = sum(cost.seconds) / max(1, len(cost.seconds))  # only bytes are asked for
    known |= {key: OpCost(typical, nbytes, 0.0, 0) for key, nbytes in scratch.items()}
    loss = None
    if graph.loss_op is not None and settings.loss_fn is not None:
        loss = known[graph.ops[graph.loss_op].key]
    rewritten = cost_model(binding, known, optimizer=settings.optimizer, loss=loss, accumulate=settings.accumulate)
    return _budget_of(binding.graph, rewritten, settings.card)


def _budget_elsewhere(binding: Binding, settings: Settings, model: torch.nn.Module, target: Target, batch: Any) -> int:
    """The same on a device that is not here, by its table."""
    assert settings.on is not None
    loss = None if settings.loss_fn is None else loss_work(binding, settings.loss_fn, batch)
    works = works_of(binding, optimizer=settings.optimizer, loss=loss)
    there, cost, _ = step_elsewhere(model, binding, settings.on, target, works)
    return _budget_of(there.graph, cost, settings.card)


def _budget_of(graph: Graph, cost: CostModel, card: CardAllocator | None) -> int:
    """The smallest budget of a step: of the bytes that a card's allocator reserves, where that is what it bounds."""
    low = smallest(graph, cost)
    return with_reserve(low.peak if card is None else allocation_of(graph, low.program, cost, card).reserved)
