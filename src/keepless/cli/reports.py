"""The command `report`: everything that is known of a plan, as one page, as JSON, and in the terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keepless.cli.fits import read_sizes
from keepless.cli.making import planned
from keepless.cli.options import (
    Accumulates,
    BatchSize,
    BudgetOption,
    Caches,
    Debug,
    Dtype,
    EngineOption,
    Json,
    Optimizer,
    Outside,
    PlanFileOption,
    PlannedDevice,
    Quiet,
    Releases,
    RewriteOption,
    Seed,
    SeqLen,
    SolverOption,
    TakeoverOption,
)
from keepless.cli.session import UsageError, check_subject, check_target, planning, read_nbytes, session
from keepless.machine import Plan, load_plan

if TYPE_CHECKING:
    from keepless.cli.models import Built
    from keepless.control import FitsGrid, StepCurve
    from keepless.reporting.page import ReportData


def report_command(
    subject: Annotated[
        str,
        typer.Argument(
            help="A plan file, or a report's .json; or package.module:factory or hf:PATH_TO_CONFIG.json, with -b or "
            "--plan."
        ),
    ],
    budget: BudgetOption = None,
    plan: PlanFileOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the page into this file (.html), or its data (.json).")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run some steps, for measured bytes and seconds.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of --measure.")] = 5,
    curve: Annotated[bool, typer.Option("--curve", help="With the step's time for every budget.")] = False,
    points: Annotated[int, typer.Option(help="Budgets that --curve is solved for.")] = 12,
    batches: Annotated[str | None, typer.Option("--batch", help="With what fits: of these rows, as 1,2,4.")] = None,
    lengths: Annotated[
        str | None, typer.Option("--length", help="With what fits: of these texts, as 512,1024.")
    ] = None,
    title: Annotated[str, typer.Option(help="Above the page. [default: the model's name]")] = "",
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    dtype: Dtype = "float32",
    optimizer: Optimizer = "adamw",
    device: PlannedDevice = "cpu",
    seed: Seed = 0,
    solver: SolverOption = "keepless",
    engine: EngineOption = "auto",
    takeover: TakeoverOption = False,
    rewrite: RewriteOption = None,
    accumulate: Accumulates = False,
    release_outputs: Releases = False,
    outside: Outside = "0",
    cache: Caches = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Report a plan: verdict, bytes over the step, decisions, curve, what fits, how good the predictions are.

    From a plan file nothing is run, and torch is not needed: keepless report step.plan -o report.html
    Of a model everything: keepless report package.module:factory -b 8GiB --measure --curve -o report.html
    """
    with session(as_json, debug, quiet) as current:
        from keepless.reporting.page import check_report_path, save_report, terminal_page

        if out is not None:
            check_report_path(out)
            check_target(out, Path(subject) if Path(subject).is_file() else None)
        is_grid = batches is not None or lengths is not None
        if is_grid and (batches is None or lengths is None):
            raise UsageError("A grid has two sides: give --batch 1,2,4 and --length 512,1024.")
        if Path(subject).is_file():
            if measure or curve or is_grid or budget is not None or plan is not None:
                raise UsageError(
                    f"{subject!r} is a file, which is shown as it is: name the model, with --plan or -b, for "
                    "--measure, --curve and --batch."
                )
            found = _from_file(Path(subject), title)
        else:
            check_subject(subject)
            if (budget is None) == (plan is None):
                raise UsageError("Of a model, give --budget or --plan.")
            from keepless.cli.models import Recipe, build, device_and_target

            device, on = device_and_target(subject, device)
            if measure and (device == "meta" or on is not None):
                raise UsageError("A step can be measured only where the device and the weights are.")
            sizes = read_sizes("--batch", batches), read_sizes("--length", lengths)
            recipe = Recipe(subject, batch_size, seq_len, dtype, optimizer, device, 1e-3, seed)
            built = build(recipe)
            options: dict[str, Any] = {
                "accumulate": accumulate,
                "release_outputs": release_outputs,
                "outside": read_nbytes(outside),
                "cache": cache,
                "takeover": takeover,
                "rewrites": rewrite or (),
                "on": on,
            }
            own = options | {"solver": solver, "engine": engine, "seed": seed}
            made = load_plan(plan) if plan is not None else planned(built, str(budget), own)
            grids = [_grid(recipe, built, made, sizes, options)] if is_grid else []
            far = curve and on is not None
            traced = _curve(built, points, options | {"seed": seed}) if far else curve
            found = _reported(built, made, measure, repeats, traced, points, grids, title, takeover)
        if out is not None:
            save_report(out, found)
        if as_json:
            current.answer = json.loads(found.to_json())
            return
        if quiet:
            current.tell(found.verdict.line)
        current.show(*terminal_page(found))
        if out is not None:
            current.show(f"report   {out}")


def _from_file(path: Path, title: str) -> ReportData:
    """The report of a plan file, or one that was written as JSON."""
    from keepless.reporting.page import load_report, report_data

    if path.suffix.lower() == ".json" or is_report(path):
        found = load_report(path)
        return replace(found, title=title) if title else found
    return report_data(load_plan(path), title=title)


def is_report(path: Path) -> bool:
    """Whether a file begins as reports' data does."""
    with open(path, "rb") as file:
        return b'"keepless-report"' in file.read(256)


def _grid(
    recipe: Any, built: Built, plan: Plan, sizes: tuple[list[int], list[int]], options: dict[str, Any]
) -> FitsGrid:
    """What fits the plan's budget."""
    from keepless import api
    from keepless.cli.sized import Sized

    subject = Sized(recipe, {})
    for axis in ("batch", "length"):
        subject.check(axis)
    with planning("grid") as progress:
        return api.fits_grid(
            built.model,
            lambda rows, tokens: subject.batch(batch=rows, length=tokens),
            plan.budget.limits["device"],
            batches=sizes[0],
            lengths=sizes[1],
            optimizer=built.optimizer,
            loss_fn=built.loss_fn,
            progress=progress,
            **options,
        )


def _curve(built: Built, points: int, options: dict[str, Any]) -> StepCurve:
    """The curve of the step on a device that is not here."""
    from keepless import api

    with planning("curve") as progress:
        return api.curve(
            built.model,
            built.batch,
            optimizer=built.optimizer,
            loss_fn=built.loss_fn,
            points=points,
            progress=progress,
            **options,
        )


def _reported(
    built: Built,
    plan: Plan,
    measure: bool,
    repeats: int,
    curve: StepCurve | bool,
    points: int,
    grids: list[FitsGrid],
    title: str,
    takeover: bool,
) -> ReportData:
    """The report; a curve that is asked for is of what the plan was asked for, also where it came from a file."""
    from keepless import api

    with planning("report") as progress:
        return api.report(
            built.model,
            built.batch,
            plan,
            path=None,
            loss_fn=built.loss_fn,
            optimizer=built.optimizer,
            measure=measure,
            repeats=repeats,
            curve=curve,
            points=points,
            fits=grids,
            title=title,
            takeover=takeover,
            progress=progress,
        )
