"""The command `timeline`: bytes and seconds over the step, predicted and measured, as tables, traces and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keepless.cli.making import planned
from keepless.cli.options import (
    Accumulates,
    BatchSize,
    BudgetOption,
    Caches,
    Debug,
    Device,
    Dtype,
    EngineOption,
    Json,
    Optimizer,
    Outside,
    PictureOption,
    PlanFileOption,
    Quiet,
    Releases,
    Seed,
    SeqLen,
    SolverOption,
    TakeoverOption,
)
from keepless.cli.session import UsageError, check_picture, check_subject, check_target, read_nbytes, session
from keepless.ir import Timeline, format_bytes
from keepless.machine import Plan, load_plan
from keepless.reporting.account import peak_account, phase_instructions
from keepless.reporting.account_table import account_table
from keepless.reporting.measured_account import measured_account
from keepless.reporting.series import save_timeline, timeline_dict
from keepless.reporting.tables import format_percent, steps_text
from keepless.reporting.trace import save_trace

if TYPE_CHECKING:
    from keepless.cli.models import Built


def timeline_command(
    subject: Annotated[
        str,
        typer.Argument(help="A plan file; or package.module:factory or hf:PATH_TO_CONFIG.json, with -b or --plan."),
    ],
    budget: BudgetOption = None,
    plan: PlanFileOption = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run some steps, and show what they took.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of --measure.")] = 5,
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace for ui.perfetto.dev or chrome://tracing into this file.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", "-o", help="Write the timeline into this JSON file.")] = None,
    picture: PictureOption = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    dtype: Dtype = "float32",
    optimizer: Optimizer = "adamw",
    device: Device = "cpu",
    seed: Seed = 0,
    solver: SolverOption = "keepless",
    engine: EngineOption = "auto",
    takeover: TakeoverOption = False,
    accumulate: Accumulates = False,
    release_outputs: Releases = False,
    outside: Outside = "0",
    cache: Caches = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show bytes and seconds over the step: by category and by module, predicted and measured."""
    with session(as_json, debug, quiet) as current:
        check_picture(picture)
        check_target(trace)
        check_target(save)
        if Path(subject).is_file():
            if measure or budget is not None or plan is not None:
                raise UsageError(
                    f"{subject!r} is a plan file, which is shown as it is: name the model for --measure, -b or --plan."
                )
            found, measured = load_plan(subject), None
        else:
            check_subject(subject)
            if (budget is None) == (plan is None):
                raise UsageError("Of a model, give --budget or --plan.")
            from keepless.cli.models import Recipe, build, device_and_target

            device, on = device_and_target(subject, device)
            if measure and (device == "meta" or on is not None):
                raise UsageError("A step can be measured only where the device and the weights are.")
            built = build(Recipe(subject, batch_size, seq_len, dtype, optimizer, device, 1e-3, seed))
            options = {
                "solver": solver,
                "engine": engine,
                "takeover": takeover,
                "accumulate": accumulate,
                "release_outputs": release_outputs,
                "outside": read_nbytes(outside),
                "cache": cache,
                "on": on,
            }
            found = load_plan(plan) if plan is not None else planned(built, str(budget), options)
            measured = _measured(built, found, repeats) if measure else None
        if trace is not None:
            save_trace(trace, found, measured)
        if save is not None:
            save_timeline(save, found, measured)
        if picture is not None:
            from keepless.reporting.picture import draw

            draw(found, picture, measured=measured)
        if as_json:
            files = {"trace": trace, "file": save, "picture": picture}
            current.answer = timeline_dict(found, measured)
            current.answer |= {name: None if path is None else str(path) for name, path in files.items()}
            return
        current.show(account_table(peak_account(found) if measured is None else measured_account(found, measured)))
        current.tell(steps_text(found))
        if measured is not None:
            current.tell(_compared(found, measured))
        for name, path in (("trace", trace), ("timeline", save), ("picture", picture)):
            if path is not None:
                current.show(f"{name:<8} {path}")


def _measured(built: Built, plan: Plan, repeats: int) -> Timeline:
    from keepless import api

    return api.timeline(built.model, built.batch, plan, loss_fn=built.loss_fn, repeats=repeats)


def _compared(plan: Plan, measured: Timeline) -> str:
    """Measured and predicted peak and seconds, of the part of the step that was measured."""
    first, _ = phase_instructions(plan).get("optimizer", (len(plan.program), 0))
    same = plan.predicted.events[:first]
    peak = max((event.peak for event in same), default=0)
    seconds = same[-1].end if same else 0.0
    error = peak / measured.peak - 1 if measured.peak else 0.0
    late = seconds / measured.seconds - 1 if measured.seconds else 0.0
    return (
        f"measured peak {format_bytes(measured.peak)}, predicted {format_bytes(peak)} ({format_percent(error)}); "
        f"measured {measured.seconds:.4g} s, predicted {seconds:.4g} s ({format_percent(late)}); the optimizer's step "
        "is not run"
    )
