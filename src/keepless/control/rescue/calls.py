"""How a model that is planned by module calls survives outside of its captured calls."""

from __future__ import annotations

import warnings
from dataclasses import replace

from keepless.control.parts import block_plans, region_plans
from keepless.control.rescue.survival import MOST_NOTCHES, Survival, device_facts
from keepless.errors import KeeplessError
from keepless.execute import Note
from keepless.ir import Program
from keepless.machine import Plan, simulate
from keepless.modules.chosen import Chosen
from keepless.modules.recovery import CallFailure
from keepless.reporting.black_box import describe_phases, describe_plan, describe_timeline, program_fingerprint
from keepless.solve.notches import Notches


class CallSurvival(Survival):
    """The survivor of one model that is planned by module calls."""

    _whole: tuple[Plan, Notches] | None = None

    def fewer_kept(self, chosen: Chosen) -> Chosen | None:
        """See `keepless.modules.recovery.CallSurvivor`."""
        plan = chosen.plan
        assert plan is not None
        try:
            if plan.engine == region_plans.EAGER:
                sites = region_plans.lowest_sites(plan)
                return None if sites == chosen.sites else replace(chosen, sites=sites)
            if (fewer := self._notch_less(chosen, plan)) is not None:
                return fewer
            sites = block_plans.regions_of(plan) | chosen.sites
            tightened = [segment.tighten() for segment in chosen.segments.values()]
        except MemoryError:
            return None
        return replace(chosen, sites=sites) if any(tightened) or sites != chosen.sites else None

    def _notch_less(self, chosen: Chosen, plan: Plan) -> Chosen | None:
        """A plan of blocks that is one notch tighter; None where this is that of the smallest peak already."""
        if self._whole is None or self._whole[0] is not plan:
            self._whole = plan, Notches(plan.graph, plan.cost)
        program = chosen.program or plan.program
        try:
            found = self._whole[1].below(program, -1, at_once=chosen.notches >= MOST_NOTCHES)
            return None if found is None else replace(block_plans.tightened(chosen, found), notches=chosen.notches + 1)
        except KeeplessError:  # pragma: no cover - plans' lists and orders are checked when they are applied
            return None

    def record_call(self, failure: CallFailure, chosen: Chosen, done: str, after: Chosen | None) -> Note:
        """See `keepless.modules.recovery.CallSurvivor`."""
        try:
            return self._recorded_call(failure, chosen, done, after)
        except Exception as error:
            warnings.warn(f"A failed allocation could not be written down: {error!r}", stacklevel=2)
            return Note("", None)

    def _recorded_call(self, failure: CallFailure, chosen: Chosen, done: str, after: Chosen | None) -> Note:
        plan = chosen.plan
        assert plan is not None
        graph, cost, program = plan.graph, plan.cost, _program_of(chosen, plan)
        suggested = plan.smallest_budget if plan.smallest_budget < plan.budget.limits["device"] else None
        document: dict[str, object] = {
            "error": {"type": failure.kind, "text": failure.text},
            "phase": failure.phase,
            "instruction": {"module": failure.module, "source": failure.source},
            "program": program_fingerprint(program),
            "timeline": describe_timeline(graph, program, cost, -1),
            "phases": describe_phases(graph, program, cost),
            "inputs": [{"name": name, "shape": list(shape), "dtype": dtype} for name, shape, dtype in failure.shapes],
            "plan": describe_plan(plan),
            "device": device_facts(failure.device),
            "suggested_budget": suggested,
            "done": done,
            "after": None if after is None else _described(_program_of(after, plan), plan),
        }
        return Note(self.write(document), suggested)


def _program_of(chosen: Chosen, plan: Plan) -> Program:
    """What a kind of step runs, in the plan's ops; of blocks, whose calls may run by tighter ones of their own, all
    the calls' together."""
    if plan.engine == region_plans.EAGER:
        return region_plans.program_of(plan, chosen.sites)
    return chosen.program or plan.program


def _described(program: Program, plan: Plan) -> dict[str, object]:
    try:
        timeline = simulate(plan.graph, program, plan.cost)
    except KeeplessError:  # pragma: no cover - programs are verified
        return {}
    return {
        "program": program_fingerprint(program),
        "predicted_peak": timeline.peak,
        "predicted_seconds": timeline.seconds,
        "num_replays": program.num_replays,
    }
