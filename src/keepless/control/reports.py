"""The report of a model's plan: what was asked for is run here, `keepless.reporting.page` makes the report of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from keepless.control.curves import StepCurve, make_curve
from keepless.control.fits import Fits, FitsGrid
from keepless.control.options import Progress, StepOptions
from keepless.control.timing import measure_timeline
from keepless.control.verifying import Verification, verify
from keepless.errors import ParameterError
from keepless.ir import Timeline
from keepless.machine import Plan
from keepless.machine.parts import GRAPH
from keepless.measure import describe_device
from keepless.reporting.page import ReportData, check_report_path, report_data, save_report

NO_CURVE = "a curve is of a step that is captured as a whole; this plan's engine is {}"
NOT_HERE = "the plan was made for {device}; keepless curve MODEL --device draws one for a device that is not here"


def make_report(
    model: torch.nn.Module | None,
    batch: Any,
    plan: Plan,
    *,
    path: str | os.PathLike[str] | None,
    loss_fn: Any,
    optimizer: torch.optim.Optimizer | None,
    measure: bool,
    repeats: int,
    curve: StepCurve | bool,
    points: int,
    fits: Sequence[Fits | FitsGrid] | Fits | FitsGrid,
    timeline: Timeline | None,
    verification: Verification | None,
    title: str,
    takeover: bool,
    progress: Progress | None,
) -> ReportData:
    """See `keepless.report`."""
    if not isinstance(plan, Plan):
        raise ParameterError(f"plan= is a {type(plan).__name__}: give what keepless.plan or keepless.load gives.")
    if path is not None:
        check_report_path(path)
    if model is None and curve is True:
        raise ParameterError("curve=True plans the step again: give the model and its batch, or a curve.")
    searches = [fits] if isinstance(fits, (Fits, FitsGrid)) else list(fits)
    tell = progress or (lambda stage, done, total: None)
    if model is not None and measure:
        tell("measured", 0, 2)
        verification = verification or verify(model, batch, plan, loss_fn=loss_fn, repeats=min(3, repeats))
        tell("measured", 1, 2)
        timeline = timeline or measure_timeline(model, batch, plan, loss_fn=loss_fn, repeats=repeats)
        tell("measured", 2, 2)
    missing = {}
    if curve is True and (plan.engine != GRAPH or plan.on):
        curve, missing["curve"] = False, NOT_HERE.format(device=plan.on) if plan.on else NO_CURVE.format(plan.engine)
    if curve is True:
        options = curve_options(plan, loss_fn, takeover)
        curve = make_curve(model, batch, optimizer, options, points=points, strategies=None, progress=progress)  # type: ignore[arg-type]
    found = report_data(
        plan,
        measured=timeline,
        checked=verification,
        curve=curve.as_report(plan) if isinstance(curve, StepCurve) else None,
        fits=searches,
        environment=_here(model) if timeline is not None or verification is not None else None,
        title=title,
        missing=missing,
    )
    if path is not None:
        save_report(path, found)
    return found


def curve_options(plan: Plan, loss_fn: Any, takeover: bool) -> StepOptions:
    """What a plan was asked for, for a curve of the same step."""
    outside = plan.signature.get("outside_nbytes", 0)
    return StepOptions(
        loss_fn=loss_fn,
        accumulate=bool(plan.signature.get("accumulate", False)),
        release_outputs=bool(plan.signature.get("release_outputs", False)),
        outside=outside if isinstance(outside, int) else 0,
        seed=plan.certificate.seed,
        takeover=takeover,
        rewrites=plan.rewrites,
    )


def _here(model: torch.nn.Module | None) -> dict[str, str]:
    """Where it was measured."""
    parameter = None if model is None else next(model.parameters(), None)
    return {} if parameter is None else {"measured on": str(describe_device(parameter.device)["name"])}
