"""From a plan, and what was measured and asked for beside it, to a report.

::

    data = report_data(plan)                                             # a plan file is enough
    data = report_data(plan, measured=timeline, checked=verification, curve=curve_data(...), fits=[grid])
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Protocol

from keepless.errors import ReportError
from keepless.ir import DEVICE, Phase, Timeline
from keepless.machine import Plan, describe_rewrites
from keepless.machine.elsewhere import describe_elsewhere
from keepless.reporting.account import op_at, peak_account
from keepless.reporting.measured_account import MeasuredAccount, measured_account
from keepless.reporting.page.codec import cleaned
from keepless.reporting.page.data import (
    AccuracyRow,
    BitsData,
    CurveData,
    GridCell,
    GridData,
    Metric,
    PartRow,
    PeakData,
    ReportData,
    SizeRow,
    SizesData,
    StepData,
    Verdict,
)
from keepless.reporting.page.rows import MOST_VALUES, decision_rows
from keepless.reporting.page.timeline import MOST_LEVELS, timeline_data
from keepless.reporting.steps import predicted_steps
from keepless.reporting.tables import fits, verdict

MISSING = {
    "measured": "keepless report MODEL --plan FILE --measure, or keepless.report(model, batch, plan): runs some steps",
    "curve": "keepless report MODEL -b BUDGET --curve, or keepless.report(..., curve=True)",
    "fits": "keepless report MODEL -b BUDGET --batch 1,2,4 --length 512,1024, or keepless.report(..., fits=...)",
}
"""How to get what a report does not have."""
_DISTURBED = 0.05


class Checked(Protocol):
    """What `keepless.verify` saw."""

    @property
    def equal(self) -> bool: ...
    @property
    def reference(self) -> str: ...
    @property
    def noise(self) -> float: ...
    @property
    def differences(self) -> tuple[str, ...]: ...
    @property
    def measured_peak(self) -> int: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def deviation(self) -> float | None: ...


class Found(Protocol):
    """What a search for what fits found."""

    def as_dict(self) -> dict[str, object]: ...


def report_data(
    plan: Plan,
    *,
    measured: Timeline | None = None,
    checked: Checked | None = None,
    curve: CurveData | None = None,
    fits: Sequence[Found] = (),
    environment: Mapping[str, str] | None = None,
    title: str = "",
    missing: Mapping[str, str] | None = None,
    most_levels: int = MOST_LEVELS,
    most_values: int = MOST_VALUES,
) -> ReportData:
    """The report of a plan. O(edges of the program).

    Arguments:
        measured: the timeline of a run of this plan.
        checked: what a comparison of its bits saw.
        curve: of the same step.
        fits: grids and searches for the largest size.
        environment: facts beside those that the plan has.
        title: None for the model's name.
        missing: why a part is not there that was asked for, by its name in `MISSING`.
        most_levels, most_values: see `timeline_data` and `decision_rows`; what is left out is counted.

    Raises:
        ReportError: the measured timeline is not of this plan, or one of `fits` is neither a grid nor a search.
    """
    account = None if measured is None else _account(plan, measured)
    peak = _measured_peak(plan, account, checked)
    plan = replace(plan, measured_peak=peak) if peak != plan.measured_peak else plan
    grids, sizes = _fits(fits)
    given = {"measured": measured or checked or plan.measured_peak, "curve": curve, "fits": fits}
    return cleaned(
        ReportData(
            title=title or str(plan.signature.get("model", "")) or "A training step",
            verdict=_verdict(plan),
            timeline=timeline_data(plan, measured, most_levels),
            peak=_peak(plan),
            steps=tuple(
                StepData(kind, step.peak, step.where, step.phase, step.is_planned)
                for kind, step in predicted_steps(plan).items()
            ),
            decisions=decision_rows(plan, most_values),
            parts=tuple(PartRow(part.name, part.engine, part.calls, part.reason) for part in plan.parts),
            curve=curve,
            grids=tuple(grids),
            sizes=tuple(sizes),
            accuracy=tuple(_accuracy(plan, measured, account)),
            bits=None if checked is None else _bits(checked),
            metrics=tuple(_metrics(plan)),
            environment=_environment(plan) | dict(environment or {}),
            notes=tuple(_notes(plan)),
            missing={name: words for name, words in (MISSING | dict(missing or {})).items() if not given[name]},
        )
    )


def _account(plan: Plan, measured: Timeline) -> MeasuredAccount:
    if any(event.index >= len(plan.predicted.events) for event in measured.events):
        raise ReportError("The measured timeline has more instructions than the plan: it is of another one.")
    return measured_account(plan, measured)


def _measured_peak(plan: Plan, account: MeasuredAccount | None, checked: Checked | None) -> int | None:
    """The highest of what was measured."""
    known = [plan.measured_peak or 0, account.measured if account else 0, checked.measured_peak if checked else 0]
    return max(known) or None


def _verdict(plan: Plan) -> Verdict:
    claim = plan.certificate
    gap = plan.predicted_seconds / claim.bound_seconds - 1 if claim.bound_seconds > 0 else None
    return Verdict(
        line=verdict(plan),
        fits=fits(plan),
        budget=plan.budget.limits[DEVICE],
        predicted_peak=plan.predicted_peak,
        measured_peak=plan.measured_peak,
        baseline_peak=plan.baseline_peak,
        predicted_seconds=plan.predicted_seconds,
        baseline_seconds=plan.baseline_seconds,
        overhead=plan.overhead,
        smallest_budget=plan.smallest_budget,
        smallest_bound=plan.smallest_bound,
        kept_nbytes=plan.kept_nbytes,
        recomputed_nbytes=plan.recomputed_nbytes,
        num_replays=plan.num_replays,
        engine=plan.engine,
        solver=claim.solver,
        status=claim.status.value,
        gap=None if gap is None else max(0.0, gap),
    )


def _peak(plan: Plan) -> PeakData:
    found = peak_account(plan)
    return PeakData(found.peak, found.where, found.phase, dict(found.categories), found.modules)


def _accuracy(plan: Plan, measured: Timeline | None, account: MeasuredAccount | None) -> list[AccuracyRow]:
    """Predictions beside what was seen, of the step, of its parts, and of each round of landing."""
    rows: list[AccuracyRow] = []

    def row(name: str, unit: str, predicted: float, seen: float, note: str = "") -> None:
        if seen > 0:
            rows.append(AccuracyRow(name, unit, float(predicted), float(seen), predicted / seen - 1, note))

    if plan.measured_peak:
        row("peak of the step", "bytes", plan.predicted_peak, plan.measured_peak, "the optimizer's part is predicted")
    if measured is not None and account is not None:
        known = plan.predicted.events
        if account.is_measured:
            where = account.account.where
            row("bytes at the measured peak", "bytes", account.account.peak, account.measured, f"at {where}")
        for phase, (predicted, seen) in _phases(plan, measured).items():
            row(f"seconds of the {phase}", "seconds", predicted, seen, "median of some steps")
        if account.worst:
            words = "measured less predicted bytes, at " + account.worst_where
            rows.append(AccuracyRow("largest miss of one op", "bytes", None, float(account.worst), None, words))
        told = [e for e in measured.events if 0 <= e.index < len(known)]
        close = sum(abs(e.peak - known[e.index].peak) <= 0.01 * e.peak for e in told)
        if told:
            share = close / len(told)
            rows.append(AccuracyRow("instructions within 1 % of their bytes", "share", None, share, None, ""))
    for one in plan.landing:
        name = f"landing, round {one.round}"
        row(f"{name}: peak", "bytes", one.predicted_peak, one.measured_peak, "" if one.is_kept else "not kept")
        row(f"{name}: step", "seconds", one.predicted_seconds, one.measured_seconds, "" if one.is_kept else "not kept")
    return rows


def _phases(plan: Plan, measured: Timeline) -> dict[str, tuple[float, float]]:
    """Predicted and measured seconds of forward and backward, of those instructions that were measured."""
    known = plan.predicted.events
    found: dict[str, list[float]] = {}
    names = {Phase.FORWARD.value: "forward", Phase.LOSS.value: "backward", Phase.BACKWARD.value: "backward"}
    is_behind = False
    for event in measured.events:
        if event.label:
            name = names.get(event.label, event.label)
            inside = [
                e.end - e.start
                for e in known
                if (op := op_at(plan, e.index)) is not None and op.phase.value == event.label
            ]
            predicted = sum(inside)
        elif 0 <= event.index < len(known):
            op = op_at(plan, event.index)
            is_behind = is_behind or (op is not None and op.phase is Phase.LOSS)
            name = "backward" if is_behind else "forward"
            predicted = known[event.index].end - known[event.index].start
        else:
            continue
        row = found.setdefault(name, [0.0, 0.0])
        row[0] += predicted
        row[1] += event.end - event.start
    return {name: (row[0], row[1]) for name, row in found.items()}


def _bits(checked: Checked) -> BitsData:
    note = ""
    if checked.tolerance:
        seen = "" if checked.deviation is None else f"; it is {checked.deviation:.2g} off"
        note = f"a rewrite is not bitwise: within {checked.tolerance:g} of plain eager{seen}"
    return BitsData(checked.equal, checked.reference, checked.noise, checked.differences[:50], note)


def _metrics(plan: Plan) -> list[Metric]:
    peak = plan.measured_peak or plan.predicted_peak
    saved = 1 - plan.predicted_peak / plan.baseline_peak if plan.baseline_peak else 0.0
    found = []
    number = num_parameters(plan)
    if number and peak:
        found.append(Metric("parameters", float(number), "count", "trained and frozen ones, tied ones once"))
        found.append(Metric("parameters per GB", number / (peak / 1e9), "count", "of the step's peak, 10^9 bytes"))
    found.append(Metric("memory saved", saved, "share", "of the peak with everything kept"))
    found.append(Metric("recompute overhead", plan.overhead, "share", "of the step with everything kept, predicted"))
    if saved > 0:
        ratio = plan.overhead / saved
        found.append(Metric("compute-memory ratio", ratio, "", "per cent of time paid for each per cent of memory"))
    found.append(Metric("kept for the backward", float(plan.kept_nbytes), "bytes", "that the forward leaves behind"))
    found.append(Metric("made again", float(plan.recomputed_nbytes), "bytes", f"by {plan.num_replays} replays"))
    free = plan.budget.limits[DEVICE] - peak
    found.append(Metric("free below the budget", float(max(0, free)), "bytes", "at the peak"))
    return found


def num_parameters(plan: Plan) -> int:
    """How many numbers the model's parameters are; 0 where the plan does not say."""
    table = plan.signature.get("parameters")
    total = 0
    for row in table.values() if isinstance(table, dict) else ():
        match row:
            case [_, list(shape), *_] if all(type(size) is int and size >= 0 for size in shape):
                count = 1
                for size in shape:
                    count *= size
                total += count
    return total


def _environment(plan: Plan) -> dict[str, str]:
    """What the plan says of where it was made, and what made this report."""
    facts = plan.signature.get("device_facts")
    known = {str(key): str(value) for key, value in facts.items()} if isinstance(facts, dict) else {}
    shown = {"planned on": plan.on or known.pop("name", str(plan.signature.get("device", "")))}
    shown |= {key.replace("_", " "): value for key, value in known.items()}
    if "torch" in plan.signature:
        shown["torch"] = str(plan.signature["torch"])
    shown["costs"] = f"{plan.cost.origin.value}, spread {plan.cost.spread:.1%}"
    for key in ("autocast", "accumulate", "release_outputs"):
        if key in plan.signature:
            shown[key.replace("_", " ")] = str(plan.signature[key])
    claim = plan.certificate
    shown["solver"] = f"{claim.solver}, {claim.status.value}, {claim.solve_seconds:.2f} s, seed {claim.seed}"
    shown["report by"] = f"keepless {_version()}, Python {platform.python_version()}"
    return {key: value for key, value in shown.items() if value}


def _version() -> str:
    try:
        return metadata.version("keepless")
    except metadata.PackageNotFoundError:  # run from its sources
        return "(not installed)"


def _notes(plan: Plan) -> list[str]:
    """What a reader must know before trusting the figures."""
    notes = [*describe_elsewhere(plan.signature, plan.cost.spread), *describe_rewrites(plan.rewrites)]
    if plan.cost.disturbed >= _DISTURBED:
        notes.append(
            f"Other processes had the cores while ops were timed: {plan.cost.disturbed:.0%} of the step's seconds are "
            "too long, and the plan may not be the fastest. Bytes do not depend on it."
        )
    if plan.allocation is not None:
        notes.append(str(plan.allocation))
    return notes


def _fits(found: Sequence[Found]) -> tuple[list[GridData], list[SizesData]]:
    grids: list[GridData] = []
    sizes: list[SizesData] = []
    for one in found:
        facts = one.as_dict() if hasattr(one, "as_dict") else {}
        match facts:
            case {"cells": list(cells), "budget": int(budget), "batches": list(batches), "lengths": list(lengths)}:
                rows = tuple(
                    GridCell(c["batch"], c["length"], c["state"], c["smallest_budget"], c["baseline_budget"])
                    for c in cells
                )
                grids.append(GridData(budget, tuple(batches), tuple(lengths), rows))
            case {"tried": list(tried), "axis": str(axis), "size": int(size), "budget": int(budget)}:
                names = ("size", "fits", "smallest_budget", "baseline_budget", "seconds", "overhead", "reason")
                rows_tried = tuple(SizeRow(**{name: row[name] for name in names}) for row in tried)
                sizes.append(SizesData(axis, size, budget, str(facts.get("reason", "")), rows_tried))
            case _:
                raise ReportError(
                    f"fits= takes what keepless.fits_grid, max_batch, max_length and max_depth give, not a "
                    f"{type(one).__name__}."
                )
    return grids, sizes
