"""The commands `plan` and `show`: a plan's decisions, bytes and verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keepless.cli.allocators import AllocatorOption, read_allocator
from keepless.cli.completing import plan_files
from keepless.cli.exporting import ExportKindOption, exported
from keepless.cli.making import built_of, planned, recipe_of, refuse_meta
from keepless.cli.options import (
    Accumulates,
    BatchSize,
    BlocksOption,
    BudgetOption,
    Caches,
    Debug,
    Dtype,
    EngineOption,
    ExportOption,
    Json,
    LandOption,
    ModelArgument,
    Optimizer,
    Outside,
    PictureOption,
    PlannedDevice,
    Quiet,
    Releases,
    RewriteOption,
    SaveOption,
    Seed,
    SeqLen,
    SolverOption,
    TakeoverOption,
    Values,
)
from keepless.cli.session import Session, UsageError, check_picture, check_target, read_nbytes, session
from keepless.cost import format_graph
from keepless.files import write_whole
from keepless.machine import Plan, load_plan
from keepless.reporting.black_box import black_box_text
from keepless.reporting.black_box_file import is_black_box, read_black_box
from keepless.reporting.tables import blocks_table, parts_table, peak_table, plan_dict, steps_text, verdict


def plan_command(
    model: ModelArgument,
    budget: BudgetOption = None,
    save: SaveOption = None,
    picture: PictureOption = None,
    export: ExportOption = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    dtype: Dtype = "float32",
    optimizer: Optimizer = "adamw",
    device: PlannedDevice = "cpu",
    seed: Seed = 0,
    solver: SolverOption = "keepless",
    engine: EngineOption = "auto",
    blocks: BlocksOption = None,
    takeover: TakeoverOption = False,
    rewrite: RewriteOption = None,
    accumulate: Accumulates = False,
    release_outputs: Releases = False,
    outside: Outside = "0",
    land: LandOption = False,
    cache: Caches = True,
    values: Values = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Plan a model's training step within a budget."""
    with session(as_json, debug, quiet) as current:
        from keepless.cli.models import device_and_target

        device, on = device_and_target(model, device)
        recipe = recipe_of(model, batch_size, seq_len, dtype, optimizer, device, 1e-3, seed)
        options = {
            "on": on,
            "solver": solver,
            "engine": engine,
            "blocks": blocks,
            "takeover": takeover,
            "rewrites": rewrite or (),
            "accumulate": accumulate,
            "release_outputs": release_outputs,
            "outside": read_nbytes(outside),
            "cache": cache,
            "land": land,
        }
        if land and on is not None:
            raise UsageError("--land runs the plan's step, and --device names a device that is not here.")
        if land:
            refuse_meta(recipe, "to land a plan runs its step")
        check_picture(picture)
        check_target(save)
        check_target(export)
        found = planned(built_of(recipe), budget, options)
        if export is not None:
            write_whole(export, format_graph(found.graph, found.cost).encode("ascii"))
        describe(current, found, values=values, save=save, picture=picture)
        if export is not None:
            current.answer["graph_file"] = str(export)
            current.show(f"graph    {export}")


def show_command(
    file: Annotated[Path, typer.Argument(help="A plan file, or a black box.", autocompletion=plan_files)],
    picture: PictureOption = None,
    values: Values = False,
    export: ExportKindOption = None,
    allocator: AllocatorOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show a saved plan: what is kept, what is made again, bytes, time and reasons; or a black box. Needs no torch."""
    with session(as_json, debug, quiet) as current:
        if is_black_box(file):
            if export is not None:
                raise UsageError(f"{str(file)!r} is a black box: --export is for plan files.")
            current.answer = read_black_box(file)
            current.tell(black_box_text(current.answer))
            return
        check_picture(picture)
        state = read_allocator(allocator)
        plan = load_plan(file)
        if export is not None:
            if picture is not None or values or allocator is not None:
                raise UsageError("--export shows the plan for another tool: leave --picture, --values and --allocator.")
            current.answer, parts = exported(plan, export)
            current.tell(*parts)
            return
        state(plan)
        describe(current, plan, values=values, save=None, picture=picture)


def describe(current: Session, plan: Plan, *, values: bool, save: Path | None, picture: Path | None) -> None:
    """The plan's report; files are written before anything is printed."""
    if save is not None:
        plan.save(save)
    if picture is not None:
        from keepless.reporting.picture import draw

        draw(plan, picture)
    if current.as_json:
        current.answer = plan_dict(plan, values=values)
        current.answer |= {
            "plan_file": None if save is None else str(save),
            "picture": None if picture is None else str(picture),
        }
        return
    if not current.quiet:
        tables = parts_table(plan), blocks_table(plan, values=values), peak_table(plan)
        current.show(*tables, steps_text(plan), str(plan))
    current.tell(verdict(plan))
    if save is not None:
        current.show(f"plan     {save}")
    if picture is not None:
        current.show(f"picture  {picture}")
