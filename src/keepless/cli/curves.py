"""The command `curve`: the step's time for every budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keepless.cli.options import (
    Accumulates,
    BatchSize,
    Caches,
    Debug,
    Dtype,
    Json,
    ModelArgument,
    Optimizer,
    Outside,
    PlannedDevice,
    Quiet,
    Releases,
    RewriteOption,
    SaveOption,
    Seed,
    SeqLen,
    TakeoverOption,
)
from keepless.cli.session import UsageError, check_picture, check_target, planning, read_budget, read_nbytes, session
from keepless.ir.budget import MAX_NBYTES, parse_bytes
from keepless.reporting.tables import plan_dict, verdict


def curve_command(
    model: ModelArgument,
    points: Annotated[int, typer.Option(help="Budgets to solve for, the two ends among them.")] = 12,
    picture: Annotated[
        Path | None, typer.Option(help="Draw time over budgets into this file (.png, .svg, .pdf).")
    ] = None,
    save_at: Annotated[str | None, typer.Option(help="A budget whose plan is shown, and written to --save.")] = None,
    save: SaveOption = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="A solver to show beside the curve, once or more often; a few are shown.")
    ] = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    dtype: Dtype = "float32",
    optimizer: Optimizer = "adamw",
    device: PlannedDevice = "cpu",
    seed: Seed = 0,
    accumulate: Accumulates = False,
    release_outputs: Releases = False,
    outside: Outside = "0",
    cache: Caches = True,
    takeover: TakeoverOption = False,
    rewrite: RewriteOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the step's time for every budget at once, from the smallest to everything kept."""
    with session(as_json, debug, quiet) as current:
        if save is not None and save_at is None:
            raise UsageError("--save writes one plan of the curve: say which, --save-at 8GiB.")
        check_picture(picture)
        check_target(save)
        wanted = None if save_at is None else read_budget(save_at)
        if wanted is not None:
            parse_bytes(wanted, device_nbytes=MAX_NBYTES)  # what cannot be read is refused before any work
        from keepless import api
        from keepless.cli.models import Recipe, build, device_and_target

        device, on = device_and_target(model, device)

        built = build(Recipe(model, batch_size, seq_len, dtype, optimizer, device, 1e-3, seed))
        options: dict[str, Any] = {
            "optimizer": built.optimizer,
            "loss_fn": built.loss_fn,
            "accumulate": accumulate,
            "release_outputs": release_outputs,
            "outside": read_nbytes(outside),
            "points": points,
            "strategies": strategy or None,
            "cache": cache,
            "takeover": takeover,
            "rewrites": rewrite or (),
            "on": on,
        }
        with planning("curve") as progress:
            found = api.curve(built.model, built.batch, progress=progress, **options)
        chosen = None if wanted is None else found.plan(wanted)
        if chosen is not None and save is not None:
            chosen.save(save)
        if picture is not None:
            found.draw(picture, budget=wanted)
        if as_json:
            current.answer = found.as_dict() | {
                "plan": None if chosen is None else plan_dict(chosen),
                "plan_file": None if save is None else str(save),
                "picture": None if picture is None else str(picture),
            }
            return
        current.tell(str(found))
        if chosen is not None:
            current.show(str(chosen))
            current.tell(verdict(chosen))
        if save is not None:
            current.show(f"plan     {save}")
        if picture is not None:
            current.show(f"picture  {picture}")
